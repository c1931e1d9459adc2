#include "transport/file_transport.h"

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "memory/host_arena.h"
#include "transport/direct_read.h"
#include "transport/segment_cursor.h"

namespace rdmaload {
namespace {

// Pieces that are checksummed stay in the second-level cache; others are bounded so that cancelling is
// prompt.
constexpr size_t kChecksumPieceBytes = 256 << 10;
constexpr size_t kPieceBytes = 4 << 20;
constexpr size_t kScratchBytes = 256 << 10;

// As SegmentCursor::next and advance, through the page cache. The same results as read_direct_piece.
ssize_t read_buffered_piece(const OpenFile& file, uint64_t offset, bool checksum, SegmentCursor& cursor) {
  thread_local HostArena scratch(kScratchBytes);
  std::array<iovec, 256> vectors;
  const size_t count = cursor.next(vectors, checksum ? kChecksumPieceBytes : kPieceBytes, scratch.span());
  const ssize_t got = preadv(file.fd(), vectors.data(), static_cast<int>(count), static_cast<off_t>(offset));
  if (got < 0) return -errno;
  cursor.advance({vectors.data(), count}, static_cast<size_t>(got));
  return got;
}

}  // namespace

// Not a transport that anybody else sees: a second set of workers with their queue.
class FileTransport::DirectWorkers final : public ThreadedTransport {
 public:
  DirectWorkers(FileTransport& owner, int threads) : ThreadedTransport(threads), owner_(owner) { start(); }
  ~DirectWorkers() override { stop(); }
  std::string_view path() const noexcept override { return "file-direct"; }

 private:
  std::optional<Status> perform(Read& read) override { return owner_.read_file(read); }
  FileTransport& owner_;
};

FileTransport::FileTransport(std::string root, FileOptions options)
    : ThreadedTransport(options.threads), files_(std::move(root), std::move(options)) {
  start();
}

FileTransport::~FileTransport() {
  stop();  // from here on nothing is handed on
  direct_workers_.reset();
}

FileTransport::DirectWorkers& FileTransport::direct_workers() {
  std::lock_guard lock(mutex_);
  if (!direct_workers_)
    direct_workers_ = std::make_unique<DirectWorkers>(*this, files_.options().direct_reads);
  return *direct_workers_;
}

void FileTransport::cancel(const ReadOwner& owner) {
  ThreadedTransport::cancel(owner);
  DirectWorkers* direct = nullptr;
  {
    std::lock_guard lock(mutex_);
    direct = direct_workers_.get();
  }
  if (direct != nullptr) direct->cancel(owner);
}

std::string_view FileTransport::path() const noexcept {
  if (!used_direct_) return "file-buffered";
  return used_buffered_ ? "file-buffered+file-direct" : "file-direct";
}

int FileTransport::connections() const noexcept {
  return used_direct_ ? files_.options().direct_reads : ThreadedTransport::connections();
}

std::optional<Status> FileTransport::perform(Read& read) {
  if (files_.get(read.object)->reads_directly()) {
    direct_workers().submit(read, Clock::time_point::min());
    return std::nullopt;
  }
  return read_file(read);
}

Status FileTransport::read_file(Read& read) {
  const auto file = files_.get(read.object);
  if (Status grown = file->grown(read.object_bytes); !grown.ok())
    return grown;                            // a shorter one shows at its end
  read.times.first_byte = read.times.taken;  // a blocking read is the transfer
  SegmentCursor cursor(read);
  while (cursor.left() > 0) {
    if (read.owner->cancelled()) return Status(ErrorCode::kCancelled, "the read was cancelled");
    const uint64_t offset = read.offset + (read.length - cursor.left());
    const bool direct = file->reads_directly();
    ssize_t got = 0;
    if (direct) {
      thread_local HostArena bounce(kDirectPieceBytes);
      got = read_direct_piece(files_.options().calls, *file, offset, cursor, bounce.span());
    } else {
      got = read_buffered_piece(*file, offset, read.checksum, cursor);
    }
    if (got > 0) {
      (direct ? used_direct_ : used_buffered_) = true;
    } else if (got == 0) {
      return file->truncated(offset, read.object_bytes);
    } else if (direct && (got == -EINVAL || got == -EOPNOTSUPP)) {
      file->refuse_direct("a direct read of '" + file->path() +
                          "' was refused: " + std::strerror(static_cast<int>(-got)));
    } else if (got != -EINTR) {
      return file_call_failed("reading", file->path(), static_cast<int>(-got));
    }
  }
  return Status();
}

}  // namespace rdmaload
