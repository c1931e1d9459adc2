// Reads with memory of their own, and an owner that writes down what became of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "support/bytes.h"
#include "transport/transport.h"

namespace rdmaload::testing {

constexpr std::chrono::seconds kSoon{20};  // a wait that lasts so long is a failure, not a slow machine

class RecordingOwner final : public ReadOwner {
 public:
  struct Completion {
    Read* read;
    Status status;
    Clock::time_point when;
  };

  void complete(Read& read, const Status& status) noexcept override {
    // Taken out first: the test may look at everything, and go on, as soon as this completion is counted.
    const auto then = then_;
    if (then) then(read, status);
    std::lock_guard lock(mutex_);
    completions_.push_back({&read, status, Clock::now()});
    changed_.notify_all();
  }
  bool cancelled() const noexcept override { return cancelled_; }

  void set_cancelled() { cancelled_ = true; }
  // Called with each completion before it is counted. Set it before anything is submitted.
  void then(std::function<void(Read&, const Status&)> what) { then_ = std::move(what); }

  // False when there were not so many completions soon.
  bool wait_for(size_t count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kSoon, [&] { return completions_.size() >= count; });
  }
  std::vector<Completion> completions() const {
    std::lock_guard lock(mutex_);
    return completions_;
  }
  size_t count() const { return completions().size(); }
  // How often this read completed.
  size_t count_of(const Read& read) const {
    const auto all = completions();
    return static_cast<size_t>(
        std::count_if(all.begin(), all.end(), [&](const Completion& done) { return done.read == &read; }));
  }
  // Of the read's last completion.
  Status status_of(const Read& read) const {
    Status found(ErrorCode::kInvalid, "the read did not complete");
    for (const Completion& done : completions()) {
      if (done.read == &read) found = done.status;
    }
    return found;
  }

 private:
  std::atomic<bool> cancelled_{false};
  std::function<void(Read&, const Status&)> then_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Completion> completions_;  // Guarded by mutex_.
};

struct SegmentSpec {
  size_t size;
  bool dropped = false;
};

// A Read whose segments lie apart from each other, in backward order, with a known fill between them.
class TestRead {
 public:
  TestRead(std::string object, uint64_t object_bytes, uint64_t offset, std::vector<SegmentSpec> specs,
           ReadOwner& owner)
      : specs_(std::move(specs)) {
    size_t total = kGap;
    for (const SegmentSpec& spec : specs_) total += spec.dropped ? 0 : spec.size + kGap;
    memory_.assign(total, kFill);
    read.object = std::move(object);
    read.object_bytes = object_bytes;
    read.offset = offset;
    read.checksum = true;
    read.owner = &owner;
    size_t place = total;
    for (const SegmentSpec& spec : specs_) {
      read.length += spec.size;
      if (!spec.dropped) place -= spec.size + kGap;
      read.segments.push_back({spec.dropped ? nullptr : memory_.data() + place, spec.size});
    }
  }
  // The whole object in one segment.
  TestRead(std::string object, uint64_t object_bytes, ReadOwner& owner)
      : TestRead(std::move(object), object_bytes, 0, {{object_bytes}}, owner) {}
  TestRead(const TestRead&) = delete;
  TestRead& operator=(const TestRead&) = delete;

  // The segments hold the object's bytes of this range and nothing else was written.
  bool holds(std::span<const std::byte> object) const {
    std::vector<std::byte> expected(memory_.size(), kFill);
    size_t place = memory_.size(), at = read.offset;
    for (const SegmentSpec& spec : specs_) {
      if (!spec.dropped) {
        place -= spec.size + kGap;
        std::copy_n(object.begin() + static_cast<ptrdiff_t>(at), spec.size,
                    expected.begin() + static_cast<ptrdiff_t>(place));
      }
      at += spec.size;
    }
    return memory_ == expected;
  }

  Read read;

 private:
  static constexpr std::byte kFill{0xa5};
  static constexpr size_t kGap = 16;
  std::vector<SegmentSpec> specs_;
  std::vector<std::byte> memory_;
};

// Cuts `length` bytes into segments of random sizes, some of them dropped, some empty.
inline std::vector<SegmentSpec> random_segments(std::mt19937_64& random, uint64_t length) {
  std::vector<SegmentSpec> specs;
  const uint64_t largest = std::max<uint64_t>(1, length / pick(random, 1, 40));
  while (length > 0) {
    const bool empty = pick(random, 0, 5) == 0;
    const uint64_t size = empty ? 0 : pick(random, 1, std::min(length, largest));
    specs.push_back({size, pick(random, 0, 3) == 0});
    length -= size;
  }
  if (pick(random, 0, 3) == 0) specs.push_back({0, pick(random, 0, 1) == 0});
  return specs;
}

}  // namespace rdmaload::testing
