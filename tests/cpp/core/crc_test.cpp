#include "core/crc.h"

#include <doctest/doctest.h>

#include <random>
#include <string>
#include <vector>

using namespace rdmaload;

namespace {

constexpr CrcKind kKinds[] = {CrcKind::kCrc32c, CrcKind::kCrc32, CrcKind::kCrc64Nvme};

std::vector<std::byte> random_bytes(size_t size) {
  std::mt19937 random(7);
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

}  // namespace

TEST_CASE("the published check values of each CRC come out") {
  const std::string digits = "123456789";
  const auto bytes = std::as_bytes(std::span(digits));
  CHECK(crc(crc_kind("crc32c"), 0, bytes) == 0xe3069283);
  CHECK(crc(crc_kind("crc32"), 0, bytes) == 0xcbf43926);
  CHECK(crc(crc_kind("crc64nvme"), 0, bytes) == 0xae8b14860a799888);
  CHECK(crc_kind("md5") == CrcKind::kNone);
  CHECK(crc(CrcKind::kNone, 5, bytes) == 0);
}

TEST_CASE("every length and alignment gives what the tables give") {
  const std::vector<std::byte> bytes = random_bytes(1000);
  for (const CrcKind kind : kKinds) {
    for (size_t begin = 0; begin < 17; ++begin) {
      for (size_t size = 0; size + begin <= bytes.size(); size += size < 300 ? 1 : 97) {
        const auto part = std::span(bytes).subspan(begin, size);
        REQUIRE(crc(kind, 0, part) == crc_by_tables(kind, 0, part));
      }
    }
  }
}

TEST_CASE("parts give the whole, one after the other or combined") {
  const std::vector<std::byte> bytes = random_bytes(300'000);
  const auto all = std::span<const std::byte>(bytes);
  for (const CrcKind kind : kKinds) {
    const uint64_t whole = crc(kind, 0, all);
    for (const size_t cut : {0ul, 1ul, 127ul, 128ul, 4096ul, 299'999ul, 300'000ul}) {
      const auto front = all.first(cut), back = all.subspan(cut);
      CHECK(crc(kind, crc(kind, 0, front), back) == whole);
      CHECK(crc_combine(kind, crc(kind, 0, front), crc(kind, 0, back), back.size()) == whole);
      if (cut > 0 && cut < all.size()) {  // in the other order it is another message
        CHECK(crc_combine(kind, crc(kind, 0, back), crc(kind, 0, front), front.size()) != whole);
      }
    }
  }
}
