// The bytes of one fuzzing run as a source of small decisions, and the check that ends a run.
//
// Every decision takes a fixed number of bytes from the front, so that a mutation of one byte changes one
// decision. An exhausted input answers 0.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

// What must hold whatever the input is. Not assert: it must not depend on NDEBUG.
#define FUZZ_CHECK(...)                                                                     \
  do {                                                                                      \
    if (!(__VA_ARGS__)) {                                                                   \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #__VA_ARGS__); \
      std::abort();                                                                         \
    }                                                                                       \
  } while (false)

namespace rdmaload::fuzz {

class FuzzInput {
 public:
  FuzzInput(const uint8_t* data, size_t size) : bytes_(reinterpret_cast<const char*>(data), size) {}

  bool empty() const noexcept { return bytes_.empty(); }
  bool flag() { return byte() & 1; }
  uint8_t byte() { return static_cast<uint8_t>(unsigned_of(1)); }
  uint64_t u64() { return unsigned_of(8); }
  // From 0 to `max`, which is small.
  uint32_t below_or(uint32_t max) {
    return static_cast<uint32_t>(unsigned_of(max < 256 ? 1 : max < 65536 ? 2 : 4) % (uint64_t{max} + 1));
  }
  std::string_view take(size_t size) {
    const std::string_view taken = bytes_.substr(0, size);
    bytes_.remove_prefix(taken.size());
    return taken;
  }
  std::string_view rest() { return take(bytes_.size()); }

 private:
  uint64_t unsigned_of(size_t size) {
    uint64_t value = 0;
    for (const char c : take(size)) value = value << 8 | static_cast<uint8_t>(c);
    return value;
  }

  std::string_view bytes_;
};

}  // namespace rdmaload::fuzz
