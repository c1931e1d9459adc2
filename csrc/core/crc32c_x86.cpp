// CRC-32C on x86-64. Functions carry their own target attributes, so the file needs no compiler flags and the
// rest of the program runs on any x86-64 CPU.
#if defined(__x86_64__)

#include <immintrin.h>

#include <array>
#include <cstring>

#include "core/crc32c_implementations.h"
#include "core/crc32c_polynomial.h"

#define RDMALOAD_PCLMUL __attribute__((target("sse4.2,pclmul")))
#define RDMALOAD_VPCLMUL __attribute__((target("sse4.2,pclmul,avx512f,vpclmulqdq")))

namespace rdmaload::crc32c_internal {
namespace {

inline uint64_t load_word(const std::byte* data) noexcept {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

// One stream of CRC instructions: three cycles of latency for eight bytes.
RDMALOAD_PCLMUL inline uint32_t update_serial(uint32_t crc, const std::byte* data, size_t size) noexcept {
  uint64_t wide = crc;
  for (; size >= 8; data += 8, size -= 8) wide = _mm_crc32_u64(wide, load_word(data));
  crc = static_cast<uint32_t>(wide);
  if ((size & 4) != 0) {
    uint32_t word;
    std::memcpy(&word, data, sizeof word);
    crc = _mm_crc32_u32(crc, word);
    data += 4;
  }
  if ((size & 2) != 0) {
    uint16_t word;
    std::memcpy(&word, data, sizeof word);
    crc = _mm_crc32_u16(crc, word);
    data += 2;
  }
  if ((size & 1) != 0) crc = _mm_crc32_u8(crc, std::to_integer<uint8_t>(*data));
  return crc;
}

// Three independent streams of kBytes each hide that latency; two multiplications then move the first two
// registers over the bytes that followed them. Advances data and size past every whole block.
template <size_t kBytes>
RDMALOAD_PCLMUL inline uint32_t update_blocks(uint32_t crc, const std::byte*& data, size_t& size) noexcept {
  static constexpr uint64_t kOneBlock = shift_factor(8 * kBytes);
  static constexpr uint64_t kTwoBlocks = shift_factor(16 * kBytes);
  const __m128i factors = _mm_set_epi64x(kOneBlock, kTwoBlocks);
  for (; size >= 3 * kBytes; data += 3 * kBytes, size -= 3 * kBytes) {
    uint64_t a = crc;
    uint64_t b = 0;
    uint64_t c = 0;
    for (size_t i = 0; i < kBytes; i += 8) {
      a = _mm_crc32_u64(a, load_word(data + i));
      b = _mm_crc32_u64(b, load_word(data + i + kBytes));
      c = _mm_crc32_u64(c, load_word(data + i + 2 * kBytes));
    }
    const __m128i moved_a = _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<long long>(a)), factors, 0x00);
    const __m128i moved_b = _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<long long>(b)), factors, 0x10);
    const auto moved = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_xor_si128(moved_a, moved_b)));
    crc = static_cast<uint32_t>(_mm_crc32_u64(0, moved) ^ c);
  }
  return crc;
}

// The factor pair that moves a 16-byte lane up by `bytes`: the lane's first word, which stands for 64 bits
// more, is multiplied by the first factor and its second word by the second.
struct LaneFactors {
  uint64_t first;
  uint64_t second;
};
constexpr LaneFactors lane_factors(size_t bytes) noexcept {
  return {shift_factor(8 * bytes + 64), shift_factor(8 * bytes)};
}

// One pair for each of the four 16-byte lanes of a vector.
using VectorFactors = std::array<LaneFactors, 4>;
constexpr VectorFactors vector_factors(size_t bytes) noexcept {
  const LaneFactors lane = lane_factors(bytes);
  return {lane, lane, lane, lane};
}

alignas(64) constexpr VectorFactors kMove256 = vector_factors(256);
alignas(64) constexpr VectorFactors kMove64 = vector_factors(64);
// Moves the first three lanes to the place of the last.
alignas(64) constexpr VectorFactors kGather = {lane_factors(48), lane_factors(32), lane_factors(16),
                                               LaneFactors{0, 0}};

// Every lane moved by its factors, plus `addend`.
RDMALOAD_VPCLMUL inline __m512i fold(__m512i lanes, __m512i factors, __m512i addend) noexcept {
  constexpr int kXorOfThree = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(lanes, factors, 0x00),
                                   _mm512_clmulepi64_epi128(lanes, factors, 0x11), addend, kXorOfThree);
}

}  // namespace

bool has_pclmul() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

bool has_vpclmul() noexcept {
  // "avx512f" is reported only when the operating system saves the wide registers.
  return has_pclmul() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
}

RDMALOAD_PCLMUL uint32_t update_pclmul(uint32_t crc, const std::byte* data, size_t size) noexcept {
  // Long blocks make the combination free; the shorter ones spare what is left over from one slow stream.
  crc = update_blocks<4096>(crc, data, size);
  crc = update_blocks<512>(crc, data, size);
  crc = update_blocks<64>(crc, data, size);
  return update_serial(crc, data, size);
}

RDMALOAD_VPCLMUL uint32_t update_vpclmul(uint32_t crc, const std::byte* data, size_t size) noexcept {
  if (size < 256) return update_pclmul(crc, data, size);

  __m512i a = _mm512_xor_si512(_mm512_loadu_si512(data),
                               _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  __m512i b = _mm512_loadu_si512(data + 64);
  __m512i c = _mm512_loadu_si512(data + 128);
  __m512i d = _mm512_loadu_si512(data + 192);
  data += 256;
  size -= 256;
  const __m512i move_256 = _mm512_load_si512(kMove256.data());
  for (; size >= 256; data += 256, size -= 256) {
    a = fold(a, move_256, _mm512_loadu_si512(data));
    b = fold(b, move_256, _mm512_loadu_si512(data + 64));
    c = fold(c, move_256, _mm512_loadu_si512(data + 128));
    d = fold(d, move_256, _mm512_loadu_si512(data + 192));
  }
  const __m512i move_64 = _mm512_load_si512(kMove64.data());
  __m512i lanes = fold(fold(fold(a, move_64, b), move_64, c), move_64, d);
  for (; size >= 64; data += 64, size -= 64) lanes = fold(lanes, move_64, _mm512_loadu_si512(data));

  // Through memory, because gcc 12 warns of uninitialised values inside its own lane extraction intrinsics.
  alignas(64) std::array<uint64_t, 8> moved;
  alignas(64) std::array<uint64_t, 8> last;
  _mm512_store_si512(moved.data(), fold(lanes, _mm512_load_si512(kGather.data()), _mm512_setzero_si512()));
  _mm512_store_si512(last.data(), lanes);
  // The message so far is congruent to these 16 bytes: their checksum is its checksum.
  uint64_t wide = _mm_crc32_u64(0, moved[0] ^ moved[2] ^ moved[4] ^ last[6]);
  wide = _mm_crc32_u64(wide, moved[1] ^ moved[3] ^ moved[5] ^ last[7]);
  return update_serial(static_cast<uint32_t>(wide), data, size);
}

}  // namespace rdmaload::crc32c_internal

#endif
