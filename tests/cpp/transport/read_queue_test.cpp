#include "transport/read_queue.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <random>
#include <thread>

#include "support/reads.h"

namespace rdmaload {
namespace {

using testing::RecordingOwner;

constexpr auto kNow = Clock::time_point::min();

Clock::time_point in(std::chrono::milliseconds wait) { return Clock::now() + wait; }
Clock::time_point much_later() { return Clock::now() + std::chrono::hours(1); }

TEST_CASE("reads leave in the order in which they came") {
  ReadQueue queue;
  Read first, second;
  CHECK(queue.try_pop() == nullptr);
  REQUIRE(queue.push(first, kNow));
  REQUIRE(queue.push(second, kNow));
  CHECK(queue.try_pop() == &first);
  CHECK(queue.pop(Deadline::never()) == &second);
  CHECK(queue.try_pop() == nullptr);
}

TEST_CASE("a delayed read waits for its time, the earliest first, and holds up nobody") {
  ReadQueue queue;
  Read late, early, now, never;
  // Far enough away for all to be queued before, on a busy machine too.
  const auto early_time = in(std::chrono::milliseconds(200)),
             late_time = early_time + std::chrono::milliseconds(10);
  REQUIRE(queue.push(never, much_later()));
  REQUIRE(queue.push(late, late_time));
  REQUIRE(queue.push(early, early_time));
  REQUIRE(queue.push(now, kNow));
  CHECK(queue.try_pop() == &now);
  CHECK(queue.pop(Deadline::never()) == &early);
  CHECK(Clock::now() >= early_time);
  CHECK(queue.pop(Deadline::never()) == &late);
  CHECK(Clock::now() >= late_time);
  CHECK(queue.try_pop() == nullptr);
}

TEST_CASE("a worker's share is a stretch of neighbours") {
  ReadQueue queue;
  Read reads[10];
  for (Read& read : reads) REQUIRE(queue.push(read, kNow));
  const auto share = queue.try_pop_share(4, 1, 100);
  REQUIRE(share.size() == 3);  // of ten
  for (int i = 0; i < 3; ++i) CHECK(share[static_cast<size_t>(i)] == &reads[i]);
  CHECK(queue.try_pop_share(4, 5, 100).size() == 5);
  CHECK(queue.try_pop_share(1, 1, 1).size() == 1);
  CHECK(queue.try_pop_share(1, 4, 100).size() == 1);
  CHECK(queue.empty());
}

TEST_CASE("waiting leaves a read in the queue, and ends when it is woken") {
  ReadQueue queue;
  Read read, late;
  const uint64_t before = queue.wakes();
  CHECK_FALSE(queue.wait(Deadline::at(kNow), before));
  REQUIRE(queue.push(late, much_later()));
  CHECK_FALSE(queue.wait(Deadline::at(kNow), before));
  CHECK_FALSE(queue.empty());
  REQUIRE(queue.push(read, kNow));
  CHECK(queue.wait(Deadline::never(), before));
  CHECK(queue.look_at_first([&](const Read& first) { CHECK(&first == &read); }));
  queue.wake();
  CHECK_FALSE(queue.wait(Deadline::never(), before));  // woken since: also when that was before the call
  CHECK(queue.wait(Deadline::never(), queue.wakes()));
  CHECK(queue.try_pop() == &read);
  std::jthread waker([&] { queue.wake(); });
  CHECK_FALSE(queue.wait(Deadline::never(), before + 1));
}

TEST_CASE("reads of a lower priority number leave first, in their order") {
  ReadQueue queue;
  Read reads[6];
  for (int i = 0; i < 6; ++i) {
    reads[i].priority = i % 2 == 0 ? 7 : 3;
    REQUIRE(queue.push(reads[i], kNow));
  }
  for (const int expected : {1, 3, 5, 0, 2, 4}) CHECK(queue.try_pop() == &reads[expected]);
  CHECK(queue.try_pop() == nullptr);
}

TEST_CASE("a waiter gives up at its deadline") {
  ReadQueue queue;
  Read delayed;
  REQUIRE(queue.push(delayed, much_later()));
  const auto begin = Clock::now();
  CHECK(queue.pop(Deadline::after(std::chrono::milliseconds(20))) == nullptr);
  CHECK(Clock::now() - begin >= std::chrono::milliseconds(20));
  CHECK(queue.pop(Deadline::after(std::chrono::seconds(0))) == nullptr);
}

TEST_CASE("remove takes every read of the owner and leaves the others in order") {
  ReadQueue queue;
  RecordingOwner mine, other;
  Read reads[5];
  for (int i = 0; i < 5; ++i) reads[i].owner = i % 2 == 0 ? &mine : &other;
  REQUIRE(queue.push(reads[0], kNow));
  REQUIRE(queue.push(reads[1], kNow));
  REQUIRE(queue.push(reads[2], much_later()));
  REQUIRE(queue.push(reads[3], in(std::chrono::milliseconds(1))));
  REQUIRE(queue.push(reads[4], in(std::chrono::milliseconds(1))));
  auto removed = queue.remove(mine);
  std::sort(removed.begin(), removed.end());
  CHECK(removed == std::vector<Read*>{&reads[0], &reads[2], &reads[4]});
  CHECK(queue.remove(mine).empty());
  std::vector<Read*> left{queue.pop(Deadline::never()), queue.pop(Deadline::never())};
  std::sort(left.begin(), left.end());
  CHECK(left == std::vector<Read*>{&reads[1], &reads[3]});
}

TEST_CASE("delayed reads still leave in order of their times after others were removed") {
  constexpr int kReads = 60;
  ReadQueue queue;
  RecordingOwner mine, other;
  std::vector<Read> reads(kReads);
  std::vector<int> order(kReads);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(3));
  const auto begin = in(std::chrono::milliseconds(200));  // all are queued before, on a busy machine too
  for (const int i : order) {
    reads[i].owner = i % 3 == 0 ? &other : &mine;
    REQUIRE(queue.push(reads[i], begin + std::chrono::microseconds(100 * i)));
  }
  CHECK(queue.remove(mine).size() == 40);
  for (int i = 0; i < kReads; i += 3) CHECK(queue.pop(Deadline::never()) == &reads[i]);
}

TEST_CASE("stop wakes all waiters, hands back what is left and refuses more") {
  ReadQueue queue;
  Read ready, delayed, refused;
  std::atomic<int> woken{0};
  {
    std::vector<std::jthread> waiters;
    for (int i = 0; i < 3; ++i) {
      waiters.emplace_back([&] { woken += queue.pop(Deadline::never()) == nullptr; });
    }
    CHECK(queue.stop().empty());
  }
  CHECK(woken == 3);
  CHECK(queue.stopped());
  CHECK_FALSE(queue.push(refused, kNow));
  CHECK(queue.try_pop() == nullptr);
  CHECK(queue.pop(Deadline::never()) == nullptr);

  ReadQueue full;
  REQUIRE(full.push(delayed, much_later()));
  REQUIRE(full.push(ready, kNow));
  CHECK(full.stop() == std::vector<Read*>{&ready, &delayed});
  CHECK(full.stop().empty());
}

TEST_CASE("every read leaves once when many threads push and pop") {
  constexpr size_t kReads = 600;
  ReadQueue queue;
  std::vector<Read> reads(kReads);
  std::vector<std::atomic<int>> popped(kReads);
  std::atomic<size_t> total{0};
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([&] {
        while (Read* read = queue.pop(Deadline::never())) {
          ++popped[static_cast<size_t>(read - reads.data())];
          if (++total == kReads) queue.stop();
        }
      });
    }
    for (size_t part = 0; part < 2; ++part) {
      threads.emplace_back([&, part] {
        for (size_t i = part; i < kReads; i += 2) {
          queue.push(reads[i], i % 5 == 0 ? in(std::chrono::milliseconds(i % 7)) : kNow);
        }
      });
    }
  }
  CHECK(std::all_of(popped.begin(), popped.end(), [](const auto& count) { return count == 1; }));
}

TEST_CASE("a read longer than asked for stays, and whoever has room takes it") {
  ReadQueue queue;
  Read longer, shorter;
  longer.length = 10;
  shorter.length = 3;
  REQUIRE(queue.push(longer, kNow));
  REQUIRE(queue.push(shorter, kNow));
  CHECK(queue.try_pop(9) == nullptr);
  CHECK(queue.try_pop(10) == &longer);
  CHECK(queue.try_pop(3) == &shorter);
}

}  // namespace
}  // namespace rdmaload
