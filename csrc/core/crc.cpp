#include "core/crc.h"

#include <array>
#include <bit>
#include <cstring>

#include "core/crc32c.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(std::endian::native == std::endian::little, "words of a message are loaded as they lie");

namespace rdmaload {
namespace {

uint64_t load_word(const std::byte* data) noexcept {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

// Arithmetic modulo a polynomial of degree kWidth, reflected: bit i of a register is the coefficient of
// x^(kWidth-1-i). Everything comes from the polynomial, given reflected and without its highest term.
template <int kWidth, uint64_t kPolynomial>
struct Field {
  static constexpr uint64_t kMask = kWidth == 64 ? ~uint64_t{0} : (uint64_t{1} << kWidth) - 1;
  static constexpr uint64_t kOne = uint64_t{1} << (kWidth - 1);

  static constexpr uint64_t multiply_by_x(uint64_t a) noexcept {
    return (a >> 1) ^ ((a & 1) != 0 ? kPolynomial : 0);
  }

  static constexpr uint64_t multiply(uint64_t a, uint64_t b) noexcept {
    uint64_t product = 0;
    for (uint64_t bit = kOne; bit != 0; bit >>= 1) {
      if ((a & bit) != 0) product ^= b;
      b = multiply_by_x(b);
    }
    return product;
  }

  static constexpr uint64_t power_of_x(uint64_t exponent) noexcept {
    uint64_t result = kOne, square = kOne >> 1;
    for (; exponent != 0; exponent >>= 1, square = multiply(square, square)) {
      if ((exponent & 1) != 0) result = multiply(result, square);
    }
    return result;
  }

  // kTables[k][b]: the register after byte b, from an empty register, and then k zero bytes ("slicing by 8").
  static constexpr std::array<std::array<uint64_t, 256>, 8> kTables = [] {
    std::array<std::array<uint64_t, 256>, 8> tables{};
    for (uint64_t byte = 0; byte < 256; ++byte) {
      uint64_t value = byte;
      for (int bit = 0; bit < 8; ++bit) value = multiply_by_x(value);
      tables[0][byte] = value;
    }
    for (size_t zeros = 1; zeros < 8; ++zeros) {
      for (size_t byte = 0; byte < 256; ++byte) {
        const uint64_t value = tables[zeros - 1][byte];
        tables[zeros][byte] = (value >> 8) ^ tables[0][value & 0xff];
      }
    }
    return tables;
  }();

  static uint64_t update(uint64_t value, const std::byte* data, size_t size) noexcept {
    for (; size >= 8; data += 8, size -= 8) {
      const uint64_t word = value ^ load_word(data);
      value = 0;
      for (int byte = 0; byte < 8; ++byte) value ^= kTables[7 - byte][word >> (8 * byte) & 0xff];
    }
    for (; size > 0; ++data, --size) {
      value = (value >> 8) ^ kTables[0][(value ^ std::to_integer<uint64_t>(*data)) & 0xff];
    }
    return value;
  }

#if defined(__x86_64__)
  // What a carry-less multiplication moves the first (low) and the second eight bytes of a block by, so that
  // the block stands `bits` later in the message. As 64-bit operands, bit i is x^(63-i), hence the shift of
  // shorter registers; the product of two has x^(126-i) at bit i of a block, where x^(127-i) is meant, hence
  // the 1 less.
  static constexpr uint64_t kShift = 64 - kWidth;
  static constexpr uint64_t first_factor(uint64_t bits) { return power_of_x(bits + 63) << kShift; }
  static constexpr uint64_t second_factor(uint64_t bits) { return power_of_x(bits - 1) << kShift; }

  __attribute__((target("pclmul,sse2"))) static __m128i folded(__m128i block, __m128i factors,
                                                               __m128i later) noexcept {
    return _mm_xor_si128(later, _mm_xor_si128(_mm_clmulepi64_si128(block, factors, 0x00),
                                              _mm_clmulepi64_si128(block, factors, 0x11)));
  }

  // Folds four streams of 16 bytes each over the message and then into one block, which stands for all that
  // came before what is left.
  __attribute__((target("pclmul,sse2"))) static uint64_t update_pclmul(uint64_t value, const std::byte* data,
                                                                       size_t size) noexcept {
    if (size < 128) return update(value, data, size);
    static constexpr uint64_t kFirst4 = first_factor(512), kSecond4 = second_factor(512);
    static constexpr uint64_t kFirst1 = first_factor(128), kSecond1 = second_factor(128);
    const auto load = [&](size_t at) __attribute__((target("pclmul,sse2"))) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + at));
    };
    __m128i a = _mm_xor_si128(load(0), _mm_cvtsi64_si128(static_cast<int64_t>(value)));
    __m128i b = load(16), c = load(32), d = load(48);
    const __m128i by_four = _mm_set_epi64x(static_cast<int64_t>(kSecond4), static_cast<int64_t>(kFirst4));
    for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
      a = folded(a, by_four, load(0));
      b = folded(b, by_four, load(16));
      c = folded(c, by_four, load(32));
      d = folded(d, by_four, load(48));
    }
    const __m128i by_one = _mm_set_epi64x(static_cast<int64_t>(kSecond1), static_cast<int64_t>(kFirst1));
    std::array<std::byte, 16> block;
    a = folded(folded(folded(a, by_one, b), by_one, c), by_one, d);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(block.data()), a);
    return update(update(0, block.data(), block.size()), data, size);
  }
