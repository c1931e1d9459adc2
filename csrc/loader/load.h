// Executes a load plan: keeps a bounded number of reads with the transport, verifies, tries failed ones
// again, and ends with success, the first final error, or cancelled.
//
// One Load serves one execution. Any thread may call its members. The destination memory belongs to the
// caller through Region::owner and is written by nobody after wait() returned true or the destructor
// returned.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <vector>

#include "loader/plan.h"
#include "transport/transport.h"

namespace rdmaload {

struct Region {
  std::span<std::byte> memory;
  std::shared_ptr<void> owner;
};

struct LoadOptions {
  bool verify = true;                               // compare checksums where the plan has them
  int max_integrity_attempts = 3;                   // a wrong byte is read again this often in all
  std::chrono::duration<double> retry_timeout{60};  // give up when nothing arrived for so long
  std::chrono::duration<double> timeout{1e9};       // the whole load
  // Reads handed to the transport ahead of need: enough to keep every connection's pipeline full, and eight
  // direct readers of a file busy. One per connection is, whatever its size.
  uint64_t queued_bytes = 64 << 20;
  size_t queued_reads = 256;
  bool trace = false;  // keep the times of every attempt, about a hundred bytes each
};

// One attempt of one read, for a timeline. Times are unset where the transport does not say.
struct ReadTrace {
  Clock::time_point submitted;
  ReadTimes times;
  Clock::time_point done;  // verified, and on the GPU where that is where it goes
  std::chrono::nanoseconds checksum_time{0};
  uint32_t file = 0;
  uint64_t offset = 0;  // in the object
  uint64_t bytes = 0;
  int attempt = 1;
  bool ok = false;
};

// The CRC of one read of a file of which the store has one (StoreLayout::digests). The caller combines them:
// only who knows of all loads of a file knows when it is complete.
struct PieceDigest {
  uint32_t file = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint64_t digest = 0;
};

struct LoadCounters {
  uint64_t done_bytes = 0;  // of completed reads
  uint64_t verified_bytes = 0;
  uint64_t unverified_bytes = 0;
  uint64_t copied_bytes = 0;
  uint64_t cached_bytes = 0;
  uint64_t retries = 0;
  std::chrono::nanoseconds checksum_time{0};  // summed over threads
  std::chrono::nanoseconds elapsed{0};
};

class Load final : private ReadOwner {
 public:
  // Throws kInvalid when the regions are not those of the plan.
  Load(std::shared_ptr<Transport> transport, std::shared_ptr<const StoreLayout> layout,
       std::shared_ptr<const LoadPlan> plan, std::vector<Region> regions, LoadOptions options);
  ~Load();  // cancels and waits
  Load(const Load&) = delete;
  Load& operator=(const Load&) = delete;

  void start();
  // True when everything has ended, well or not, and the memory is quiet. False when `until` came first.
  bool wait(Deadline until);
  void cancel();
  // After wait() returned true: throws the first error.
  void throw_if_failed() const;
  // The object whose read failed first; empty when that was no object's fault.
  std::string failed_object() const;
  // Regions that some read has not filled (yet), each once, in order.
  std::vector<uint32_t> unfinished_regions() const;
  // Files of which every read of the plan is done, in the plan's order.
  std::vector<uint32_t> finished_files() const;
  LoadCounters counters() const;
  // Attempts that have ended, in that order; empty without LoadOptions::trace.
  std::vector<ReadTrace> trace() const;
  // Of the reads that have succeeded, in no order; they count as unverified.
  std::vector<PieceDigest> digests() const;

 private:
  struct Slot : Read {
    const PlannedRead* planned = nullptr;
    int attempts = 0;
    int failures_in_a_row = 0;  // since an attempt last brought bytes, that one included
    int integrity_failures = 0;
    Clock::time_point submitted;
    Clock::time_point first_failure;  // meaningful once attempts > 0
    uint64_t received_before = 0;     // Read::received when this attempt began
  };

  void complete(Read& read, const Status& status) noexcept override;
  bool cancelled() const noexcept override { return cancelled_.load(std::memory_order_relaxed); }

  Slot* next_slot_locked();
  void prepare(Slot& slot, const PlannedRead& planned);
  Status verdict(Slot& slot, const Status& status) const;
  bool may_retry_locked(Slot& slot, const Status& status);
  Clock::time_point backoff_locked(int failures);
  void fail_locked(const Status& status, const std::string& object = {});

  const std::shared_ptr<Transport> transport_;
  const std::shared_ptr<const StoreLayout> layout_;
  const std::shared_ptr<const LoadPlan> plan_;
  const std::vector<Region> regions_;
  const LoadOptions options_;
  const size_t working_;  // reads that the transport works on at once
  const uint64_t sequence_;

  std::atomic<bool> cancelled_{false};
  std::shared_ptr<void> prepared_;  // Guarded by mutex_. What the transport made ready of the destinations.
  mutable std::mutex mutex_;
  std::condition_variable ended_;
  std::vector<std::unique_ptr<Slot>> slots_;  // Guarded by mutex_, as all below.
  std::vector<Slot*> idle_slots_;
  size_t next_read_ = 0;
  size_t outstanding_ = 0;  // with the transport
  uint64_t outstanding_bytes_ = 0;
  std::vector<bool> read_done_;  // per read of the plan
  Status first_error_;
  std::string failed_object_;
  LoadCounters counters_;
  std::vector<ReadTrace> trace_;
  std::vector<PieceDigest> digests_;
  Clock::time_point started_;
  Clock::time_point last_progress_;
  Clock::time_point finished_;
  std::minstd_rand random_;
};

}  // namespace rdmaload
