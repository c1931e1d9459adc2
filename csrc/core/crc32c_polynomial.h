// Arithmetic in GF(2)[x] modulo the Castagnoli polynomial P. Every table and fold constant comes from it.
//
// A 32-bit value is "reflected": its bit i is the coefficient of x^(31-i), as in the CRC register. Appending
// n zero bits to a message multiplies its CRC register by x^n.
#pragma once

#include <array>
#include <cstdint>

namespace rdmaload::crc32c_internal {

// P without its x^32 term, reflected: 0x1edc6f41 with the bits in the other order.
inline constexpr uint32_t kPolynomial = 0x82f63b78;
inline constexpr uint32_t kOne = 0x80000000;

constexpr uint32_t multiply_by_x(uint32_t a) noexcept { return (a >> 1) ^ ((a & 1) != 0 ? kPolynomial : 0); }

constexpr uint32_t multiply(uint32_t a, uint32_t b) noexcept {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = multiply_by_x(b);
  }
  return product;
}

// x^(8 * 2^i) for every i: what 2^i zero bytes multiply a register by.
inline constexpr std::array<uint32_t, 64> kZeroBytes = [] {
  std::array<uint32_t, 64> powers{};
  powers[0] = kOne >> 8;
  for (int i = 1; i < 64; ++i) powers[i] = multiply(powers[i - 1], powers[i - 1]);
  return powers;
}();

// The register after `bytes` zero bytes.
constexpr uint32_t append_zeros(uint32_t a, uint64_t bytes) noexcept {
  for (int i = 0; bytes != 0; ++i, bytes >>= 1) {
    if ((bytes & 1) != 0) a = multiply(kZeroBytes[i], a);
  }
  return a;
}

// The factor with which a carry-less multiply instruction moves a value `bits` places up: x^(bits-33).
//
// A reflected 64-bit operand has x^(63-i) at bit i, and the 128-bit product of two has x^(127-i): one x is
// gained (63 + 63 + 1 = 127). The factor lies in the low half of its operand, where the same bits stand for
// x^32 times as much. Together 33 too many. The same holds when both operands are 32-bit registers, and the
// 64-bit product is then fed to a CRC instruction, which multiplies by x^32.
constexpr uint64_t shift_factor(uint64_t bits) noexcept {
  uint32_t factor = append_zeros(kOne, (bits - 33) / 8);
  for (uint64_t i = 0; i < (bits - 33) % 8; ++i) factor = multiply_by_x(factor);
  return factor;
}

}  // namespace rdmaload::crc32c_internal
