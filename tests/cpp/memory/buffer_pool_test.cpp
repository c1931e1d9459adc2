#include "memory/buffer_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <cstring>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "support/reads.h"

namespace rdmaload {
namespace {

using testing::kSoon;

Deadline soon() { return Deadline::after(kSoon); }
Deadline already() { return Deadline::after(std::chrono::seconds(0)); }

TEST_CASE("a pool hands out at most its bound, each buffer its own") {
  BufferPool pool(4096, 3);
  auto first = pool.acquire(already());
  auto second = pool.acquire(already());
  auto third = pool.acquire(already());
  REQUIRE((first && second && third));
  CHECK(std::set{first->span().data(), second->span().data(), third->span().data()}.size() == 3);
  CHECK(first->span().size() == 4096);
  CHECK(pool.buffer_bytes() == 4096);
  CHECK_FALSE(pool.acquire(already()).has_value());
  CHECK_FALSE(pool.acquire(Deadline::after(std::chrono::milliseconds(20))).has_value());
}

TEST_CASE("a lease returns its buffer, which is used again") {
  BufferPool pool(4096, 1);
  const std::byte* data;
  {
    auto lease = pool.acquire(already());
    REQUIRE(lease);
    data = lease->span().data();
  }
  auto again = pool.acquire(already());
  REQUIRE(again);
  CHECK(again->span().data() == data);
}

TEST_CASE("a lease that was moved from returns nothing") {
  BufferPool pool(64, 1);
  auto lease = pool.acquire(already());
  REQUIRE(lease);
  {
    BufferPool::Lease moved(std::move(*lease));
    lease.reset();
    CHECK(moved.span().size() == 64);
    CHECK_FALSE(pool.acquire(already()).has_value());
  }
  CHECK(pool.acquire(already()).has_value());
}

TEST_CASE("a waiter gets the buffer that another thread returns") {
  BufferPool pool(64, 1);
  for (const Deadline deadline : {soon(), Deadline::never()}) {
    auto lease = pool.acquire(already());
    REQUIRE(lease);
    std::atomic<bool> got{false};
    std::thread waiter([&] { got = pool.acquire(deadline).has_value(); });
    lease.reset();
    waiter.join();
    CHECK(got);
  }
}

TEST_CASE("a pool of no buffers lets nobody wait forever") {
  BufferPool pool(64, 0);
  CHECK_FALSE(pool.acquire(Deadline::after(std::chrono::milliseconds(5))).has_value());
}

TEST_CASE("a buffer that the system refuses is not counted as handed out") {
  BufferPool pool(size_t{1} << 60, 1);
  CHECK_THROWS_AS(pool.acquire(already()), std::bad_alloc);
  CHECK_THROWS_AS(pool.acquire(already()), std::bad_alloc);
}

TEST_CASE("threads never share a buffer") {
  constexpr size_t kThreads = 4, kBuffers = 2, kBytes = 512;
  BufferPool pool(kBytes, kBuffers);
  std::atomic<int> failures{0}, in_use{0};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, mark = static_cast<int>(i + 1)] {
      for (int turn = 0; turn < 200; ++turn) {
        auto lease = pool.acquire(soon());
        if (!lease) {
          ++failures;
          return;
        }
        if (++in_use > static_cast<int>(kBuffers)) ++failures;
        std::memset(lease->span().data(), mark, kBytes);
        for (const std::byte byte : lease->span()) failures += byte != static_cast<std::byte>(mark);
        --in_use;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(failures == 0);
}

}  // namespace
}  // namespace rdmaload
