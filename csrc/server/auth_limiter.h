// Slows down whoever guesses passwords, by address; everybody else notices nothing.
//
// An address may be wrong ten times, then once a second; what it says beyond that is not even looked at, so
// that more connections, or not waiting for the answer, gain nothing. Repeating one wrong password is no
// guess: a client with an old password does not lock out those that share its address. Any thread may call
// it.
#pragma once

#include <chrono>
#include <cstddef>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>

namespace rdmaload::server {

class AuthLimiter {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr double kGuesses = 10;          // at once
  static constexpr double kGuessesPerSecond = 1;  // afterwards
  static constexpr size_t kMaxAddresses = 10'000;

  // `address` is "1.2.3.4:5", "[::1]:5"; ports do not count, and of IPv6 only the network does: the rest is a
  // client's to choose.
  bool may_try(std::string_view address, Clock::time_point now);
  // `guess` stands for what was said.
  void failed(std::string_view address, size_t guess, Clock::time_point now);
  size_t addresses() const;

 private:
  struct Entry {
    double guesses = 0;  // that are held against it at `when`
    Clock::time_point when;
    size_t last = 0;
  };
  static double left(const Entry& entry, Clock::time_point now);

  mutable std::mutex mutex_;
  std::unordered_map<std::string, Entry> entries_;  // Guarded by mutex_.
};

}  // namespace rdmaload::server
