// Which files are read past the page cache, that every byte arrives whatever the alignment, and what happens
// when the kernel refuses.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <filesystem>
#include <mutex>
#include <numeric>
#include <semaphore>

#include "core/crc32c.h"
#include "memory/host_arena.h"
#include "support/reads.h"
#include "support/temp_dir.h"
#include "transport/file_transport.h"

namespace rdmaload {
namespace {

using testing::pick;
using testing::random_segments;
using testing::RecordingOwner;
using testing::TempDir;
using testing::TestRead;

// A disk that is as strict as one may be, whatever the machine has: direct reads go through the page cache,
// but only when every address, length and offset is aligned.
struct StrictDisk {
  DirectAlignment alignment{512, 512};
  std::optional<double> cached = 0.0;
  int open_error = 0;
  std::atomic<int> error_after{-1};  // direct reads until one fails
  std::atomic<int> error{EINVAL};
  std::atomic<size_t> longest{SIZE_MAX};  // bytes that one call delivers
  std::atomic<int> direct_calls{0};
  std::atomic<bool> hold_next{false};  // the next direct read waits for go_on, and says so by held
  std::binary_semaphore held{0}, go_on{0};

  FileOptions options(FileIo io) {
    FileOptions options;
    options.io = io;
    options.threads = options.direct_reads = 2;
    options.smallest_direct_bytes = 1000;
    options.calls.open = [this](const char* path, int flags) {
      if ((flags & O_DIRECT) != 0 && open_error != 0) {
        errno = open_error;
        return -1;
      }
      return ::open(path, flags & ~O_DIRECT);
    };
    options.calls.direct_alignment = [this](int) -> std::optional<DirectAlignment> {
      if (alignment.offset == 0) return std::nullopt;
      return alignment;
    };
    options.calls.cached_fraction = [this](int, uint64_t) { return cached; };
    options.calls.preadv_direct = [this](int fd, const iovec* vectors, int count, off_t offset) -> ssize_t {
      ++direct_calls;
      if (hold_next.exchange(false)) {
        held.release();
        if (!go_on.try_acquire_for(testing::kSoon)) return errno = EIO, -1;
      }
      bool aligned = static_cast<uint64_t>(offset) % alignment.offset == 0;
      for (int i = 0; i < count; ++i) {
        aligned &= reinterpret_cast<uintptr_t>(vectors[i].iov_base) % alignment.memory == 0;
        aligned &= vectors[i].iov_len % alignment.offset == 0;
      }
      if (!aligned || error_after-- == 0) {
        errno = aligned ? error.load() : EINVAL;
        return -1;
      }
      // In one call into memory of its own, so that a short read ends anywhere.
      std::vector<std::byte> bytes(std::min(longest.load(), total(vectors, count)));
      const ssize_t got = ::pread(fd, bytes.data(), bytes.size(), offset);
      size_t at = 0;
      for (int i = 0; i < count && got > 0 && at < static_cast<size_t>(got); ++i) {
        const size_t size = std::min(vectors[i].iov_len, static_cast<size_t>(got) - at);
        std::memcpy(vectors[i].iov_base, bytes.data() + at, size);
        at += size;
      }
      return got;
    };
    return options;
  }

