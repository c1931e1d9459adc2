#include "transport/file_transport.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "memory/host_arena.h"
#include "transport/segment_cursor.h"

namespace rdmaload {
namespace {

// Pieces that are checksummed stay in the second-level cache; others are bounded so that cancelling is
// prompt.
constexpr size_t kChecksumPieceBytes = 256 << 10;
constexpr size_t kPieceBytes = 4 << 20;
constexpr size_t kScratchBytes = 256 << 10;
constexpr size_t kMaxOpenFiles = 64;  // a model may have more files than the usual limit of 1024 descriptors

Status failed(const std::string& what, const std::string& path, int error) {
  const bool no_such_file = error == ENOENT || error == ENOTDIR || error == EISDIR || error == ELOOP;
  const ErrorCode code = no_such_file || error == ENAMETOOLONG ? ErrorCode::kNotFound
                         : error == EACCES || error == EPERM   ? ErrorCode::kAuthentication
                                                               : ErrorCode::kUnavailable;
  return Status(code, what + " '" + path + "' failed: " + std::strerror(error));
}

}  // namespace

class FileTransport::Descriptor {
 public:
  explicit Descriptor(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) {
      const Status status = failed("opening", path, errno);
      throw Error(status.code(), status.message());
    }
    posix_fadvise(fd_, 0, 0, POSIX_FADV_SEQUENTIAL);  // a hint: twice the readahead
  }
  ~Descriptor() { ::close(fd_); }

  uint64_t bytes() const {
    struct stat status{};
    return fstat(fd_, &status) == 0 ? static_cast<uint64_t>(status.st_size) : 0;
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int fd() const noexcept { return fd_; }

 private:
  int fd_;
};

FileTransport::FileTransport(std::string root, int threads)
    : ThreadedTransport(threads), root_(std::move(root)) {
  start();
}

std::shared_ptr<const FileTransport::Descriptor> FileTransport::open(const std::string& object) {
  std::lock_guard lock(mutex_);
  if (const auto found = open_.find(object); found != open_.end()) return found->second;
  auto descriptor = std::make_shared<const Descriptor>(root_ + "/" + object);
  // Those in use stay open through their shares; reads go file by file, so the others are mostly done with.
  if (open_.size() >= kMaxOpenFiles) open_.clear();
  open_.emplace(object, descriptor);
  return descriptor;
}

Status FileTransport::perform(Read& read) {
  thread_local HostArena scratch(kScratchBytes);
  const auto descriptor = open(read.object);
  if (const uint64_t bytes = descriptor->bytes();
      bytes > read.object_bytes) {  // a shorter one shows when it ends
    return Status(ErrorCode::kIntegrity, "file '" + root_ + "/" + read.object + "' has " +
                                             std::to_string(bytes) + " bytes, expected " +
                                             std::to_string(read.object_bytes) +
                                             ": it was changed after its header was read");
  }
  SegmentCursor cursor(read);
  const size_t piece = read.checksum ? kChecksumPieceBytes : kPieceBytes;
  std::array<iovec, 256> vectors;
  uint64_t offset = read.offset;
  while (cursor.left() > 0) {
    if (read.owner->cancelled()) return Status(ErrorCode::kCancelled, "the read was cancelled");
    const size_t count = cursor.next(vectors, piece, scratch.span());
    const ssize_t got =
        preadv(descriptor->fd(), vectors.data(), static_cast<int>(count), static_cast<off_t>(offset));
    if (got < 0) {
      if (errno == EINTR) continue;
      return failed("reading", root_ + "/" + read.object, errno);
    }
    if (got == 0) {
      return Status(ErrorCode::kIntegrity, "file '" + root_ + "/" + read.object + "' ends at byte " +
                                               std::to_string(offset) + ", expected " +
                                               std::to_string(read.object_bytes) +
                                               " bytes: it was truncated after it was opened");
    }
    cursor.advance({vectors.data(), count}, static_cast<size_t>(got));
    offset += static_cast<uint64_t>(got);
  }
  return Status();
}

}  // namespace rdmaload
