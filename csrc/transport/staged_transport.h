// The road to a GPU through page-locked host memory: a transport around another one. Its reads have segments
// in device memory.
//
// A ring of equal page-locked buffers lies between the source's reading threads and the device's copy stream.
// A read gets a buffer (or waits for one, lowest priority number first), the source receives into it and
// computes the checksum, its thread enqueues the copies and goes on, and when their event has fired a thread
// of this object gives the buffer back and completes the read. So reading and copying overlap, and either
// waits for the other when the ring is full or empty. The read contract (transport.h) holds with "the
// transport" as this and the GPU's copy engine.
//
// Many small pieces of one read are copied as a block and placed by one kernel, where there are kernels. With
// `verify_device` every read goes that way, and its checksum is computed again on the device and compared
// with that of the bytes that were received, whether the store has one to compare with or not; without
// kernels it is copied back for that. One block of device memory serves all reads: the stream does one thing
// after another anyway.
//
// A read lies in its buffer as it does in the object's blocks: where the source is a file, the disk writes
// there (O_DIRECT).
//
// Any thread may use it. Driver calls are made on the source's threads and on its own.
#pragma once

#include <atomic>
#include <chrono>
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
#include "transport/transport.h"

namespace rdmaload {

struct StagingOptions {
  uint64_t read_bytes = 8 << 20;         // the longest read that will be submitted
  uint64_t staging_bytes = 64 << 20;     // page-locked in all, but two reads at least
  uint64_t expected_bytes = UINT64_MAX;  // no more is page-locked than so many bytes to read need
  uint64_t block_bytes = 64 << 20;       // of device memory for the block; no kernels with less than it needs
  size_t scatter_pieces = 16;            // from so many pieces of a read on, one kernel places them
  bool verify_device = false;            // compute every read's checksum again from device memory
  bool trace = false;                    // keep the times of every read
};

struct StagingCounters {
  uint64_t copied_bytes = 0;      // to the device, by its copy engine
  uint64_t copies = 0;            // from host to device
  uint64_t scattered_pieces = 0;  // placed by a kernel
  uint64_t verified_bytes = 0;    // whose checksum was computed from device memory too
  uint64_t staging_bytes = 0;     // page-locked
  uint64_t device_bytes = 0;      // of device memory for the block
};

// When a read got its buffer, when its bytes had arrived, and when they were on the device; since
// construction.
struct StagingTrace {
  std::chrono::nanoseconds begun, received, copied;
  uint64_t bytes;
};

class StagedTransport final : public Transport {
 public:
  // Throws kDevice, also when verify_device has kernels and they need more than block_bytes.
  StagedTransport(std::shared_ptr<Transport> source, Device& device, StagingOptions options);
  ~StagedTransport() override;

  using Transport::submit;
  void submit(Read& read, Clock::time_point not_before) override;
  void cancel(const ReadOwner& owner) override;
  std::string_view path() const noexcept override;  // the source's, with "+staged-gpu"
  // The source's; without one, what was done for want of kernels, and why there are none.
  std::string fallback_reason() const override;
  bool keeps_digests() const noexcept override { return source_->keeps_digests(); }
  int connections() const noexcept override { return source_->connections(); }

  // Writes from now on come after what `consumer` (a stream of the device) has to do now: call it between
  // making destinations and submitting reads into them.
  void follow(cuda::Stream consumer);
  // What `consumer` does from now on comes after all that was enqueued here. Of reads that have completed the
  // host has seen the end already; this is the order between streams that the contract with torch asks for.
  void lead(cuda::Stream consumer);
  // The stream that writes to destinations; it lives as long as the process.
  cuda::Stream stream() const noexcept { return stream_; }

  // Device memory that the block takes when it is needed; 0 when there will be none.
  uint64_t block_bytes() const noexcept { return may_use_block_ ? stride_ : 0; }
  StagingCounters counters() const;
  std::vector<StagingTrace> trace() const;
  // Why kernels are not used; empty when they are.
  const std::string& no_kernels_reason() const noexcept { return no_kernels_reason_; }

 private:
  class OwnerProxy;
  struct Slot;
  Slot* take_slot_locked(Read& read);
  Slot* next_slot_locked();
  std::shared_ptr<OwnerProxy> proxy_locked(const ReadOwner& owner);
  void received(Slot& slot, const Status& status) noexcept;
  Status enqueue(Slot& slot);
  Status place(Slot& slot, bool check);
  Status read_back(Slot& slot);
  Status make_block();
  void finish(Slot& slot, Status status) noexcept;
  Status quiet(Slot& slot) const;
  void reap();

  const std::shared_ptr<Transport> source_;
  Device& device_;
  const Driver& driver_;
  const StagingOptions options_;
  const cuda::Stream stream_;
  const Kernels* kernels_ = nullptr;
  std::string no_kernels_reason_;
  const Clock::time_point begin_;
  uint64_t data_bytes_ = 0;     // of each slot's data; its table of pieces lies behind
  uint64_t table_entries_ = 0;  // that the table has room for
  uint64_t stride_ = 0;         // bytes of one slot
  std::shared_ptr<PinnedBuffer> ring_;
  std::shared_ptr<void> prepared_;  // what the source made ready of the ring
  std::vector<std::unique_ptr<Slot>> slots_;

  bool may_use_block_ = false;  // constant once constructed

  std::mutex block_mutex_;             // held while a read's way through the block is enqueued
  bool block_tried_ = false;           // Guarded by block_mutex_.
  Status block_status_;                // Guarded by block_mutex_.
  std::optional<DeviceBuffer> block_;  // Guarded by block_mutex_. As large as a slot; made when first needed.

  std::atomic<bool> missed_kernels_{
      false};  // a read of many pieces was copied piece by piece for want of them
  std::atomic<bool> stopping_{false};
  mutable std::mutex mutex_;
  std::condition_variable enqueued_;
  std::condition_variable quiet_;
  std::vector<Slot*> idle_;                          // Guarded by mutex_, as all below.
  std::map<uint64_t, std::deque<Read*>> waiting_;    // for a buffer, by priority; no empty queues
  std::multimap<Clock::time_point, Read*> delayed_;  // not before a time; they hold no buffer until then
  std::map<const ReadOwner*, std::weak_ptr<OwnerProxy>> proxies_;
  std::deque<Slot*> copying_;
  size_t outstanding_ = 0;  // reads not completed
  bool reaper_stops_ = false;
  StagingCounters counters_;
  std::vector<StagingTrace> trace_;
  std::thread reaper_;
};

}  // namespace rdmaload
