#include "memory/host_arena.h"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace rdmaload {
namespace {

constexpr size_t kHuge = size_t{2} << 20;

bool mapped(const std::byte* address) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char resident;
  return mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(address) / page * page), 1, &resident) ==
         0;
}

TEST_CASE("an arena is aligned, zeroed and writable from its first to its last byte") {
  for (const size_t size : {size_t{1}, size_t{63}, size_t{4095}, size_t{4096}, size_t{4097}, kHuge - 1, kHuge,
                            kHuge + 1, 3 * kHuge + 12345}) {
    CAPTURE(size);
    HostArena arena(size);
    REQUIRE(arena.size() == size);
    REQUIRE(arena.span().data() == arena.data());
    REQUIRE(arena.span().size() == size);
    const auto address = reinterpret_cast<uintptr_t>(arena.data());
    CHECK(address % 64 == 0);
    if (size >= kHuge) CHECK(address % kHuge == 0);
    for (const std::byte byte : arena.span()) {
      if (byte != std::byte{0}) FAIL_CHECK("fresh memory is not zero");
    }
    std::memset(arena.data(), 0x5a, size);
    CHECK(arena.data()[0] == std::byte{0x5a});
    CHECK(arena.data()[size - 1] == std::byte{0x5a});
  }
}

TEST_CASE("an empty arena owns nothing") {
  HostArena arena(0);
  CHECK(arena.size() == 0);
  CHECK(arena.data() == nullptr);
  CHECK(arena.span().empty());
}

TEST_CASE("arenas do not overlap") {
  HostArena first(kHuge + 1), second(kHuge + 1), third(100);
  std::memset(first.data(), 1, first.size());
  std::memset(second.data(), 2, second.size());
  std::memset(third.data(), 3, third.size());
  CHECK(first.data()[0] == std::byte{1});
  CHECK(first.data()[kHuge] == std::byte{1});
  CHECK(second.data()[0] == std::byte{2});
  CHECK(second.data()[kHuge] == std::byte{2});
  CHECK(third.data()[99] == std::byte{3});
}

TEST_CASE("dropping an arena gives its memory back to the system") {
  for (const size_t size : {size_t{100}, kHuge + 1}) {
    const std::byte* data;
    {
      HostArena arena(size);
      data = arena.data();
      REQUIRE(mapped(data));
      REQUIRE(mapped(data + size - 1));
    }
    CHECK_FALSE(mapped(data));
    CHECK_FALSE(mapped(data + size - 1));
  }
}

TEST_CASE("what was mapped only to find an aligned place is given back too") {
  const auto mapped_pages = [] {
    size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    return pages;
  };
  const size_t before = mapped_pages();
  std::vector<std::unique_ptr<HostArena>> arenas;
  for (int i = 0; i < 20; ++i) arenas.push_back(std::make_unique<HostArena>(kHuge + 1));
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  CHECK(mapped_pages() - before <= 20 * (kHuge / page + 1) + kHuge / page);
  arenas.clear();
  CHECK(mapped_pages() - before <= kHuge / page);
}

TEST_CASE("more than the system has is bad_alloc, not a wrapped size") {
  CHECK_THROWS_AS(HostArena(std::numeric_limits<size_t>::max()), std::bad_alloc);
  CHECK_THROWS_AS(HostArena(std::numeric_limits<size_t>::max() - kHuge), std::bad_alloc);
  CHECK_THROWS_AS(HostArena(std::numeric_limits<size_t>::max() / 2), std::bad_alloc);
  CHECK_THROWS_AS(HostArena(size_t{1} << 60), std::bad_alloc);
}

}  // namespace
}  // namespace rdmaload
