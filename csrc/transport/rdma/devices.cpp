#include "transport/rdma/devices.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <sstream>

namespace rdmaload::rdma {
namespace {

namespace fs = std::filesystem;

// The first line of a small file of sysfs; empty where there is none (an unused GID cannot be read, too).
std::string line_of(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "4: ACTIVE" -> "ACTIVE".
std::string after_colon(const std::string& text) {
  const size_t at = text.find(": ");
  return at == std::string::npos ? text : text.substr(at + 2);
}

// Sorted as a person counts: mlx5_2 before mlx5_10.
std::vector<fs::path> entries_of(const fs::path& directory) {
  std::vector<fs::path> entries;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
    entries.push_back(entry->path());
  }
  std::sort(entries.begin(), entries.end(), [](const fs::path& a, const fs::path& b) {
    const std::string x = a.filename(), y = b.filename();
    const auto stem = [](const std::string& text) {
      return text.substr(0, text.find_last_not_of("0123456789") + 1);
    };
    return stem(x) == stem(y) && x.size() != y.size() ? x.size() < y.size() : x < y;
  });
  return entries;
}

std::string real_path(const fs::path& path) {
  std::error_code error;
  const fs::path result = fs::canonical(path, error);
  return error ? std::string() : result.string();
}

// sysfs writes all of a GID: "0000:0000:0000:0000:0000:ffff:0a4d:0001". Empty when it is all zero (unused).
std::string short_gid(const std::string& text) {
  in6_addr address{}, none{};
  if (inet_pton(AF_INET6, text.c_str(), &address) != 1) return {};
  if (std::memcmp(&address, &none, sizeof(address)) == 0) return {};
  char shown[INET6_ADDRSTRLEN];
  return inet_ntop(AF_INET6, &address, shown, sizeof(shown)) != nullptr ? shown : std::string();
}

CardPort read_port(const fs::path& path) {
  CardPort port;
  port.number = std::atoi(path.filename().c_str());
  port.state = after_colon(line_of(path / "state"));
  port.link_layer = line_of(path / "link_layer");
  port.rate = line_of(path / "rate");
  port.gbit_per_s = std::strtod(port.rate.c_str(), nullptr);
  for (const fs::path& entry : entries_of(path / "gids")) {
    Gid gid;
    gid.index = std::atoi(entry.filename().c_str());
    gid.address = short_gid(line_of(entry));
    if (gid.address.empty()) continue;
    gid.type = line_of(path / "gid_attrs" / "types" / entry.filename());
    gid.netdev = line_of(path / "gid_attrs" / "ndevs" / entry.filename());
    port.gids.push_back(std::move(gid));
  }
  return port;
}

void add_once(std::vector<std::string>& list, const std::string& text) {
  if (!text.empty() && std::find(list.begin(), list.end(), text) == list.end()) list.push_back(text);
}

Card read_card(const fs::path& path) {
  Card card;
  card.name = path.filename();
  card.node_type = after_colon(line_of(path / "node_type"));
  card.firmware = line_of(path / "fw_ver");
  if (fs::exists(path / "device")) {
    card.pci_path = real_path(path / "device");
    const std::string node = line_of(path / "device" / "numa_node");
    if (!node.empty()) card.numa_node = std::atoi(node.c_str());
    for (const fs::path& netdev : entries_of(path / "device" / "net"))
      add_once(card.netdevs, netdev.filename());
  }
  add_once(card.netdevs, line_of(path / "parent"));  // what a software device was made on
  for (const fs::path& port : entries_of(path / "ports")) {
    card.ports.push_back(read_port(port));
    for (const Gid& gid : card.ports.back().gids) add_once(card.netdevs, gid.netdev);
  }
  return card;
}

struct InterfaceListDeleter {
  void operator()(ifaddrs* list) const noexcept { freeifaddrs(list); }
};
using InterfaceList = std::unique_ptr<ifaddrs, InterfaceListDeleter>;
InterfaceList interfaces() {
  ifaddrs* list = nullptr;
  return InterfaceList(getifaddrs(&list) == 0 ? list : nullptr);
}

socklen_t length_of(const sockaddr& address) {
  return address.sa_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
}

std::string numeric(const sockaddr& address) {
  char text[NI_MAXHOST] = "";
  getnameinfo(&address, length_of(address), text, sizeof(text), nullptr, 0, NI_NUMERICHOST);
  return text;
}

// The PCI functions and bridges of a sysfs path, from the root on: "pci0000:17", "0000:17:01.0", ...
std::vector<std::string> pci_steps(const std::string& path) {
  std::vector<std::string> steps;
  std::stringstream parts(path);
  for (std::string part; std::getline(parts, part, '/');) {
    const bool root = part.rfind("pci", 0) == 0 && part.find(':') != std::string::npos;
    const bool function =
        std::count(part.begin(), part.end(), ':') == 2 && part.find('.') != std::string::npos;
    if (root || (function && !steps.empty())) steps.push_back(part);
  }
  return steps;
}

bool may_lock_anything() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("CapEff:", 0) != 0) continue;
    constexpr int kIpcLock = 14;  // CAP_IPC_LOCK
    return (std::strtoull(line.c_str() + 7, nullptr, 16) >> kIpcLock & 1) != 0;
  }
  return false;
}

}  // namespace

