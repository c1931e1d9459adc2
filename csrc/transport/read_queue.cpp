#include "transport/read_queue.h"

#include <algorithm>
#include <cstdint>
#include <functional>

#include "core/thread_name.h"

namespace rdmaload {

bool ReadQueue::push(Read& read, Clock::time_point not_before) {
  {
    std::lock_guard lock(mutex_);
    if (stopped_) return false;
    if (not_before <= Clock::now()) {
      ready_[read.priority].push_back(&read);
    } else {
      delayed_.push_back({not_before, &read});
      std::push_heap(delayed_.begin(), delayed_.end(), std::greater<>());
    }
  }
  changed_.notify_one();
  return true;
}

Read* ReadQueue::pop_ready_locked(uint64_t max_bytes) {
  Read* read = next_ready_locked(max_bytes);
  if (read != nullptr) read->times = {Clock::now(), {}, {}, this_thread_number()};
  return read;
}

Read* ReadQueue::next_ready_locked(uint64_t max_bytes) {
  if (!delayed_.empty() && delayed_.front().when <= Clock::now()) {
    if (delayed_.front().read->length > max_bytes) return nullptr;
    std::pop_heap(delayed_.begin(), delayed_.end(), std::greater<>());
    Read* read = delayed_.back().read;
    delayed_.pop_back();
    return read;
  }
  if (ready_.empty()) return nullptr;
  const auto first = ready_.begin();
  Read* read = first->second.front();
  if (read->length > max_bytes) return nullptr;
  first->second.pop_front();
  if (first->second.empty()) ready_.erase(first);
  return read;
}

Read* ReadQueue::try_pop(uint64_t max_bytes) {
  std::lock_guard lock(mutex_);
  return stopped_ ? nullptr : pop_ready_locked(max_bytes);
}

Read* ReadQueue::pop(Deadline deadline) {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (stopped_) return nullptr;
    if (Read* read = pop_ready_locked(UINT64_MAX)) {
      // Another waiter may sleep until the time of a delayed read that has come meanwhile.
      if (!ready_.empty() || !delayed_.empty()) changed_.notify_one();
      return read;
    }
    if (deadline.passed()) return nullptr;
    auto until = deadline.when();
    if (!delayed_.empty()) until = std::min(until, delayed_.front().when);
    if (until == Clock::time_point::max()) {
      changed_.wait(lock);
    } else {
      changed_.wait_until(lock, until);
    }
  }
}

bool ReadQueue::is_ready_locked() const {
  return !ready_.empty() || (!delayed_.empty() && delayed_.front().when <= Clock::now());
}

uint64_t ReadQueue::wakes() const {
  std::lock_guard lock(mutex_);
  return wakes_;
}

bool ReadQueue::empty() const {
  std::lock_guard lock(mutex_);
  return ready_.empty() && delayed_.empty();
}

bool ReadQueue::wait(Deadline deadline, uint64_t seen) {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (stopped_ || wakes_ != seen) return false;
    if (is_ready_locked()) {
      changed_.notify_one();  // there may be more than one worker's share of them
      return true;
    }
    if (deadline.passed()) return false;
    auto until = deadline.when();
    if (!delayed_.empty()) until = std::min(until, delayed_.front().when);
    if (until == Clock::time_point::max()) {
      changed_.wait(lock);
    } else {
      changed_.wait_until(lock, until);
    }
  }
}

void ReadQueue::wake() {
  {
    std::lock_guard lock(mutex_);
    ++wakes_;
  }
  changed_.notify_all();
}

std::vector<Read*> ReadQueue::try_pop_share(size_t workers, size_t least, size_t most) {
  std::vector<Read*> reads;
  std::lock_guard lock(mutex_);
  if (stopped_) return reads;
  size_t waiting = delayed_.size();
  for (const auto& [priority, queued] : ready_) waiting += queued.size();
  const size_t count = std::clamp((waiting + workers - 1) / workers, least, most);
  while (reads.size() < count) {
    Read* read = pop_ready_locked(UINT64_MAX);
    if (read == nullptr) break;
    reads.push_back(read);
  }
  return reads;
}

std::vector<Read*> ReadQueue::remove(const ReadOwner& owner) {
  std::vector<Read*> removed;
  std::lock_guard lock(mutex_);
  for (auto& [priority, reads] : ready_) {
    std::erase_if(reads, [&](Read* read) {
      if (read->owner != &owner) return false;
      removed.push_back(read);
      return true;
    });
  }
  std::erase_if(ready_, [](const auto& entry) { return entry.second.empty(); });
  std::erase_if(delayed_, [&](const Delayed& delayed) {
    if (delayed.read->owner != &owner) return false;
    removed.push_back(delayed.read);
    return true;
  });
  std::make_heap(delayed_.begin(), delayed_.end(), std::greater<>());
  return removed;
}

std::vector<Read*> ReadQueue::stop() {
  std::vector<Read*> left;
  {
    std::lock_guard lock(mutex_);
    stopped_ = true;
    for (const auto& [priority, reads] : ready_) left.insert(left.end(), reads.begin(), reads.end());
    for (const Delayed& delayed : delayed_) left.push_back(delayed.read);
    ready_.clear();
    delayed_.clear();
  }
  changed_.notify_all();
  return left;
}

bool ReadQueue::stopped() const {
  std::lock_guard lock(mutex_);
  return stopped_;
}

}  // namespace rdmaload
