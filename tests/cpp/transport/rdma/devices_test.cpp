// Cards as sysfs shows them, which of them to take, and what doctor is told.
#include "transport/rdma/devices.h"

#include <doctest/doctest.h>
#include <sys/resource.h>

#include <algorithm>
#include <filesystem>
#include <string>

#include "support/bytes.h"
#include "support/temp_dir.h"

namespace rdmaload::rdma {
namespace {

using rdmaload::testing::bytes_of;
using rdmaload::testing::TempDir;
namespace fs = std::filesystem;

// A sysfs to which cards and PCI devices are added.
struct FakeSysfs {
  std::string root() const { return directory.path().string(); }
  void write(const std::string& name, const std::string& line) const {
    directory.write(name, bytes_of(line + "\n"));
  }
  void pci(const std::string& path, int numa_node) const {
    const std::string name = fs::path(path).filename();
    write("devices/" + path + "/numa_node", std::to_string(numa_node));
    fs::create_directories(directory.path() / "bus/pci/devices");
    fs::create_directory_symlink(directory.path() / "devices" / path,
                                 directory.path() / "bus/pci/devices" / name);
  }
  void card(const std::string& name, const std::string& pci_path, int numa_node, const std::string& netdev,
            const std::string& state = "4: ACTIVE", const std::string& node_type = "1: CA") const {
    const std::string base = "class/infiniband/" + name + "/";
    write(base + "node_type", node_type);
    write(base + "fw_ver", "28.39.1002");
    if (!pci_path.empty()) {
      pci(pci_path, numa_node);
      fs::create_directory_symlink(directory.path() / "devices" / pci_path,
                                   directory.path() / base / "device");
      if (!netdev.empty()) fs::create_directories(directory.path() / "devices" / pci_path / "net" / netdev);
    } else {
      write(base + "parent", netdev);
    }
    const std::string port = base + "ports/1/";
    write(port + "state", state);
    write(port + "rate", "400 Gb/sec (4X NDR)");
    write(port + "link_layer", "Ethernet");
    write(port + "gids/0", "fe80:0000:0000:0000:5054:00ff:fe12:3456");
    write(port + "gids/1", "0000:0000:0000:0000:0000:0000:0000:0000");
    write(port + "gids/3", "0000:0000:0000:0000:0000:ffff:0a4d:0001");
    write(port + "gid_attrs/types/0", "IB/RoCE v1");
    write(port + "gid_attrs/types/3", "RoCE v2");
    write(port + "gid_attrs/ndevs/0", netdev);
    write(port + "gid_attrs/ndevs/3", netdev + ".100");
  }
  TempDir directory;
};

const Probe& named(const std::vector<Probe>& probes, const std::string& name) {
  const auto found =
      std::find_if(probes.begin(), probes.end(), [&](const Probe& probe) { return probe.name == name; });
  REQUIRE(found != probes.end());
  return *found;
}

TEST_CASE("a card is read from sysfs") {
  const FakeSysfs sysfs;
  sysfs.card("mlx5_10", "pci0000:17/0000:17:01.0/0000:18:00.1", 1, "eth9");
  sysfs.card("mlx5_2", "pci0000:17/0000:17:01.0/0000:18:00.0", 1, "eth2");
  const std::vector<Card> cards = list_cards(sysfs.root());
  REQUIRE(cards.size() == 2);
  const Card& card = cards[0];
  CHECK(card.name == "mlx5_2");  // before mlx5_10
  CHECK(card.node_type == "CA");
  CHECK(card.firmware == "28.39.1002");
  CHECK(card.numa_node == 1);
  CHECK(card.pci_path ==
        fs::canonical(fs::path(sysfs.root()) / "devices/pci0000:17/0000:17:01.0/0000:18:00.0"));
  CHECK(card.netdevs == std::vector<std::string>{"eth2", "eth2.100"});
  REQUIRE(card.ports.size() == 1);
  CHECK(card.ports[0].state == "ACTIVE");
  CHECK(card.ports[0].gbit_per_s == 400);
  REQUIRE(card.ports[0].gids.size() == 2);  // the zero one is not in use
  CHECK(card.ports[0].gids[1].index == 3);
  CHECK(card.ports[0].gids[1].address == "::ffff:10.77.0.1");
  CHECK(card.ports[0].gids[1].type == "RoCE v2");
  CHECK(card.usable());
  CHECK(card_named(cards, "mlx5_10") == &cards[1]);
  CHECK(card_named(cards, "mlx5_1") == nullptr);
  CHECK(card_of_netdev(cards, "eth9") == &cards[1]);
  CHECK(card_of_netdev(cards, "eth2.100") == &cards[0]);
  CHECK(card_of_netdev(cards, "eth0") == nullptr);
}

TEST_CASE("software cards, iWARP and ports that are down") {
  const FakeSysfs sysfs;
  sysfs.card("rxe0", "", -1, "dum0");
  sysfs.card("siw0", "", -1, "dum1", "4: ACTIVE", "4: RNIC");
  sysfs.card("mlx5_0", "pci0000:00/0000:00:01.0", -1, "", "1: DOWN");
  const std::vector<Card> cards = list_cards(sysfs.root());
  CHECK(card_named(cards, "rxe0")->usable());
  CHECK(card_named(cards, "rxe0")->pci_path.empty());
  CHECK(card_of_netdev(cards, "dum0") == card_named(cards, "rxe0"));
  CHECK(card_named(cards, "siw0")->iwarp());
  CHECK(!card_named(cards, "siw0")->usable());
  CHECK(!card_named(cards, "mlx5_0")->usable());
  CHECK(list_cards((fs::path(sysfs.root()) / "nothing").string()).empty());
}

TEST_CASE("the nearest card to a GPU shares most of its way to the root") {
  const FakeSysfs sysfs;
  // One switch with GPU and card 2, another below the same root with card 1, a second root on the same socket
  // with card 3, and one on the other socket with card 0.
  sysfs.pci("pci0000:17/0000:17:01.0/0000:18:00.0/0000:19:01.0/0000:1b:00.0", 0);
  sysfs.card("mlx5_0", "pci0000:97/0000:97:01.0/0000:98:00.0", 1, "eth0");
  sysfs.card("mlx5_3", "pci0000:37/0000:37:01.0/0000:38:00.0", 0, "eth3");
  const std::string gpu = "0000:1B:00.0";  // as CUDA writes it
  const auto nearest = [&] {
    const std::vector<Card> cards = list_cards(sysfs.root());
    const std::vector<CardDistance> distances = cards_by_distance(cards, gpu, sysfs.root());
    return distances.empty() ? std::string() : distances[0].card->name;
  };
  const auto tries = [&] { return cards_to_try(list_cards(sysfs.root()), gpu, sysfs.root()); };
  CHECK(nearest() == "mlx5_3");
  sysfs.card("mlx5_1", "pci0000:17/0000:17:02.0/0000:20:00.0/0000:21:01.0/0000:22:00.0", 0, "eth1");
  CHECK(nearest() == "mlx5_1");
  sysfs.card("mlx5_2", "pci0000:17/0000:17:01.0/0000:18:00.0/0000:19:00.0/0000:1a:00.0", 0, "eth2");
  CHECK(nearest() == "mlx5_2");
  CHECK(tries() == std::vector<std::string>{"mlx5_2", "mlx5_1", "mlx5_3", "mlx5_0", ""});
  CHECK(cards_to_try(list_cards(sysfs.root()), "", sysfs.root()) == std::vector<std::string>{""});
  {
    const std::vector<Card> cards = list_cards(sysfs.root());
    const std::vector<CardDistance> distances = cards_by_distance(cards, gpu, sysfs.root());
    using Crossing = CardDistance::Crossing;
    CHECK(distances[0].hops < distances[1].hops);
    CHECK(distances[1].crossing == Crossing::kNothing);
    CHECK(distances[2].crossing == Crossing::kCpu);
    CHECK(distances[3].crossing == Crossing::kSockets);
  }
  sysfs.write("class/infiniband/mlx5_2/ports/1/state", "1: DOWN");
  CHECK(nearest() == "mlx5_1");
  for (const char* name : {"mlx5_0", "mlx5_1", "mlx5_3"}) {
    sysfs.write(std::string("class/infiniband/") + name + "/ports/1/state", "1: DOWN");
  }
  CHECK(nearest() == "");
  CHECK(tries() == std::vector<std::string>{""});
  sysfs.write("class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE");
  CHECK(tries() == std::vector<std::string>{""});  // a single card: the route knows it
}

TEST_CASE("the route to a host names an interface and our address") {
  const auto route = route_to("127.0.0.1", 6379);
  REQUIRE(route.has_value());
  CHECK(route->netdev == "lo");
  CHECK(route->address == "127.0.0.1");
  CHECK(!route_to("no-such-host.invalid", 6379).has_value());
}

TEST_CASE("an address of a card is of the wanted family") {
  Card card;
  card.netdevs = {"lo"};
  CHECK(address_of_card(card, "10.0.0.5:6379") == "127.0.0.1");
  card.netdevs = {"no-such-interface"};
  CHECK(!address_of_card(card, "10.0.0.5:6379").has_value());
}

TEST_CASE("doctor is told what is missing and what to do") {
  const FakeSysfs sysfs;
  ProbeOptions options;
  options.sysfs = sysfs.root();
  options.dev = sysfs.root() + "/dev";
  SUBCASE("nothing") {
    const std::vector<Probe> probes = probe(options);
    for (const char* name : {"devices", "device files", "port", "dma-buf"}) {
      CAPTURE(name);
      CHECK(!named(probes, name).ok);
      CHECK(!named(probes, name).next_step.empty());
    }
    CHECK(named(probes, "port").required);
    CHECK(!named(probes, "dma-buf").required);
    CHECK(!named(probes, "peermem").required);
    CHECK(
        std::none_of(probes.begin(), probes.end(), [](const Probe& probe) { return probe.name == "route"; }));
  }
  SUBCASE("a card, and a host that is not reached through it") {
    sysfs.card("mlx5_0", "pci0000:00/0000:00:01.0", 0, "eth0");
    sysfs.write("dev/infiniband/uverbs0", "");
    sysfs.write("dev/infiniband/rdma_cm", "");
    options.host = "127.0.0.1";
    std::vector<Probe> probes = probe(options);
    CHECK(named(probes, "devices").ok);
    CHECK(named(probes, "device files").ok);
    CHECK(named(probes, "port").ok);
    CHECK(named(probes, "port").detail.find("400 Gb/sec") != std::string::npos);
    CHECK(named(probes, "port").detail.find("GID 3 ::ffff:10.77.0.1") != std::string::npos);
    CHECK(!named(probes, "route").ok);
    CHECK(named(probes, "route").detail.find("lo, which belongs to no RDMA card") != std::string::npos);
    options.device = "mlx5_1";
    probes = probe(options);
    CHECK(!named(probes, "devices").ok);
    CHECK(named(probes, "devices").detail.find("mlx5_0") != std::string::npos);
    CHECK(!named(probes, "port").ok);
  }
  SUBCASE("a port that is down") {
    sysfs.card("mlx5_0", "pci0000:00/0000:00:01.0", 0, "eth0", "1: DOWN");
    const std::vector<Probe> probes = probe(options);
    CHECK(!named(probes, "port").ok);
    CHECK(named(probes, "port").detail.find("DOWN") != std::string::npos);
  }
  SUBCASE("a card that belongs to the route") {
    sysfs.card("lo0", "", -1, "lo");
    options.host = "127.0.0.1";
    CHECK(named(probe(options), "route").ok);
    options.device = "other";
    CHECK(!named(probe(options), "route").ok);
  }
}

}  // namespace
}  // namespace rdmaload::rdma
