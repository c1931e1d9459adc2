// Reads over RDMA from our server (RDMALOAD.READ) or from a Valkey, else over TCP from the same server.
//
// One thread per connection owns its queue pair; they share one protection domain, since all are to one
// server, and so the registrations of the destinations. The first that has something to read probes the way:
// libraries, card, port, route, connection, credentials, self-test. What fails there, or a way that dies
// later, makes all of them leave RDMA for good: every queue pair is closed, then every destination is
// deregistered, and only then are reads completed or handed to the transport over TCP. So nothing can land
// where TCP's bytes are.
//
// Reads into GPU memory (Read::device_fill) come from DeviceTransport. What cannot be placed there directly
// is handed back with kNotSupported, and once the way was left so are all of them.
//
// A connection that had worked and was lost is made anew once reads are left; only when that fails, or when a
// server is silent, is the way taken for dead. Without `may_fall_back` errors are the reads' own, and the way
// is tried again with growing pauses.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "transport/rdma/destinations.h"
#include "transport/rdma/lane.h"
#include "transport/read_queue.h"
#include "transport/transport.h"

namespace rdmaload::rdma {

struct TransportOptions {
  resp::Endpoint endpoint;  // where RDMA is spoken; `tls` and `socket_path` mean nothing here
  std::string device;       // the card, such as "mlx5_0"; empty: the route decides
  int connections = 4;
  uint64_t bytes_in_flight = 16 << 20;  // over all connections; each takes at least one read
  std::shared_ptr<Fabric> fabric;
  // Null: fabric_reason says why there is none, and the way is not probed further.
  std::string fabric_reason;
  // Makes the transport that takes over; null: errors instead.
  std::function<std::unique_ptr<Transport>()> fall_back;
};

class RdmaTransport final : public Transport {
 public:
  // Does not connect yet.
  explicit RdmaTransport(TransportOptions options);
  ~RdmaTransport() override;

  using Transport::submit;
  void submit(Read& read, Clock::time_point not_before) override;
  void cancel(const ReadOwner& owner) override;
  std::shared_ptr<void> prepare(std::span<const std::span<std::byte>> destinations) override {
    return destinations_->add(destinations);
  }
  std::shared_ptr<void> prepare(Device& device, std::span<const std::span<std::byte>> destinations) {
    return destinations_->add(device, destinations);
  }
  // Of connections that are not made yet: over the card nearest to this PCI device, where no card was named
  // and several lead to the server. The first call counts.
  void prefer_card_near(const std::string& pci_address);
  // Whether the way was given up for good.
  bool has_left_rdma() const noexcept { return tcp_ready_.load() != nullptr; }
  // Why GPU memory was not registered; empty when nothing of it was refused.
  std::string device_reason() const { return destinations_->device_reason(); }
  std::string_view path() const noexcept override;
  std::string fallback_reason() const override;
  std::string description() const override;
  int connections() const noexcept override { return options_.connections; }

 private:
  enum class Way { kUnproven, kProven, kTcp };
  void work();
  std::unique_ptr<Lane> connect();
  std::unique_ptr<Lane> open_lane(const std::shared_ptr<ProtectionDomain>& domain);
  void leave(std::unique_ptr<Lane>& lane, const Status& status);
  bool leaving() const;
  bool has_other_lanes(bool has_one) const;
  void wait_until_left();
  void serve_over_tcp();
  Status no_device_way() const;
  void drop(std::unique_ptr<Lane>& lane, const Status& status);
  void end_way_locked();

  const TransportOptions options_;
  const std::shared_ptr<Destinations> destinations_ = std::make_shared<Destinations>();
  ReadQueue queue_;
  std::atomic<uint64_t> longest_read_{0};

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Way way_ = Way::kUnproven;  // Guarded by mutex_, as all below.
  bool probing_ = false;
  int lanes_ = 0;         // connections that could write to a destination
  bool revoked_ = false;  // on TCP, and nothing can write by RDMA any more
  std::string reason_;    // why the way was left
  std::string description_;
  std::string near_;  // a PCI address
  std::shared_ptr<ProtectionDomain> domain_;
  std::unique_ptr<Transport> tcp_;  // set once, before tcp_ready_
  std::atomic<Transport*> tcp_ready_{nullptr};
  std::vector<std::jthread> threads_;
};

}  // namespace rdmaload::rdma
