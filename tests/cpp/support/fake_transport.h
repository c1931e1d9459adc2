// Transports whose completions a test decides.
#pragma once

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/crc32c.h"
#include "support/reads.h"
#include "transport/threaded_transport.h"

namespace rdmaload::testing {

// Completes nothing by itself: the test takes the reads that were submitted and completes them when it likes,
// on the thread that it likes. A read counts as in flight once taken, as waiting before.
class ManualTransport : public Transport {
 public:
  explicit ManualTransport(int connections = 1) : connections_(connections) {}
  using Transport::submit;
  void submit(Read& read, Clock::time_point not_before) override {
    std::lock_guard lock(mutex_);
    waiting_.push_back({&read, not_before});
    changed_.notify_all();
  }
  void cancel(const ReadOwner& owner) override {
    std::vector<Read*> removed;
    {
      std::lock_guard lock(mutex_);
      ++cancels_;
      std::erase_if(waiting_, [&](const Submitted& submitted) {
        if (submitted.read->owner != &owner) return false;
        removed.push_back(submitted.read);
        return true;
      });
      changed_.notify_all();
    }
    complete_all_cancelled(removed);
  }
  std::string_view path() const noexcept override { return "manual"; }
  int connections() const noexcept override { return connections_; }

  // The next read that was submitted and when it may start; a null read when none comes soon.
  std::pair<Read*, Clock::time_point> take_timed() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, kSoon, [this] { return !waiting_.empty(); })) return {nullptr, {}};
    const Submitted next = waiting_.front();
    waiting_.pop_front();
    return {next.read, next.not_before};
  }
  Read* take() { return take_timed().first; }
  bool wait_for_cancel() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kSoon, [this] { return cancels_ > 0; });
  }
  size_t waiting() const {
    std::lock_guard lock(mutex_);
    return waiting_.size();
  }

 private:
  struct Submitted {
    Read* read;
    Clock::time_point not_before;
  };
  const int connections_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Submitted> waiting_;  // Guarded by mutex_.
  int cancels_ = 0;                // Guarded by mutex_.
};

// Real worker threads that ask the test what to answer.
class AnsweringTransport final : public ThreadedTransport {
 public:
  using Answer = std::function<Status(Read&)>;  // called on several threads at once
  AnsweringTransport(int threads, Answer answer) : ThreadedTransport(threads), answer_(std::move(answer)) {
    start();
  }
  ~AnsweringTransport() override { stop(); }
  std::string_view path() const noexcept override { return "answering"; }

 private:
  std::optional<Status> perform(Read& read) override { return answer_(read); }
  const Answer answer_;
};

// Does what a faultless transport would: the object's bytes into the segments, and their checksum.
inline void deliver(Read& read, std::span<const std::byte> object) {
  const auto range = object.subspan(read.offset, read.length);
  read.crc = read.checksum ? crc32c(0, range) : 0;
  size_t at = 0;
  for (const Segment& segment : read.segments) {
    if (segment.data != nullptr && segment.size > 0)
      std::memcpy(segment.data, range.data() + at, segment.size);
    at += segment.size;
  }
}

// A null read, which take() returns when none came, fails the test here instead of crashing it.
inline void finish(Read* read, const Status& status = Status()) {
  if (read == nullptr) throw std::runtime_error("no read was submitted");
  read->owner->complete(*read, status);
}

}  // namespace rdmaload::testing
