// The RDMA cards of this machine, what stands in the way of using them, and which one to take.
//
// All of it but the probes that say so is read from sysfs, whose root is a parameter so that tests can build
// one. Values; any thread may call these.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace rdmaload::rdma {

struct Gid {
  int index = 0;
  std::string address;  // as an IPv6 address, "::ffff:10.0.0.4"
  std::string type;     // "IB/RoCE v1" or "RoCE v2"
  std::string netdev;   // empty on InfiniBand
};

struct CardPort {
  int number = 1;
  std::string state;       // "ACTIVE", "DOWN", ...
  std::string link_layer;  // "InfiniBand" or "Ethernet"
  std::string rate;        // "100 Gb/sec (4X EDR)"
  double gbit_per_s = 0;   // of `rate`; 0 when unknown
  std::vector<Gid> gids;   // those in use
  bool active() const noexcept { return state == "ACTIVE"; }
};

struct Card {
  std::string name;       // "mlx5_0"
  std::string node_type;  // "CA", or "RNIC" for iWARP
  std::string firmware;
  std::string pci_path;              // its canonical path below /sys/devices; empty for a software device
  int numa_node = -1;                // -1: unknown
  std::vector<std::string> netdevs;  // network interfaces that are its own
  std::vector<CardPort> ports;
  // iWARP has no write with immediate, which the Valkey protocol is made of.
  bool iwarp() const noexcept { return node_type == "RNIC"; }
  bool usable() const noexcept;  // some port is active, and it is not iWARP
};

// In the order of their names; empty where there is none.
std::vector<Card> list_cards(const std::string& sysfs = "/sys");

// The network interface and the local address by which this host is reached; nullopt without a route.
struct Route {
  std::string netdev;
  std::string address;
};
std::optional<Route> route_to(const std::string& host, int port);

// The card whose network interface this is; nullptr: none (its traffic takes TCP).
const Card* card_of_netdev(std::span<const Card> cards, const std::string& netdev);
const Card* card_named(std::span<const Card> cards, const std::string& name);
// Where a card is, seen from another PCI device such as a GPU ("0000:18:00.0").
struct CardDistance {
  const Card* card = nullptr;
  enum class Crossing {
    kNothing,
    kCpu,
    kSockets
  } crossing = Crossing::kSockets;  // below one PCI root: nothing
  size_t hops = 0;                  // bridges and functions between the two, in the PCI tree
};
const char* name_of(CardDistance::Crossing crossing) noexcept;
// The usable cards, nearest first: by hops below one root, else by NUMA node. Equally near ones keep their
// order.
std::vector<CardDistance> cards_by_distance(std::span<const Card> cards, const std::string& pci_address,
                                            const std::string& sysfs = "/sys");
// The names of cards to connect over, one after the other; an empty name leaves it to the route, which is
// always the last. `near`: a PCI address; empty, or where there is only one usable card: the route alone.
std::vector<std::string> cards_to_try(std::span<const Card> cards, const std::string& near,
                                      const std::string& sysfs = "/sys");
// An address of the card's interfaces in the family of `like` (a numeric address), to bind to.
std::optional<std::string> address_of_card(const Card& card, const std::string& like);

// How much memory this process may lock; nullopt: any amount (no limit, or CAP_IPC_LOCK).
std::optional<uint64_t> memlock_limit();

// One thing that RDMA needs or can use, as doctor shows it.
struct Probe {
  std::string
      name;  // "libraries", "devices", "device files", "port", "locked memory", "route", "dma-buf", "peermem"
  bool ok = false;
  bool required = true;   // else: slower without it
  std::string detail;     // what was found
  std::string next_step;  // what to do about it; empty when ok
};

struct ProbeOptions {
  std::string host;  // of the store; empty: no route is looked for
  int port = 6379;
  std::string device;  // the card asked for; empty: any
  std::string sysfs = "/sys";
  std::string dev = "/dev";
};
// Never throws for what it finds. Opens the libraries and the first usable card (for dma-buf).
std::vector<Probe> probe(const ProbeOptions& options);

}  // namespace rdmaload::rdma
