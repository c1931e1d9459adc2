// Who may try a password, by a clock that the test holds.
#include "server/auth_limiter.h"

#include <doctest/doctest.h>

using rdmaload::server::AuthLimiter;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

const AuthLimiter::Clock::time_point kStart{seconds(1000)};

// How many of `tries` different guesses at once are looked at.
int looked_at(AuthLimiter& limiter, std::string_view address, AuthLimiter::Clock::time_point now, int tries) {
  static size_t guess = 0;
  int count = 0;
  for (int i = 0; i < tries; ++i) {
    if (!limiter.may_try(address, now)) continue;
    limiter.failed(address, ++guess, now);
    ++count;
  }
  return count;
}

}  // namespace

TEST_CASE("a guesser has ten tries, then one a second, whatever its port; others have their own") {
  AuthLimiter limiter;
  CHECK(looked_at(limiter, "10.0.0.1:1000", kStart, 50) == 10);
  CHECK(looked_at(limiter, "10.0.0.1:2000", kStart, 50) == 0);
  CHECK(looked_at(limiter, "10.0.0.1:2000", kStart + milliseconds(900), 50) == 0);
  CHECK(looked_at(limiter, "10.0.0.1:3000", kStart + seconds(1), 50) == 1);
  CHECK(looked_at(limiter, "10.0.0.1:3000", kStart + seconds(4), 50) == 3);
  CHECK(limiter.may_try("10.0.0.2:1000", kStart));
  CHECK(looked_at(limiter, "10.0.0.1:1000", kStart + seconds(3600), 50) == 10);
}

TEST_CASE("an IPv6 network is one guesser, IPv4 clients of an IPv6 socket are not") {
  AuthLimiter limiter;
  CHECK(looked_at(limiter, "[2001:db8::1]:1", kStart, 20) == 10);
  CHECK(!limiter.may_try("[2001:db8::ffff:1]:2", kStart));
  CHECK(limiter.may_try("[2001:db8:0:1::1]:2", kStart));
  CHECK(looked_at(limiter, "[::ffff:10.0.0.1]:1", kStart, 20) == 10);
  CHECK(!limiter.may_try("[::ffff:10.0.0.1]:2", kStart));
  CHECK(limiter.may_try("[::ffff:10.0.0.2]:1", kStart));
}

TEST_CASE("repeating one wrong password is no guess") {
  AuthLimiter limiter;
  for (int i = 0; i < 1000; ++i) {
    REQUIRE(limiter.may_try("10.0.0.1:1", kStart));
    limiter.failed("10.0.0.1:1", 7, kStart);
  }
  CHECK(looked_at(limiter, "10.0.0.1:1", kStart, 50) == 9);
}

TEST_CASE("what it remembers is bounded, and forgets those who have stopped first") {
  AuthLimiter limiter;
  const auto address = [](size_t number) { return "host" + std::to_string(number) + ":1"; };
  for (size_t i = 0; i < AuthLimiter::kMaxAddresses; ++i) limiter.failed(address(i), 1, kStart);
  CHECK(looked_at(limiter, address(5), kStart + seconds(1), 50) == 10);
  limiter.failed("new:1", 1, kStart + seconds(1));
  CHECK(limiter.addresses() == 2);
  CHECK(!limiter.may_try(address(5), kStart + seconds(1)));
  for (size_t i = 0; i < 2 * AuthLimiter::kMaxAddresses; ++i) limiter.failed(address(i), 1, kStart);
  CHECK(limiter.addresses() == AuthLimiter::kMaxAddresses);
}