#endif

  static uint64_t of(uint64_t value, std::span<const std::byte> data, bool tables) noexcept {
    value = ~value & kMask;
#if defined(__x86_64__)
    static const bool can_multiply = __builtin_cpu_supports("pclmul") != 0;
    if (can_multiply && !tables) return ~update_pclmul(value, data.data(), data.size()) & kMask;
#endif
    static_cast<void>(tables);
    return ~update(value, data.data(), data.size()) & kMask;
  }

  // The inversions at the ends of a and of b cancel each other.
  static uint64_t combine(uint64_t a, uint64_t b, uint64_t length_b) noexcept {
    uint64_t factor = kOne, square = power_of_x(8);
    for (; length_b != 0; length_b >>= 1, square = multiply(square, square)) {
      if ((length_b & 1) != 0) factor = multiply(factor, square);
    }
    return multiply(a, factor) ^ b;
  }
};

using Crc32c = Field<32, 0x82f63b78>;
using Crc32 = Field<32, 0xedb88320>;
using Crc64Nvme = Field<64, 0x9a6c9329ac4bc9b5>;

}  // namespace

CrcKind crc_kind(std::string_view name) noexcept {
  if (name == "crc32c") return CrcKind::kCrc32c;
  if (name == "crc32") return CrcKind::kCrc32;
  if (name == "crc64nvme") return CrcKind::kCrc64Nvme;
  return CrcKind::kNone;
}

uint64_t crc(CrcKind kind, uint64_t value, std::span<const std::byte> data) noexcept {
  switch (kind) {
    case CrcKind::kCrc32c:
      return crc32c(static_cast<uint32_t>(value), data);
    case CrcKind::kCrc32:
      return Crc32::of(value, data, false);
    case CrcKind::kCrc64Nvme:
      return Crc64Nvme::of(value, data, false);
    case CrcKind::kNone:
      break;
  }
  return 0;
}

uint64_t crc_by_tables(CrcKind kind, uint64_t value, std::span<const std::byte> data) noexcept {
  switch (kind) {
    case CrcKind::kCrc32c:
      return Crc32c::of(value, data, true);
    case CrcKind::kCrc32:
      return Crc32::of(value, data, true);
    case CrcKind::kCrc64Nvme:
      return Crc64Nvme::of(value, data, true);
    case CrcKind::kNone:
      break;
  }
  return 0;
}

uint64_t crc_combine(CrcKind kind, uint64_t crc_a, uint64_t crc_b, uint64_t length_b) noexcept {
  switch (kind) {
    case CrcKind::kCrc32c:
      return crc32c_combine(static_cast<uint32_t>(crc_a), static_cast<uint32_t>(crc_b), length_b);
    case CrcKind::kCrc32:
      return Crc32::combine(crc_a, crc_b, length_b);
    case CrcKind::kCrc64Nvme:
      return Crc64Nvme::combine(crc_a, crc_b, length_b);
    case CrcKind::kNone:
      break;
  }
  return 0;
}

}  // namespace rdmaload
