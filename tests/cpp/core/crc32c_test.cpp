#include "core/crc32c.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "core/crc32c_implementations.h"
#include "core/crc32c_polynomial.h"

namespace rdmaload {
namespace {

using crc32c_internal::Implementation;
using crc32c_internal::implementations;

// The definition, one bit at a time, sharing nothing with the code under test. Raw register in and out.
uint32_t reference_update(uint32_t crc, std::span<const std::byte> data) {
  for (const std::byte byte : data) {
    crc ^= std::to_integer<uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? (crc >> 1) ^ 0x82f63b78u : crc >> 1;
  }
  return crc;
}

uint32_t reference_crc32c(std::span<const std::byte> data) { return ~reference_update(0xffffffffu, data); }

std::vector<std::byte> random_bytes(size_t size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

// Runs the check for each implementation that this CPU supports.
template <class Check>
void for_each_supported(Check check) {
  for (const Implementation& implementation : implementations()) {
    if (!implementation.supported) continue;
    CAPTURE(implementation.name);
    check(implementation);
  }
}

struct KnownVector {
  std::vector<std::byte> data;
  uint32_t crc;
};

std::vector<KnownVector> known_vectors() {
  const auto filled = [](auto value_at) {
    std::vector<std::byte> data(32);
    for (size_t i = 0; i < 32; ++i) data[i] = static_cast<std::byte>(value_at(i));
    return data;
  };
  const auto digits = bytes_of("123456789");
  return {
      // RFC 3720, appendix B.4.
      {filled([](size_t) { return 0; }), 0x8a9136aa},
      {filled([](size_t) { return 0xff; }), 0x62a8ab43},
      {filled([](size_t i) { return i; }), 0x46dd794e},
      {filled([](size_t i) { return 31 - i; }), 0x113fdb5c},
      // The check value in catalogues of CRCs.
      {{digits.begin(), digits.end()}, 0xe3069283},
      {{}, 0},
  };
}

}  // namespace

TEST_CASE("crc32c gives the published check values") {
  for (const KnownVector& known : known_vectors()) {
    CHECK(crc32c(0, known.data) == known.crc);
    CHECK(reference_crc32c(known.data) == known.crc);
    for_each_supported([&](const Implementation& implementation) {
      CHECK(~implementation.update(0xffffffffu, known.data.data(), known.data.size()) == known.crc);
    });
  }
}

TEST_CASE("crc32c runs the first supported implementation") {
  const auto list = implementations();
  const auto fastest =
      std::find_if(list.begin(), list.end(), [](const auto& entry) { return entry.supported; });
  REQUIRE(fastest != list.end());
  CHECK(crc32c_implementation() == fastest->name);
  CHECK(list.back().name == "table");
  CHECK(list.back().supported);
}

TEST_CASE("every implementation equals the definition for every small size at every alignment") {
  const auto bytes = random_bytes(64 + 700, 1);
  for_each_supported([&](const Implementation& implementation) {
    // 256 and 512 begin and repeat the wide loop; 192 begins the short blocks of three streams.
    for (size_t size = 0; size <= 700; ++size) {
      const size_t offset = size * 7 % 64;
      const uint32_t seed = static_cast<uint32_t>(size * 0x9e3779b9u);
      const auto part = std::span(bytes).subspan(offset, size);
      REQUIRE(implementation.update(seed, part.data(), size) == reference_update(seed, part));
    }
    for (size_t offset = 0; offset < 64; ++offset) {
      const auto part = std::span(bytes).subspan(offset, 517);
      REQUIRE(implementation.update(0xffffffffu, part.data(), part.size()) ==
              reference_update(0xffffffffu, part));
    }
  });
}

TEST_CASE("every implementation equals the definition for random sizes, alignments and seeds") {
  const auto bytes = random_bytes(200'000, 2);
  std::mt19937_64 random(3);
  for (int round = 0; round < 60; ++round) {
    // Sizes spread evenly over magnitudes, so that each loop of each implementation starts and ends often.
    const size_t limit = size_t{1} << (random() % 18);
    const size_t size = random() % std::min<size_t>(limit + 1, bytes.size() - 64);
    const size_t offset = random() % 64;
    const auto seed = static_cast<uint32_t>(random());
    const auto part = std::span(bytes).subspan(offset, size);
    const uint32_t expected = reference_update(seed, part);
    CAPTURE(size);
    CAPTURE(offset);
    for_each_supported([&](const Implementation& implementation) {
      REQUIRE(implementation.update(seed, part.data(), size) == expected);
    });
  }
}

TEST_CASE("no implementation reads outside its range") {
  // Each size in an allocation of exactly that size, so that an address sanitizer sees a stray byte.
  for_each_supported([&](const Implementation& implementation) {
    for (const size_t size : {0, 1, 3, 7, 9, 63, 64, 65, 191, 193, 255, 257, 319, 511, 1537, 12289, 24577}) {
      const auto source = random_bytes(size, size);
      const auto exact = std::make_unique<std::byte[]>(size);
      std::copy(source.begin(), source.end(), exact.get());
      REQUIRE(implementation.update(5, exact.get(), size) == reference_update(5, source));
    }
  });
}

TEST_CASE("a message in pieces has the checksum of the whole") {
  const auto bytes = random_bytes(100'000, 4);
  const uint32_t whole = crc32c(0, bytes);
  CHECK(whole == reference_crc32c(bytes));
  std::mt19937_64 random(5);
  for (int round = 0; round < 50; ++round) {
    uint32_t running = 0;
    for (size_t begin = 0; begin < bytes.size();) {
      const size_t size = std::min<size_t>(random() % 9000, bytes.size() - begin);
      running = crc32c(running, std::span(bytes).subspan(begin, size));
      begin += size;
    }
    REQUIRE(running == whole);
  }
}

TEST_CASE("a flipped bit changes the checksum wherever it is") {
  auto bytes = random_bytes(4096 + 77, 6);
  for_each_supported([&](const Implementation& implementation) {
    const uint32_t before = implementation.update(0, bytes.data(), bytes.size());
    for (size_t at = 0; at < bytes.size(); at += 13) {
      bytes[at] ^= std::byte{0x10};
      REQUIRE(implementation.update(0, bytes.data(), bytes.size()) != before);
      bytes[at] ^= std::byte{0x10};
    }
  });
}

TEST_CASE("combine joins the checksums of two neighbours") {
  const auto bytes = random_bytes(70'000, 7);
  const uint32_t whole = crc32c(0, bytes);
  std::mt19937_64 random(8);
  for (int round = 0; round < 100; ++round) {
    const size_t split = round == 0 ? 0 : round == 1 ? bytes.size() : random() % bytes.size();
    const uint32_t a = crc32c(0, std::span(bytes).first(split));
    const uint32_t b = crc32c(0, std::span(bytes).subspan(split));
    REQUIRE(crc32c_combine(a, b, bytes.size() - split) == whole);
  }
}

TEST_CASE("combine with nothing changes nothing") {
  CHECK(crc32c_combine(0x12345678, 0, 0) == 0x12345678);
  CHECK(crc32c_combine(0, 0x12345678, 1u << 30) == 0x12345678);
}

TEST_CASE("combine takes lengths whose bits do not fit 64 bits") {
  // Two halves of 2^63 bytes, and one of 2^63 + 2^63 - 1: moved in either number of steps, the same place.
  constexpr uint64_t kHalf = uint64_t{1} << 63;
  const uint32_t in_two = crc32c_combine(crc32c_combine(0xdeadbeef, 0, kHalf), 0, kHalf - 1);
  CHECK(crc32c_combine(0xdeadbeef, 0, ~uint64_t{0}) == in_two);
  // x has order 2^31 - 1 modulo P, and 8 * 2^61 is 8 * 2^30 modulo that.
  CHECK(crc32c_combine(0xdeadbeef, 0, uint64_t{1} << 61) == crc32c_combine(0xdeadbeef, 0, uint64_t{1} << 30));
}

TEST_CASE("appending zeros in the polynomial arithmetic is appending zero bytes to the message") {
  const std::vector<std::byte> zeros(1000);
  for (const size_t count : {0, 1, 2, 3, 8, 255, 256, 1000}) {
    REQUIRE(crc32c_internal::append_zeros(0xcafef00d, count) ==
            reference_update(0xcafef00d, std::span(zeros).first(count)));
  }
}

}  // namespace rdmaload
