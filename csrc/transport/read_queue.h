// Reads that wait for a worker thread: by priority, then first come, first served, and some not before a
// given time.
//
// Any thread may call. Does not own the reads.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "core/deadline.h"
#include "transport/transport.h"

namespace rdmaload {

class ReadQueue {
 public:
  // False once stopped: the caller still has the read to complete.
  bool push(Read& read, Clock::time_point not_before);
  // The next read that may start now, or nullptr when there is none or it is longer than max_bytes.
  Read* try_pop(uint64_t max_bytes = UINT64_MAX);
  // Waits until a read may start (returned), the deadline passes or stop() was called (nullptr).
  Read* pop(Deadline deadline);
  // Waits until a read may start and leaves it there; false when the deadline passed, stop() was called, or
  // wake() since wakes() gave `seen`.
  bool wait(Deadline deadline, uint64_t seen);
  void wake();
  uint64_t wakes() const;
  // One worker's share of the reads that may start now, in order: neighbours stay together.
  std::vector<Read*> try_pop_share(size_t workers, size_t least, size_t most);
  // Calls look(read) with the read that would start next; false when there is none.
  template <typename Look>
  bool look_at_first(Look&& look) const {
    std::lock_guard lock(mutex_);
    if (ready_.empty()) return false;
    look(*ready_.begin()->second.front());
    return true;
  }
  bool empty() const;  // none waits, not even for its time
  // Takes out every waiting read of this owner.
  std::vector<Read*> remove(const ReadOwner& owner);
  // Wakes all waiters; takes out what is left.
  std::vector<Read*> stop();
  bool stopped() const;

 private:
  struct Delayed {
    Clock::time_point when;
    Read* read;
    bool operator>(const Delayed& other) const { return when > other.when; }
  };
  Read* pop_ready_locked(uint64_t max_bytes);
  Read* next_ready_locked(uint64_t max_bytes);
  bool is_ready_locked() const;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, std::deque<Read*>> ready_;  // Guarded by mutex_. By priority; no empty queues.
  std::vector<Delayed> delayed_;                 // Guarded by mutex_. A heap, earliest first.
  bool stopped_ = false;                         // Guarded by mutex_.
  uint64_t wakes_ = 0;                           // Guarded by mutex_.
};

}  // namespace rdmaload