 private:
  static size_t total(const iovec* vectors, int count) {
    return std::accumulate(vectors, vectors + count, size_t{0},
                           [](size_t sum, const iovec& vector) { return sum + vector.iov_len; });
  }
};

Status read_all(FileTransport& transport, TestRead& prepared, RecordingOwner& owner) {
  const size_t before = owner.count();
  transport.submit(prepared.read);
  REQUIRE(owner.wait_for(before + 1));
  return owner.status_of(prepared.read);
}

TEST_CASE("direct reads deliver random ranges into random places on disks of every alignment") {
  const auto bytes = testing::random_bytes(3'000'123, 1);
  TempDir directory;
  directory.write("f", bytes);
  std::mt19937_64 random(2);
  for (const DirectAlignment alignment : {DirectAlignment{4, 512}, {8, 4096}, {512, 512}, {4096, 4096}}) {
    CAPTURE(alignment.memory);
    CAPTURE(alignment.offset);
    StrictDisk disk;
    disk.alignment = alignment;
    RecordingOwner owner;
    std::deque<TestRead> reads;
    for (int i = 0; i < 40; ++i) {
      const uint64_t length = pick(random, 1, i % 2 == 0 ? bytes.size() : 5000);
      const uint64_t offset = i % 5 == 0 ? bytes.size() - length : pick(random, 0, bytes.size() - length);
      auto& prepared = reads.emplace_back("f", bytes.size(), offset, random_segments(random, length), owner);
      prepared.read.checksum = i % 3 == 0;
    }
    FileTransport transport(directory.path().string(), disk.options(FileIo::kDirect));
    for (auto& prepared : reads) transport.submit(prepared.read);
    REQUIRE(owner.wait_for(reads.size()));
    for (const auto& prepared : reads) {
      CAPTURE(owner.status_of(prepared.read).message());
      REQUIRE(owner.status_of(prepared.read).ok());
      CHECK(prepared.holds(bytes));
      const auto range = std::span(bytes).subspan(prepared.read.offset, prepared.read.length);
      if (prepared.read.checksum) CHECK(prepared.read.crc == crc32c(0, range));
    }
    CHECK(transport.path() == "file-direct");
    CHECK(transport.fallback_reason().empty());
  }
}

TEST_CASE("only the edges of a range are copied where its place fits the disk, and all of it where not") {
  constexpr size_t kBytes = 3 << 20;
  const auto bytes = testing::random_bytes(kBytes, 3);
  TempDir directory;
  directory.write("f", bytes);
  StrictDisk disk;
  RecordingOwner owner;
  HostArena arena(kBytes + 4096);
  FileTransport transport(directory.path().string(), disk.options(FileIo::kDirect));
  for (const size_t shift : {0, 64}) {
    Read read;
    read.object = "f";
    read.object_bytes = kBytes;
    read.offset = 1000;
    read.length = kBytes - 3000;
    read.owner = &owner;
    std::byte* const place = arena.data() + read.offset + shift;
    read.segments = {{place, read.length}};
    transport.submit(read);
    REQUIRE(owner.wait_for(shift == 0 ? 1 : 2));
    REQUIRE(owner.status_of(read).ok());
    CHECK(std::equal(place, place + read.length, bytes.begin() + 1000));
    CHECK(read.copied_bytes == (shift == 0 ? 24 + 48 : read.length));
  }
}

TEST_CASE("short direct reads that end anywhere are continued") {
  const auto bytes = testing::random_bytes(100'001, 4);
  TempDir directory;
  directory.write("f", bytes);
  StrictDisk disk;
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), disk.options(FileIo::kDirect));
  for (const size_t longest : {4096, 1000, 513}) {
    disk.longest = longest;
    TestRead prepared("f", bytes.size(), owner);
    REQUIRE(read_all(transport, prepared, owner).ok());
    CHECK(prepared.holds(bytes));
  }
  CHECK(transport.path() == "file-direct");
}

TEST_CASE("a file that shrinks or grows under direct reads is kIntegrity") {
  TempDir directory;
  directory.write("f", testing::random_bytes(10000, 5));
  StrictDisk disk;
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), disk.options(FileIo::kDirect));
  TestRead whole("f", 10000, owner), again("f", 10000, owner), at_end("f", 10000, 9000, {{500}}, owner);
  REQUIRE(read_all(transport, whole, owner).ok());
  for (const size_t left : {4321, 4096, 0}) {
    std::filesystem::resize_file(directory.path() / "f", left);
    const Status status = read_all(transport, again, owner);
    CHECK(status.code() == ErrorCode::kIntegrity);
    CHECK(status.message().find("has " + std::to_string(left) + " bytes") != std::string::npos);
    CHECK(read_all(transport, at_end, owner).code() == ErrorCode::kIntegrity);
  }
  std::filesystem::resize_file(directory.path() / "f", 10001);
  CHECK(read_all(transport, again, owner).code() == ErrorCode::kIntegrity);
}

TEST_CASE("a hole in a file reads as zeros, directly too") {
  TempDir directory;
  std::vector<std::byte> bytes(1 << 20);
  directory.write("f", {});
  std::filesystem::resize_file(directory.path() / "f", bytes.size());
  RecordingOwner owner;
  FileOptions options;
  options.io = FileIo::kDirect;
  FileTransport transport(directory.path().string(), options);
  TestRead prepared("f", bytes.size(), owner);
  REQUIRE(read_all(transport, prepared, owner).ok());
  CHECK(prepared.holds(bytes));
}

