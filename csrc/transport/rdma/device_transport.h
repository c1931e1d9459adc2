// Reads that a network card writes straight into GPU memory, by way of RdmaTransport; what cannot go that way
// goes through page-locked host memory, by the staged transport around the same RdmaTransport.
//
// A card's writes know no streams, so the host orders them. A read begins when the consumer's stream has come
// past all that it had to do when its destination was made (follow()); and a read ends on the host, after the
// card's last write, after cuFlushGPUDirectRDMAWrites where the device asks for it, and after its checksum
// was computed on the device, on a stream of our own. Whatever is enqueued once the read has completed sees
// its bytes.
//
// Without kernels to compute checksums, and where the device neither orders such writes nor can flush them,
// nothing goes this way. Written to NVIDIA's contract and tried on the fake driver with the fake card only:
// no machine with a GPU and an RDMA card has run it.
//
// Any thread may use it. One thread of its own waits for events and checksums.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "device/device_memory.h"
#include "device/kernels.h"
#include "device/pinned_pool.h"
#include "device/stream.h"
#include "transport/rdma/rdma_transport.h"
#include "transport/staged_transport.h"

namespace rdmaload::rdma {

class DeviceTransport final : public Transport {
 public:
  // `staged` reads from `network`. Throws kNotSupported, naming the reason, where nothing can go this way;
  // kDevice. Connections of `network` that are not made yet take the card nearest to the device.
  // With `verify_device` what has no checksum to compare with goes the staged way, which checks it.
  DeviceTransport(std::shared_ptr<RdmaTransport> network, std::shared_ptr<StagedTransport> staged,
                  Device& device, bool verify_device = false);
  ~DeviceTransport() override;

  using Transport::submit;
  void submit(Read& read, Clock::time_point not_before) override;
  void cancel(const ReadOwner& owner) override;
  std::shared_ptr<void> prepare(std::span<const std::span<std::byte>> destinations) override;
  // "resp-rdma+direct-gpu", joined by "+" with the staged way's where some went there.
  std::string_view path() const noexcept override;
  std::string fallback_reason() const override;
  std::string description() const override { return network_->description(); }
  int connections() const noexcept override { return network_->connections(); }

  // Reads submitted from now on are written after what `consumer` (a stream of the device) has to do now.
  // Call it between making destinations and submitting reads into them, beside the staged transport's.
  void follow(cuda::Stream consumer);
  // Bytes whose checksum was computed on the device; counted at each attempt.
  uint64_t verified_bytes() const noexcept { return verified_bytes_; }

 private:
  class OwnerProxy;
  struct Entry;
  struct Gate {  // opens when the consumer's stream has come past it
    Event event;
    uint64_t number;
  };
  std::shared_ptr<OwnerProxy> proxy_locked(const ReadOwner& owner);
  void arrived(Entry& entry, const Status& status) noexcept;
  void complete(std::unique_ptr<Entry> entry, const Status& status) noexcept;
  void hand_on(std::unique_ptr<Entry> entry) noexcept;
  void work();
  Status open_gates_locked();
  void verify(std::vector<std::unique_ptr<Entry>> entries) noexcept;
  Status compute_checksums(const std::vector<std::unique_ptr<Entry>>& entries);

  const std::shared_ptr<RdmaTransport> network_;
  const std::shared_ptr<StagedTransport> staged_;
  Device& device_;
  const Driver& driver_;
  const bool verify_device_;
  std::string no_kernels_reason_;
  const Kernels* const kernels_;
  const Stream stream_;  // of checksums
  const Event event_;
  DeviceBuffer words_;
  std::shared_ptr<PinnedBuffer> host_words_;

  std::atomic<bool> stopping_{false};
  std::atomic<bool> used_direct_{false};
  std::atomic<bool> handed_on_{false};
  std::atomic<uint64_t> verified_bytes_{0};
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable quiet_;
  std::deque<Gate> gates_;  // Guarded by mutex_, as all below. Not open yet, oldest first.
  uint64_t last_gate_ = 0;  // the number of the newest
  std::deque<std::unique_ptr<Entry>> waiting_;  // for gates, in the order of their numbers
  std::map<Entry*, std::unique_ptr<Entry>> with_network_;
  std::vector<std::unique_ptr<Entry>> arrived_;  // written, not verified
  std::map<const ReadOwner*, std::weak_ptr<OwnerProxy>> proxies_;
  std::string refusal_;     // why reads were handed on
  size_t outstanding_ = 0;  // reads that are neither completed nor handed on
  std::thread thread_;
};

}  // namespace rdmaload::rdma
