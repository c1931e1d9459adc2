// The cache on disk: what is read once comes from there, with the right bytes whatever happens meanwhile.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>

#include "core/crc32c.h"
#include "support/fake_transport.h"
#include "support/reads.h"
#include "support/temp_dir.h"
#include "transport/cache/caching_transport.h"

namespace rdmaload {
namespace {

using testing::AnsweringTransport;
using testing::deliver;
using testing::ManualTransport;
using testing::pick;
using testing::random_bytes;
using testing::random_segments;
using testing::RecordingOwner;
using testing::TempDir;
using testing::TestRead;

constexpr uint64_t kBlockBytes = 1000;
const std::string kObject = "model.safetensors";

CacheEntry entry_of(uint64_t bytes, char digit = 'a') {
  return {std::string(64, digit), "some model", bytes, kBlockBytes};
}

CacheOptions options_of(const TempDir& directory, const std::vector<std::byte>& bytes) {
  CacheOptions options;
  options.directory = (directory.path() / "cache").string();
  options.block_bytes = kBlockBytes;
  options.files.push_back({kObject, bytes.size(), 0, entry_of(bytes.size())});
  return options;
}

uint64_t blocks_of(const std::vector<std::byte>& bytes) {
  return (bytes.size() + kBlockBytes - 1) / kBlockBytes;
}

std::unique_ptr<TestRead> read_of_block(const std::vector<std::byte>& bytes, uint64_t block,
                                        std::mt19937_64& random, RecordingOwner& owner) {
  const uint64_t offset = block * kBlockBytes, length = std::min(kBlockBytes, bytes.size() - offset);
  return std::make_unique<TestRead>(kObject, bytes.size(), offset, random_segments(random, length), owner);
}

// A source that delivers `bytes` and counts how often each block was asked for.
struct Source {
  explicit Source(const std::vector<std::byte>& content) : bytes(content), asked(blocks_of(content)) {}
  std::shared_ptr<Transport> open(int threads) {
    return std::make_shared<AnsweringTransport>(threads, [this](Read& read) {
      ++asked[read.offset / kBlockBytes];
      deliver(read, bytes);
      return Status();
    });
  }
  const std::vector<std::byte>& bytes;
  std::deque<std::atomic<int>> asked;
};

}  // namespace

TEST_CASE("blocks come from the source once and then from the disk, wherever their bytes go") {
  std::mt19937_64 random(1);
  const auto bytes = random_bytes(12 * kBlockBytes + 345, 1);
  const TempDir directory;
  Source source(bytes);
  for (int round = 0; round < 3; ++round) {
    RecordingOwner owner;
    std::vector<std::unique_ptr<TestRead>> reads;
    for (uint64_t block = 0; block < blocks_of(bytes); ++block)
      reads.push_back(read_of_block(bytes, block, random, owner));
    CachingTransport transport(source.open(2), options_of(directory, bytes));
    for (auto& read : reads) transport.submit(read->read);
    REQUIRE(owner.wait_for(reads.size()));
    for (auto& read : reads) {
      CHECK(owner.status_of(read->read).ok());
      CHECK(read->holds(bytes));
      CHECK(read->read.crc == crc32c(0, std::span(bytes).subspan(read->read.offset, read->read.length)));
      CHECK(read->read.cached_bytes == (round > 0 ? read->read.length : 0));
    }
    CHECK(transport.path() == (round > 0 ? "cache-file-buffered" : "answering"));
    CHECK(transport.fallback_reason() == "");
  }
  for (const auto& times : source.asked) CHECK(times == 1);
}

TEST_CASE("readers at the same time share each block, in one transport and in two") {
  std::mt19937_64 random(2);
  const auto bytes = random_bytes(40 * kBlockBytes, 2);
  const TempDir directory;
  Source source(bytes);
  RecordingOwner owner;
  std::vector<std::unique_ptr<TestRead>> reads;
  {
    CachingTransport first(source.open(3), options_of(directory, bytes));
    CachingTransport second(source.open(3), options_of(directory, bytes));
    for (uint64_t block = 0; block < blocks_of(bytes); ++block) {
      for (CachingTransport* transport : {&first, &second, &first}) {
        reads.push_back(read_of_block(bytes, block, random, owner));
        transport->submit(reads.back()->read);
      }
    }
    REQUIRE(owner.wait_for(reads.size()));
  }
  REQUIRE(owner.count() == reads.size());
  for (auto& read : reads) CHECK(read->holds(bytes));
  for (const auto& times : source.asked) CHECK(times == 1);
}

TEST_CASE("a block that somebody else keeps locked is waited for, for a while, and can be cancelled") {
  std::mt19937_64 random(3);
  const auto bytes = random_bytes(kBlockBytes, 3);
  const TempDir directory;
  Source source(bytes);
  auto options = options_of(directory, bytes);
  const auto held = CacheDirectory(options.directory, std::nullopt).open(entry_of(bytes.size()));
  REQUIRE(held->try_lock(0));
  RecordingOwner owner;
  auto read = read_of_block(bytes, 0, random, owner);
  {
    CachingTransport transport(source.open(1), options);
    transport.submit(read->read);
    transport.cancel(owner);
    REQUIRE(owner.wait_for(1));
    CHECK(owner.status_of(read->read).code() == ErrorCode::kCancelled);
    transport.submit(read->read);
  }
  REQUIRE(owner.count() == 2);  // destroying completes, too
  CHECK(source.asked[0] == 0);
  options.patience = std::chrono::milliseconds(20);
  CachingTransport transport(source.open(1), options);
  transport.submit(read->read);
  REQUIRE(owner.wait_for(3));
  CHECK(owner.status_of(read->read).ok());
  CHECK(read->holds(bytes));
  CHECK_FALSE(held->stored(0));
}

TEST_CASE("destroying a cache completes what its source has in hand") {
  std::mt19937_64 random(4);
  const auto bytes = random_bytes(3 * kBlockBytes, 4);
  const TempDir directory;
  RecordingOwner owner;
  std::vector<std::unique_ptr<TestRead>> reads;
  const auto source = std::make_shared<ManualTransport>();
  {
    CachingTransport transport(source, options_of(directory, bytes));
    for (uint64_t block = 0; block < 3; ++block) {
      reads.push_back(read_of_block(bytes, block, random, owner));
      transport.submit(reads.back()->read);
    }
    Read* first = source->take();
    deliver(*first, bytes);
    testing::finish(first);
    REQUIRE(owner.wait_for(1));
  }
  REQUIRE(owner.count() == 3);
  const auto file =
      CacheDirectory(options_of(directory, bytes).directory, std::nullopt).open(entry_of(bytes.size()));
  CHECK(file->stored(0));
  CHECK_FALSE(file->stored(1));
  CHECK(file->try_lock(1));  // whoever held it is gone
}

TEST_CASE("a failed read is handed back with what arrived, and its block is free") {
  std::mt19937_64 random(5);
  const auto bytes = random_bytes(kBlockBytes, 5);
  const TempDir directory;
  RecordingOwner owner;
  TestRead read(kObject, bytes.size(), owner);
  const auto source = std::make_shared<ManualTransport>();
  CachingTransport transport(source, options_of(directory, bytes));
  transport.submit(read.read);
  Read* attempt = source->take();
  REQUIRE(attempt != nullptr);
  CHECK(attempt->received == 0);
  std::copy_n(bytes.begin(), 400, attempt->segments[0].data);
  attempt->received = 400;
  attempt->crc = crc32c(0, std::span(bytes).first(400));
  testing::finish(attempt, Status(ErrorCode::kUnavailable, "reset"));
  REQUIRE(owner.wait_for(1));
  CHECK(read.read.received == 400);
  transport.submit(read.read);
  attempt = source->take();
  REQUIRE(attempt != nullptr);
  CHECK(attempt->received == 400);
  CHECK(attempt->crc == crc32c(0, std::span(bytes).first(400)));
  deliver(*attempt, bytes);
  testing::finish(attempt);
  REQUIRE(owner.wait_for(2));
  CHECK(owner.status_of(read.read).ok());
  CHECK(read.holds(bytes));
}

TEST_CASE("bytes that are not what the store says are delivered and not kept") {
  std::mt19937_64 random(6);
  const auto bytes = random_bytes(2 * kBlockBytes, 6);
  const TempDir directory;
  auto options = options_of(directory, bytes);
  options.crcs = {crc32c(0, std::span(bytes).first(kBlockBytes)), 12345};
  Source source(bytes);
  RecordingOwner owner;
  std::vector<std::unique_ptr<TestRead>> reads;
  {
    CachingTransport transport(source.open(1), options);
    for (uint64_t block = 0; block < 2; ++block) {
      reads.push_back(read_of_block(bytes, block, random, owner));
      transport.submit(reads.back()->read);
    }
    REQUIRE(owner.wait_for(2));
  }
  const auto file = CacheDirectory(options.directory, std::nullopt).open(entry_of(bytes.size()));
  CHECK(file->stored(0) == options.crcs[0]);
  CHECK_FALSE(file->stored(1));
}

TEST_CASE("bytes that changed on the disk are read again from the source, whose checksums nobody knows") {
  std::mt19937_64 random(7);
  const auto bytes = random_bytes(3 * kBlockBytes, 7);
  const TempDir directory;
  const auto options = options_of(directory, bytes);
  Source source(bytes);
  for (int round = 0; round < 3; ++round) {
    RecordingOwner owner;
    std::vector<std::unique_ptr<TestRead>> reads;
    CachingTransport transport(source.open(1), options);
    for (uint64_t block = 0; block < 3; ++block) {
      reads.push_back(read_of_block(bytes, block, random, owner));
      transport.submit(reads.back()->read);
    }
    REQUIRE(owner.wait_for(3));
    for (auto& read : reads) {
      CHECK(owner.status_of(read->read).ok());
      CHECK(read->holds(bytes));
    }
    CHECK(transport.fallback_reason().empty() == (round != 1));
    CHECK(source.asked[1] == (round == 0 ? 1 : 2));
    if (round == 0) {
      std::fstream file(options.directory + "/" + options.files[0].entry.name,
                        std::ios::in | std::ios::out | std::ios::binary);
      file.seekp(kBlockBytes + 17);
      file.put(static_cast<char>(~static_cast<int>(bytes[kBlockBytes + 17])));
    }
  }
  CHECK(source.asked[0] == 1);
}

TEST_CASE("the directory keeps its limit, and files that are open") {
  const TempDir directory;
  const std::string path = (directory.path() / "cache").string();
  CacheDirectory cache(path, 40000);  // two of the files below, with their tables
  const auto first = cache.open(entry_of(10000, 'a'));
  REQUIRE(first);
  REQUIRE(cache.open(entry_of(10000, 'b')));  // closed again at once
  CHECK(std::filesystem::exists(path + "/" + std::string(64, 'b')));
  CHECK_FALSE(cache.open(entry_of(40000, 'c')));
  CHECK(std::filesystem::exists(path + "/" + std::string(64, 'b')));  // nothing went for what never fits
  CHECK(cache.open(entry_of(11000, 'd')));
  CHECK_FALSE(std::filesystem::exists(path + "/" + std::string(64, 'b')));
  CHECK(std::filesystem::exists(path + "/" + std::string(64, 'a')));
}

}  // namespace rdmaload
