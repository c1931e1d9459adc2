// A model's file as the file transport holds it open, and the choice of how it is read: through the page
// cache, or past it (O_DIRECT).
//
// Reading past the cache pays only where the disk has to be read anyway and nobody else wants the same
// bytes. FileIo::kAuto therefore chooses it for a large file of a local file system that sampling finds to be
// cold, as long as this is the only reader; everything else is read through the cache. What was given up, and
// why, is data (direct_refusal). Any thread may call; an OpenFile owns its descriptors.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "core/error.h"

namespace rdmaload {

enum class FileIo { kAuto, kBuffered, kDirect };

// "auto", "buffered" or "direct"; throws kInvalid for any other.
FileIo parse_file_io(std::string_view name);

// What a direct read's memory and file range must be multiples of, in bytes.
struct DirectAlignment {
  uint32_t memory;
  uint32_t offset;
};

// The calls to the kernel that can fail or differ from one file system to the other; tests put others there.
struct FileCalls {
  std::function<int(const char* path, int flags)> open;
  std::function<ssize_t(int fd, const iovec* vectors, int count, off_t offset)> preadv_direct;
  // nullopt: this file cannot be read directly.
  std::function<std::optional<DirectAlignment>(int fd)> direct_alignment;
  // The part of the file (0 to 1) that is in the page cache; nullopt where that cannot be known without I/O.
  std::function<std::optional<double>(int fd, uint64_t bytes)> cached_fraction;
  // A hint: the file is read from front to back.
  std::function<void(int fd)> advise_sequential;

  static FileCalls of_the_system();
};

struct FileOptions {
  int threads = 2;       // reads at once through the page cache: each keeps a core busy
  int direct_reads = 8;  // reads at once past it: each waits for the disk; see docs/performance.md
  FileIo io = FileIo::kAuto;
  uint64_t smallest_direct_bytes = 4 << 20;  // kAuto: below it, opening and sampling cost more than they gain
  FileCalls calls = FileCalls::of_the_system();
};

// Whether the file is on a disk of this machine. Elsewhere the page cache or server is somebody else's, or
// the data are in memory, and plain calls are best.
bool is_local_disk(int fd);

// The error of a system call on a file.
Status file_call_failed(const std::string& what, const std::string& path, int error);

class OpenFile {
 public:
  // Throws when the file cannot be opened. `options` outlives this.
  OpenFile(std::string path, const FileOptions& options);
  ~OpenFile();
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  const std::string& path() const noexcept { return path_; }
  int fd() const noexcept { return fd_; }
  uint64_t bytes() const;  // as it is now

  // Whether the next piece should be read past the page cache: asked before each, because another reader may
  // have come. Once false it stays so.
  bool reads_directly();
  int direct_fd() const noexcept { return direct_fd_; }
  DirectAlignment direct_alignment() const noexcept { return alignment_; }
  // The kernel refused a direct read after all.
  void refuse_direct(const std::string& why);
  // What is wrong with a file that should have `expected` bytes: it has more now, or ends at `end`.
  Status grown(uint64_t expected) const;  // ok unless it has
  Status truncated(uint64_t end, uint64_t expected) const;
  // Why a file that should have been read directly is not; empty when it is, or should not have been.
  std::string direct_refusal() const;

 private:
  void open_directly(const FileOptions& options);
  bool announce_reader() const;
  bool only_reader() const;

  const std::string path_;
  int fd_ = -1;
  int direct_fd_ = -1;
  DirectAlignment alignment_{};
  bool announced_ = false;  // other readers see this one, and this one looks out for them
  std::atomic<bool> direct_{false};
  mutable std::mutex mutex_;
  std::string refusal_;  // Guarded by mutex_.
};

// A bounded number of files kept open; readers hold those in use through shares.
class OpenFiles {
 public:
  OpenFiles(std::string root, FileOptions options) : root_(std::move(root)), options_(std::move(options)) {}

  std::shared_ptr<OpenFile> get(const std::string& object);
  const FileOptions& options() const noexcept { return options_; }
  // Of the first file that should have been read directly and was not; empty when there is none.
  std::string direct_refusal() const;

 private:
  void drop_idle_locked();

  const std::string root_;
  const FileOptions options_;
  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<OpenFile>> files_;  // Guarded by mutex_.
  std::string refusal_;                                     // Guarded by mutex_. Of files that are closed.
};

}  // namespace rdmaload