bool Card::usable() const noexcept {
  return !iwarp() &&
         std::any_of(ports.begin(), ports.end(), [](const CardPort& port) { return port.active(); });
}

std::vector<Card> list_cards(const std::string& sysfs) {
  std::vector<Card> cards;
  for (const fs::path& entry : entries_of(fs::path(sysfs) / "class" / "infiniband")) {
    cards.push_back(read_card(entry));
  }
  return cards;
}

std::optional<Route> route_to(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* list = nullptr;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list) != 0) return std::nullopt;
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(list, freeaddrinfo);
  for (const addrinfo* entry = list; entry != nullptr; entry = entry->ai_next) {
    // Connecting a datagram socket sends nothing: the system looks up the route and picks our address.
    const int fd = ::socket(entry->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    sockaddr_storage own{};
    socklen_t size = sizeof(own);
    const bool found = ::connect(fd, entry->ai_addr, entry->ai_addrlen) == 0 &&
                       ::getsockname(fd, reinterpret_cast<sockaddr*>(&own), &size) == 0;
    ::close(fd);
    if (!found) continue;
    const std::string address = numeric(reinterpret_cast<const sockaddr&>(own));
    const InterfaceList all = interfaces();
    for (const ifaddrs* interface = all.get(); interface != nullptr; interface = interface->ifa_next) {
      const sockaddr* bound = interface->ifa_addr;
      if (bound == nullptr || (bound->sa_family != AF_INET && bound->sa_family != AF_INET6)) continue;
      if (numeric(*bound) != address) continue;
      // To an address of this machine the system answers by itself, through lo: the card is still that of the
      // interface that has the address.
      return Route{interface->ifa_name, address};
    }
  }
  return std::nullopt;
}

const Card* card_of_netdev(std::span<const Card> cards, const std::string& netdev) {
  for (const Card& card : cards) {
    if (std::find(card.netdevs.begin(), card.netdevs.end(), netdev) != card.netdevs.end()) return &card;
  }
  return nullptr;
}

const Card* card_named(std::span<const Card> cards, const std::string& name) {
  for (const Card& card : cards) {
    if (card.name == name) return &card;
  }
  return nullptr;
}

const char* name_of(CardDistance::Crossing crossing) noexcept {
  switch (crossing) {
    case CardDistance::Crossing::kNothing:
      return "below one PCI root";
    case CardDistance::Crossing::kCpu:
      return "across the CPU";
    case CardDistance::Crossing::kSockets:
      return "perhaps across CPU sockets";
  }
  return "";
}

std::vector<CardDistance> cards_by_distance(std::span<const Card> cards, const std::string& pci_address,
                                            const std::string& sysfs) {
  std::string lower = pci_address;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  const fs::path device = fs::path(sysfs) / "bus" / "pci" / "devices" / lower;
  const std::vector<std::string> here = pci_steps(real_path(device));
  const std::string node_text = line_of(device / "numa_node");
  const int node = node_text.empty() ? -1 : std::atoi(node_text.c_str());
  std::vector<CardDistance> distances;
  for (const Card& card : cards) {
    if (!card.usable()) continue;
    const std::vector<std::string> there = pci_steps(card.pci_path);
    size_t common = 0;
    while (common < here.size() && common < there.size() && here[common] == there[common]) ++common;
    // Else the traffic crosses the CPU, or even two of them.
    const auto crossing = common > 0                                      ? CardDistance::Crossing::kNothing
                          : card.numa_node >= 0 && card.numa_node == node ? CardDistance::Crossing::kCpu
                                                                          : CardDistance::Crossing::kSockets;
    distances.push_back({&card, crossing, here.size() + there.size() - 2 * common});
  }
  std::stable_sort(distances.begin(), distances.end(), [](const CardDistance& a, const CardDistance& b) {
    return std::pair(a.crossing, a.hops) < std::pair(b.crossing, b.hops);
  });
  return distances;
}

std::vector<std::string> cards_to_try(std::span<const Card> cards, const std::string& near,
                                      const std::string& sysfs) {
  std::vector<std::string> names;
  if (!near.empty()) {
    for (const CardDistance& distance : cards_by_distance(cards, near, sysfs)) {
      names.push_back(distance.card->name);
    }
    if (names.size() == 1) names.clear();
  }
  names.emplace_back();
  return names;
}

std::optional<std::string> address_of_card(const Card& card, const std::string& like) {
  const int family = std::count(like.begin(), like.end(), ':') > 1 ? AF_INET6 : AF_INET;
  const InterfaceList all = interfaces();
  for (const ifaddrs* interface = all.get(); interface != nullptr; interface = interface->ifa_next) {
    const sockaddr* bound = interface->ifa_addr;
    if (bound == nullptr || bound->sa_family != family || (interface->ifa_flags & IFF_UP) == 0) continue;
    if (std::find(card.netdevs.begin(), card.netdevs.end(), interface->ifa_name) == card.netdevs.end())
      continue;
    return numeric(*bound);
  }
  return std::nullopt;
}

std::optional<uint64_t> memlock_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return std::nullopt;
  if (may_lock_anything()) return std::nullopt;
  return limit.rlim_cur;
}

}  // namespace rdmaload::rdma
