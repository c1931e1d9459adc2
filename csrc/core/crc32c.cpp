#include "core/crc32c.h"

#include <array>

#include "core/crc32c_implementations.h"
#include "core/crc32c_polynomial.h"

namespace rdmaload {

namespace crc32c_internal {
namespace {

// kTables[k][b]: the register after byte b, from an empty register, and then k zero bytes ("slicing by 8").
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = multiply_by_x(crc);
    tables[0][byte] = crc;
  }
  for (size_t zeros = 1; zeros < 8; ++zeros) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[zeros - 1][byte];
      tables[zeros][byte] = (crc >> 8) ^ tables[0][crc & 0xff];
    }
  }
  return tables;
}();

uint32_t update_table(uint32_t crc, const std::byte* data, size_t size) noexcept {
  const auto byte = [&](size_t i) { return std::to_integer<uint32_t>(data[i]); };
  for (; size >= 8; data += 8, size -= 8) {
    crc ^= byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
    crc = kTables[7][crc & 0xff] ^ kTables[6][crc >> 8 & 0xff] ^ kTables[5][crc >> 16 & 0xff] ^
          kTables[4][crc >> 24] ^ kTables[3][byte(4)] ^ kTables[2][byte(5)] ^ kTables[1][byte(6)] ^
          kTables[0][byte(7)];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8) ^ kTables[0][(crc ^ byte(0)) & 0xff];
  return crc;
}

const Implementation& chosen() noexcept {
  static const Implementation& fastest = []() -> const Implementation& {
    for (const Implementation& candidate : implementations()) {
      if (candidate.supported) return candidate;
    }
    return implementations().back();
  }();
  return fastest;
}

}  // namespace

std::span<const Implementation> implementations() noexcept {
  static const auto list = std::to_array<Implementation>({
#if defined(__x86_64__)
      {"vpclmul", has_vpclmul(), update_vpclmul},
      {"sse4.2+pclmul", has_pclmul(), update_pclmul},
#elif defined(__aarch64__) && defined(__linux__)
      {"armv8", has_armv8_crc(), update_armv8},
#endif
      {"table", true, update_table},
  });
  return list;
}

}  // namespace crc32c_internal

uint32_t crc32c(uint32_t value, std::span<const std::byte> data) noexcept {
  return ~crc32c_internal::chosen().update(~value, data.data(), data.size());
}

uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b) noexcept {
  // The inversions at the ends of a and of b cancel each other.
  return crc32c_internal::append_zeros(crc_a, length_b) ^ crc_b;
}

std::string_view crc32c_implementation() noexcept { return crc32c_internal::chosen().name; }

}  // namespace rdmaload