TEST_CASE(
    "automatic reading goes past the page cache only for large cold files of a file system that can tell") {
  struct Case {
    std::optional<double> cached;
    size_t bytes;
    const char* path;
  };
  for (const Case& expected : {Case{0.0, 5000, "file-direct"}, Case{0.125, 5000, "file-direct"},
                               Case{0.2, 5000, "file-buffered"}, Case{1.0, 5000, "file-buffered"},
                               Case{std::nullopt, 5000, "file-buffered"}, Case{0.0, 999, "file-buffered"}}) {
    TempDir directory;
    const auto bytes = testing::random_bytes(expected.bytes, 6);
    directory.write("f", bytes);
    StrictDisk disk;
    RecordingOwner owner;
    FileOptions options = disk.options(FileIo::kAuto);
    // Sampling leaves a file without readahead, which it needs as soon as it is read through the cache.
    bool reads_ahead = true;
    options.calls.cached_fraction = [&](int, uint64_t) {
      reads_ahead = false;
      return expected.cached;
    };
    options.calls.advise_sequential = [&](int) { reads_ahead = true; };
    FileTransport transport(directory.path().string(), std::move(options));
    TestRead prepared("f", bytes.size(), owner);
    REQUIRE(read_all(transport, prepared, owner).ok());
    CHECK(reads_ahead);
    CHECK(prepared.holds(bytes));
    CHECK(std::string(transport.path()) == expected.path);
    CHECK(transport.fallback_reason().empty());  // a choice is not a fallback
  }
}

TEST_CASE("what is bounced is read in pieces of one huge page, which lies together in physical memory") {
  constexpr size_t kHugePage = 2 << 20;
  TempDir directory;
  const auto bytes = testing::random_bytes(3 * kHugePage + 700, 7);
  directory.write("f", bytes);
  StrictDisk disk;
  RecordingOwner owner;
  std::mutex mutex;
  std::vector<iovec> pieces;
  FileOptions options = disk.options(FileIo::kDirect);
  options.calls.preadv_direct = [&, read = options.calls.preadv_direct](int fd, const iovec* vectors,
                                                                        int count, off_t offset) {
    const std::lock_guard lock(mutex);
    pieces.insert(pieces.end(), vectors, vectors + count);
    return read(fd, vectors, count, offset);
  };
  FileTransport transport(directory.path().string(), std::move(options));
  HostArena memory(bytes.size() + 64);
  TestRead prepared("f", bytes.size(), owner);
  std::byte* const place = memory.data() + 64;  // no place for this disk
  prepared.read.segments = {{place, bytes.size()}};
  REQUIRE(read_all(transport, prepared, owner).ok());
  CHECK(std::equal(bytes.begin(), bytes.end(), place));
  CHECK(prepared.read.copied_bytes == bytes.size());
  REQUIRE(pieces.size() == 4);
  for (const iovec& piece : pieces) {
    CHECK(reinterpret_cast<uintptr_t>(piece.iov_base) % kHugePage == 0);
    CHECK(piece.iov_len <= kHugePage);
  }
}

TEST_CASE("files are chosen for one by one, and the path names both ways") {
  TempDir directory;
  const auto large = testing::random_bytes(5000, 7), small = testing::random_bytes(500, 8);
  directory.write("large", large);
  directory.write("small", small);
  StrictDisk disk;
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), disk.options(FileIo::kAuto));
  CHECK(transport.path() == "file-buffered");
  TestRead first("large", 5000, owner), second("small", 500, owner);
  REQUIRE(read_all(transport, first, owner).ok());
  CHECK(transport.path() == "file-direct");
  REQUIRE(read_all(transport, second, owner).ok());
  CHECK(transport.path() == "file-buffered+file-direct");
  CHECK(first.holds(large));
  CHECK(second.holds(small));
}

TEST_CASE("a refusal of direct reads ends in buffered ones, with the reason") {
  struct Case {
    int open_error;
    uint32_t block;
    int error_after;
    const char* reason;
    const char* path;
  };
  for (const Case& refused : {Case{EINVAL, 512, -1, "Invalid argument", "file-buffered"},
                              Case{EPERM, 512, -1, "not permitted", "file-buffered"},
                              Case{0, 0, -1, "no direct reads", "file-buffered"},
                              Case{0, 3, -1, "no direct reads", "file-buffered"},
                              Case{0, 1 << 20, -1, "no direct reads", "file-buffered"},
                              Case{0, 512, 0, "Invalid argument", "file-buffered"},
                              Case{0, 512, 1, "Invalid argument", "file-buffered+file-direct"}}) {
    CAPTURE(refused.reason);
    TempDir directory;
    const auto bytes = testing::random_bytes(2'500'000, 9);
    directory.write("f", bytes);
    StrictDisk disk;
    disk.open_error = refused.open_error;
    disk.alignment.offset = refused.block;
    disk.error_after = refused.error_after;
    RecordingOwner owner;
    FileTransport transport(directory.path().string(), disk.options(FileIo::kDirect));
    TestRead prepared("f", bytes.size(), owner);
    REQUIRE(read_all(transport, prepared, owner).ok());
    CHECK(prepared.holds(bytes));
    CHECK(prepared.read.crc == crc32c(0, bytes));
    CHECK(std::string(transport.path()) == refused.path);
    CHECK(transport.fallback_reason().find(refused.reason) != std::string::npos);
    CHECK(transport.fallback_reason().find("/f'") != std::string::npos);
  }
}

