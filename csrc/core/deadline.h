// A point in time after which a wait gives up. A value; kNever is far enough away to be treated as no limit.
#pragma once

#include <chrono>

namespace rdmaload {

using Clock = std::chrono::steady_clock;

class Deadline {
 public:
  static Deadline never() { return Deadline(Clock::time_point::max()); }
  static Deadline at(Clock::time_point when) { return Deadline(when); }
  // A wait of zero or less has passed already.
  static Deadline after(std::chrono::duration<double> wait) {
    const auto now = Clock::now();
    if (wait >= std::chrono::hours(24 * 365)) return never();
    return Deadline(now + std::chrono::duration_cast<Clock::duration>(wait));
  }

  bool passed() const { return Clock::now() >= when_; }
  Clock::time_point when() const { return when_; }

  // For poll(2): milliseconds left, rounded up, at least 0 and at most `cap`.
  int poll_milliseconds(int cap) const {
    const auto now = Clock::now();
    if (when_ <= now) return 0;
    if (when_ - now > std::chrono::milliseconds(cap)) return cap;
    return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(when_ - now).count());
  }

 private:
  explicit Deadline(Clock::time_point when) : when_(when) {}
  Clock::time_point when_;
};

}  // namespace rdmaload
