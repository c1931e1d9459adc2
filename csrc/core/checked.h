// Unsigned 64-bit arithmetic that notices when it would wrap: for lengths and offsets that came from outside.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>

namespace rdmaload {

constexpr std::optional<uint64_t> checked_add(uint64_t a, uint64_t b) noexcept {
  if (b > std::numeric_limits<uint64_t>::max() - a) return std::nullopt;
  return a + b;
}

constexpr std::optional<uint64_t> checked_mul(uint64_t a, uint64_t b) noexcept {
  if (b != 0 && a > std::numeric_limits<uint64_t>::max() / b) return std::nullopt;
  return a * b;
}

}  // namespace rdmaload
