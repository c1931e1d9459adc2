#include "transport/segment_cursor.h"

#include <doctest/doctest.h>

#include <array>
#include <cstring>

#include "support/reads.h"

namespace rdmaload {
namespace {

using testing::pick;
using testing::RecordingOwner;
using testing::TestRead;

// Plays a socket: hands out the bytes in pieces of random sizes through next()/advance() and copy_from().
void receive(Read& read, std::span<const std::byte> bytes, std::mt19937_64& random, bool copy) {
  SegmentCursor cursor(read);
  std::vector<std::byte> scratch(pick(random, 1, 50));
  std::array<iovec, 7> vectors;
  uint64_t copied = 0;
  while (cursor.left() > 0) {
    REQUIRE(cursor.left() == bytes.size());
    if (copy && pick(random, 0, 2) == 0) {
      const size_t size = pick(random, 1, bytes.size());
      cursor.copy_from(bytes.first(size));
      bytes = bytes.subspan(size);
      copied += size;
      continue;
    }
    const size_t limit = pick(random, 1, 100);
    const size_t count =
        cursor.next(std::span(vectors).first(pick(random, 1, vectors.size())), limit, scratch);
    size_t offered = 0;
    for (size_t i = 0; i < count; ++i) offered += vectors[i].iov_len;
    REQUIRE(count > 0);
    REQUIRE(offered > 0);  // a receive of nothing looks like the end of the connection
    REQUIRE(offered <= std::min<uint64_t>(limit, cursor.left()));
    const size_t got = pick(random, 1, offered);
    size_t at = 0;
    for (size_t i = 0; i < count && at < got; ++i) {
      const size_t size = std::min(vectors[i].iov_len, got - at);
      std::memcpy(vectors[i].iov_base, bytes.data() + at, size);
      at += size;
    }
    cursor.advance({vectors.data(), count}, got);
    bytes = bytes.subspan(got);
  }
  CHECK(bytes.empty());
  CHECK(read.copied_bytes == copied);
}

TEST_CASE("any cutting of the stream puts every byte in its place and gives the range's checksum") {
  std::mt19937_64 random(1);
  RecordingOwner owner;
  for (int round = 0; round < 2000; ++round) {
    CAPTURE(round);
    const auto object = testing::random_bytes(pick(random, 1, 600), static_cast<uint64_t>(round));
    const uint64_t length = pick(random, 1, object.size());
    const uint64_t offset = pick(random, 0, object.size() - length);
    TestRead prepared("o", object.size(), offset, testing::random_segments(random, length), owner);
    prepared.read.crc = 0xdeadbeef;  // of an earlier attempt
    prepared.read.copied_bytes = 99;
    receive(prepared.read, std::span(object).subspan(offset, length), random, round % 2 == 0);
    REQUIRE(prepared.holds(object));
    REQUIRE(prepared.read.crc == crc32c(0, std::span(object).subspan(offset, length)));
  }
}

TEST_CASE("an empty read is done before it begins") {
  RecordingOwner owner;
  TestRead none("o", 0, 0, {}, owner), empties("o", 0, 0, {{0}, {0, true}}, owner);
  for (Read* read : {&none.read, &empties.read}) {
    SegmentCursor cursor(*read);
    std::array<iovec, 2> vectors;
    std::array<std::byte, 8> scratch;
    CHECK(cursor.left() == 0);
    CHECK(cursor.next(vectors, 100, scratch) == 0);
    cursor.copy_from({});
  }
}

TEST_CASE("without a checksum none is made") {
  RecordingOwner owner;
  const auto object = testing::random_bytes(100, 1);
  TestRead prepared("o", 100, 0, {{60}, {40, true}}, owner);
  prepared.read.checksum = false;
  std::mt19937_64 random(2);
  receive(prepared.read, object, random, false);
  CHECK(prepared.holds(object));
  CHECK(prepared.read.crc == 0);
  CHECK(prepared.read.checksum_time.count() == 0);
}

}  // namespace
}  // namespace rdmaload