TEST_CASE("an interrupted direct read goes on, and a failed one is an error that names the file") {
  TempDir directory;
  const auto bytes = testing::random_bytes(5000, 10);
  directory.write("f", bytes);
  StrictDisk disk;
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), disk.options(FileIo::kDirect));
  TestRead fine("f", 5000, owner), broken("f", 5000, owner);
  disk.error = EINTR;
  disk.error_after = 0;
  REQUIRE(read_all(transport, fine, owner).ok());
  CHECK(fine.holds(bytes));
  disk.error = EIO;
  disk.error_after = 0;
  const Status status = read_all(transport, broken, owner);
  CHECK(status.code() == ErrorCode::kUnavailable);
  CHECK(status.message().find("/f'") != std::string::npos);
  CHECK(transport.path() == "file-direct");
}

TEST_CASE("as soon as a second reader comes, both read through the page cache") {
  TempDir directory;
  const auto bytes = testing::random_bytes(5000, 11);
  directory.write("f", bytes);
  StrictDisk disk;
  RecordingOwner owner;
  FileTransport first(directory.path().string(), disk.options(FileIo::kAuto));
  TestRead alone("f", 5000, owner), beside("f", 5000, owner), after("f", 5000, owner);
  REQUIRE(read_all(first, alone, owner).ok());
  CHECK(first.path() == "file-direct");
  CHECK(first.fallback_reason().empty());
  const int before = disk.direct_calls;
  {
    FileTransport second(directory.path().string(), disk.options(FileIo::kAuto));
    REQUIRE(read_all(second, beside, owner).ok());
    CHECK(second.path() == "file-buffered");
    CHECK(second.fallback_reason().find("another reader") != std::string::npos);
    REQUIRE(read_all(first, after, owner).ok());
  }
  CHECK(disk.direct_calls == before);
  CHECK(first.path() == "file-buffered+file-direct");
  CHECK(first.fallback_reason().find("another reader") != std::string::npos);
  for (const TestRead* read : {&alone, &beside, &after}) CHECK(read->holds(bytes));
  // Who asks for direct reads gets them, whoever else reads.
  FileTransport forced(directory.path().string(), disk.options(FileIo::kDirect));
  TestRead asked("f", 5000, owner);
  REQUIRE(read_all(forced, asked, owner).ok());
  CHECK(forced.path() == "file-direct");
}

TEST_CASE("files that were closed to make room are no readers of their own") {
  constexpr int kFiles = 150;
  TempDir directory;
  StrictDisk disk;
  RecordingOwner owner;
  std::deque<TestRead> reads;
  const auto bytes = testing::random_bytes(5000, 12);
  for (int i = 0; i < kFiles; ++i) directory.write(std::to_string(i), bytes);
  for (int i = 0; i < 2 * kFiles; ++i) reads.emplace_back(std::to_string(i % kFiles), 5000, owner);
  FileTransport transport(directory.path().string(), disk.options(FileIo::kAuto));
  TestRead slow("0", 5000, owner);
  disk.hold_next = true;
  transport.submit(slow.read);
  REQUIRE(disk.held.try_acquire_for(testing::kSoon));  // in use while all others come and go
  for (auto& prepared : reads) transport.submit(prepared.read);
  REQUIRE(owner.wait_for(reads.size()));
  disk.go_on.release();
  REQUIRE(owner.wait_for(reads.size() + 1));
  for (auto& prepared : reads) CHECK(prepared.holds(bytes));
  CHECK(slow.holds(bytes));
  CHECK(transport.path() == "file-direct");
  CHECK(transport.fallback_reason().empty());
}

TEST_CASE("the page cache is sampled: a file that was just read is warm") {
  TempDir directory;
  directory.write("f", testing::random_bytes(1 << 20, 13));
  const int fd = ::open((directory.path() / "f").c_str(), O_RDONLY | O_CLOEXEC);
  REQUIRE(fd >= 0);
  std::array<char, 4096> page;
  while (::read(fd, page.data(), page.size()) > 0) {
  }
  // nullopt: a file system that cannot say, such as tmpfs.
  CHECK(FileCalls::of_the_system().cached_fraction(fd, 1 << 20).value_or(1.0) == 1.0);
  CHECK_FALSE(FileCalls::of_the_system().cached_fraction(fd, 0).has_value());
  ::close(fd);
}

TEST_CASE("names of the ways to read files") {
  CHECK(parse_file_io("auto") == FileIo::kAuto);
  CHECK(parse_file_io("buffered") == FileIo::kBuffered);
  CHECK(parse_file_io("direct") == FileIo::kDirect);
  CHECK_THROWS_AS(parse_file_io("mmap"), Error);
}

}  // namespace
}  // namespace rdmaload
