// A file whose bytes are served as values without being stored.
//
// It is read by descriptor, never mapped: a file that was truncated since gives a short read, not a signal.
// The descriptor stays with the content that was there when it was opened, when another file takes its name.
// Immutable; any thread may use it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace rdmaload::server {

class ExportedFile {
 public:
  // Throws Error: kNotFound, kAuthentication, kUnavailable when it cannot be opened, kIntegrity when it is no
  // regular file of `size` bytes last written at `mtime_ns`: what was indexed must be what is served.
  ExportedFile(std::string path, uint64_t size, int64_t mtime_ns);
  ~ExportedFile();
  ExportedFile(const ExportedFile&) = delete;
  ExportedFile& operator=(const ExportedFile&) = delete;

  int descriptor() const noexcept { return fd_; }
  // A hint that a range is about to be sent: it is read ahead while earlier replies go out.
  void will_read(uint64_t offset, uint64_t length) const noexcept;
  const std::string& path() const noexcept { return path_; }

 private:
  std::string path_;
  int fd_ = -1;
};

struct FileRange {
  std::shared_ptr<const ExportedFile> file;
  uint64_t offset = 0;
  uint64_t length = 0;
};

}  // namespace rdmaload::server
