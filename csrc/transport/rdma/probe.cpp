// What doctor asks: see Probe in devices.h.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "core/error.h"
#include "device/gpudirect.h"
#include "transport/rdma/devices.h"
#include "transport/rdma/libraries.h"

namespace rdmaload::rdma {
namespace {

namespace fs = std::filesystem;

// Below this much the receive windows and buffers of a few connections do not fit.
constexpr uint64_t kLeastMemlockBytes = uint64_t{64} << 20;

Probe good(const std::string& name, const std::string& detail) { return {name, true, true, detail, {}}; }
Probe bad(const std::string& name, const std::string& detail, const std::string& next_step) {
  return {name, false, true, detail, next_step};
}
Probe slower(Probe probe) {
  probe.required = false;
  return probe;
}

Probe probe_libraries() {
  try {
    Libraries::process();
    return good("libraries", "libibverbs and librdmacm");
  } catch (const Error& error) {
    return bad("libraries", error.what(),
               "install librdmacm1 and ibverbs-providers, or let the store be read over TCP");
  }
}

Probe probe_devices(const std::vector<Card>& cards, const ProbeOptions& options) {
  if (cards.empty()) {
    return bad("devices", "no RDMA card",
               "load the card's driver (modprobe mlx5_ib), or read over TCP; without a card: rdma link add "
               "rxe0 type "
               "rxe netdev eth0, which is slower than TCP");
  }
  std::string names;
  for (const Card& card : cards)
    names += (names.empty() ? "" : ", ") + card.name + (card.iwarp() ? " (iWARP)" : "");
  if (!options.device.empty() && card_named(cards, options.device) == nullptr) {
    return bad("devices", "no card " + options.device + "; there is " + names, "name one of them, or none");
  }
  return good("devices", names);
}

// The device files through which cards are used: often missing in containers.
Probe probe_access(const ProbeOptions& options) {
  const fs::path directory = fs::path(options.dev) / "infiniband";
  const std::string advice =
      "in a container: docker run --device /dev/infiniband; else modprobe ib_uverbs rdma_ucm";
  std::error_code error;
  bool verbs = false;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
    if (entry->path().filename().string().rfind("uverbs", 0) != 0) continue;
    if (access(entry->path().c_str(), R_OK | W_OK) == 0) {
      verbs = true;
    } else {
      return bad("device files", entry->path().string() + ": " + std::strerror(errno), advice);
    }
  }
  if (!verbs) return bad("device files", "no uverbs device in " + directory.string(), advice);
  const fs::path manager = directory / "rdma_cm";
  if (access(manager.c_str(), R_OK | W_OK) != 0) {
    return bad("device files", manager.string() + ": " + std::strerror(errno), advice);
  }
  return good("device files", directory.string());
}

std::string describe(const Card& card, const CardPort& port) {
  std::string text = card.name + " port " + std::to_string(port.number) + ": " + port.state + ", " +
                     port.rate + ", " + port.link_layer;
  for (const Gid& gid : port.gids) {
    // RoCE v2 with an IPv4 address is what a connection by address takes.
    if (port.link_layer == "Ethernet" && gid.type != "RoCE v2") continue;
    return text + ", GID " + std::to_string(gid.index) + " " + gid.address;
  }
  return text;
}

Probe probe_port(const std::vector<Card>& cards, const ProbeOptions& options) {
  std::string active, down;
  for (const Card& card : cards) {
    if (!options.device.empty() && card.name != options.device) continue;
    for (const CardPort& port : card.ports) {
      std::string& list = port.active() && !card.iwarp() ? active : down;
      list += (list.empty() ? "" : "; ") + describe(card, port) + (card.iwarp() ? ", iWARP" : "");
    }
  }
  if (!active.empty()) return good("port", active);
  return bad("port", down.empty() ? "no port" : down,
             "an active InfiniBand or RoCE port is needed: look at the cable, the switch, the subnet manager "
             "(ibstat, "
             "rdma link); iWARP has no write with immediate, which the protocol needs");
}

Probe probe_memlock() {
  const std::optional<uint64_t> limit = memlock_limit();
  if (!limit) return good("locked memory", "unlimited");
  Probe probe =
      bad("locked memory", std::to_string(*limit >> 10) + " KiB",
          "ulimit -l unlimited, LimitMEMLOCK=infinity in a systemd unit, or docker run --ulimit memlock=-1; "
          "what does not fit is received into a staging buffer and copied");
  return *limit < kLeastMemlockBytes ? probe : slower(probe);
}

// Whether a card takes dma-bufs: registering one with a bad descriptor fails with EBADF if it does.
Probe probe_dmabuf(const std::vector<Card>& cards, const ProbeOptions& options) {
  const std::string advice =
      "a card and driver with dma-buf (MLNX_OFED or Linux 5.12, rdma-core 34), or the nvidia_peermem module; "
      "without, "
      "GPU memory is filled through host memory";
  const Card* card = nullptr;
  for (const Card& candidate : cards) {
    if (candidate.usable() && (options.device.empty() || candidate.name == options.device)) {
      card = &candidate;
      break;
    }
  }
  if (card == nullptr) return bad("dma-buf", "no usable card", advice);
  try {
    const Libraries& libraries = Libraries::process();
    if (libraries.ibv_reg_dmabuf_mr == nullptr) return bad("dma-buf", "libibverbs is older than 34", advice);
    abi::Device** list = libraries.ibv_get_device_list(nullptr);
    abi::Context* context = nullptr;
    for (abi::Device** device = list; device != nullptr && *device != nullptr; ++device) {
      if (card->name == (*device)->name) context = libraries.ibv_open_device(*device);
    }
    if (list != nullptr) libraries.ibv_free_device_list(list);
    if (context == nullptr) return bad("dma-buf", card->name + " cannot be opened", advice);
    int error = 0;
    if (abi::ProtectionDomain* domain = libraries.ibv_alloc_pd(context); domain != nullptr) {
      const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
      abi::MemoryRegion* region = libraries.ibv_reg_dmabuf_mr(domain, 0, page, 0, -1, abi::kAccessLocalWrite);
      error = region == nullptr ? errno : 0;
      if (region != nullptr) libraries.ibv_dereg_mr(region);
      libraries.ibv_dealloc_pd(domain);
    } else {
      error = errno;
    }
    libraries.ibv_close_device(context);
    if (error == EBADF) return good("dma-buf", card->name + " takes dma-bufs");
    return bad("dma-buf", card->name + ": " + std::strerror(error), advice);
  } catch (const Error& error) {
    return bad("dma-buf", error.what(), advice);
  }
}

Probe probe_peermem() {
  if (has_peermem()) return good("peermem", "nvidia_peermem is loaded");
  return bad("peermem", "nvidia_peermem is not loaded",
             "only needed for GPU memory where dma-buf is missing: modprobe "
             "nvidia_peermem");
}

Probe probe_route(const std::vector<Card>& cards, const ProbeOptions& options) {
  const std::optional<Route> route = route_to(options.host, options.port);
  if (!route) return bad("route", "no route to " + options.host, "look at ip route");
  const Card* card = card_of_netdev(cards, route->netdev);
  const std::string detail = options.host + " is reached from " + route->address + " on " + route->netdev;
  if (card == nullptr) {
    return bad("route", detail + ", which belongs to no RDMA card",
               "use the server's address in the network of a card (rdma link shows them), or read over TCP");
  }
  if (!options.device.empty() && options.device != card->name) {
    return bad("route", detail + ", which belongs to " + card->name + ", not " + options.device,
               "name " + card->name + ", or use an address in the network of " + options.device);
  }
  return good("route", detail + ", " + card->name);
}

}  // namespace

std::vector<Probe> probe(const ProbeOptions& options) {
  const std::vector<Card> cards = list_cards(options.sysfs);
  std::vector<Probe> probes{probe_libraries(), probe_devices(cards, options), probe_access(options),
                            probe_port(cards, options), probe_memlock()};
  if (!options.host.empty()) probes.push_back(probe_route(cards, options));
  probes.push_back(slower(probe_dmabuf(cards, options)));
  probes.push_back(slower(probe_peermem()));
  return probes;
}

}  // namespace rdmaload::rdma
