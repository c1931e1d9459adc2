// What the contract does not say about files.
#include "transport/file_transport.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <deque>
#include <filesystem>

#include "support/reads.h"
#include "support/temp_dir.h"

namespace rdmaload {
namespace {

using testing::RecordingOwner;
using testing::TempDir;
using testing::TestRead;

size_t open_descriptors() {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    (void)entry;
    ++count;
  }
  return count;
}

TEST_CASE("far more files than descriptors are read, with a bounded number open") {
  constexpr int kFiles = 300;
  TempDir directory;
  std::deque<TestRead> reads;
  RecordingOwner owner;
  for (int i = 0; i < kFiles; ++i) {
    directory.write(std::to_string(i), testing::random_bytes(200, static_cast<uint64_t>(i)));
    reads.emplace_back(std::to_string(i), 200, owner);
  }
  const size_t before = open_descriptors();
  FileTransport transport(directory.path().string(), 2);
  for (auto& prepared : reads) transport.submit(prepared.read);
  REQUIRE(owner.wait_for(kFiles));
  CHECK(open_descriptors() - before <= 64 + 2);
  for (int i = 0; i < kFiles; ++i) {
    auto& prepared = reads[static_cast<size_t>(i)];
    CHECK(owner.status_of(prepared.read).ok());
    CHECK(prepared.holds(testing::random_bytes(200, static_cast<uint64_t>(i))));
  }
}

TEST_CASE("a file that was truncated after the plan was made is kIntegrity and says where it ends") {
  TempDir directory;
  directory.write("f", testing::random_bytes(10000, 1));
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), 1);
  TestRead whole("f", 10000, owner), again("f", 10000, owner);
  transport.submit(whole.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.status_of(whole.read).ok());
  std::filesystem::resize_file(directory.path() / "f", 4321);
  transport.submit(again.read);
  REQUIRE(owner.wait_for(2));
  const Status status = owner.status_of(again.read);
  CHECK(status.code() == ErrorCode::kIntegrity);
  CHECK(status.message().find("4321") != std::string::npos);
  CHECK(status.message().find("/f'") != std::string::npos);
}

TEST_CASE("links are followed, and a link to nothing or a file as a directory is kNotFound") {
  TempDir directory;
  const auto bytes = testing::random_bytes(100, 2);
  directory.write("blobs/b", bytes);
  std::filesystem::create_symlink(directory.path() / "blobs/b", directory.path() / "link");
  std::filesystem::create_symlink(directory.path() / "nowhere", directory.path() / "broken");
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), 1);
  TestRead link("link", 100, owner), broken("broken", 100, owner), beneath("blobs/b/c", 100, owner);
  for (TestRead* prepared : {&link, &broken, &beneath}) transport.submit(prepared->read);
  REQUIRE(owner.wait_for(3));
  CHECK(link.holds(bytes));
  CHECK(owner.status_of(broken.read).code() == ErrorCode::kNotFound);
  CHECK(owner.status_of(beneath.read).code() == ErrorCode::kNotFound);
}

TEST_CASE("a directory in the place of a file is an error that names it") {
  TempDir directory;
  std::filesystem::create_directory(directory.path() / "d");
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), 1);
  TestRead prepared("d", 100, owner);
  transport.submit(prepared.read);
  REQUIRE(owner.wait_for(1));
  CHECK_FALSE(owner.status_of(prepared.read).ok());
  CHECK(owner.status_of(prepared.read).message().find("/d'") != std::string::npos);
}

TEST_CASE("a file that may not be read is kAuthentication") {
  if (geteuid() == 0) return;  // root may read everything
  TempDir directory;
  directory.write("f", testing::random_bytes(10, 3));
  std::filesystem::permissions(directory.path() / "f", std::filesystem::perms::none);
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), 1);
  TestRead prepared("f", 10, owner);
  transport.submit(prepared.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.status_of(prepared.read).code() == ErrorCode::kAuthentication);
}

TEST_CASE("a file that has grown since its header was read is kIntegrity") {
  TempDir directory;
  directory.write("f", testing::random_bytes(101, 1));
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), 1);
  TestRead read("f", 100, owner);
  transport.submit(read.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.status_of(read.read).code() == ErrorCode::kIntegrity);
}

TEST_CASE("a directory in a file's place is kNotFound") {
  TempDir directory;
  std::filesystem::create_directory(directory.path() / "f");
  RecordingOwner owner;
  FileTransport transport(directory.path().string(), 1);
  TestRead read("f", 1 << 20, owner);
  transport.submit(read.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.status_of(read.read).code() == ErrorCode::kNotFound);
}

}  // namespace
}  // namespace rdmaload
