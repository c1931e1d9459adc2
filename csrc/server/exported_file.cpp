#include "server/exported_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace rdmaload::server {
namespace {

ErrorCode code_of(int error) {
  if (error == ENOENT || error == ENOTDIR) return ErrorCode::kNotFound;
  if (error == EACCES || error == EPERM) return ErrorCode::kAuthentication;
  return ErrorCode::kUnavailable;
}

}  // namespace

ExportedFile::ExportedFile(std::string path, uint64_t size, int64_t mtime_ns) : path_(std::move(path)) {
  // Not blocking: the name may have become a pipe's.
  fd_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat status{};
  if (fd_ < 0 || fstat(fd_, &status) != 0) {
    const int error = errno;
    if (fd_ >= 0) close(fd_);
    throw Error(code_of(error), path_ + ": cannot be opened: " + std::strerror(error));
  }
  const int64_t written = int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
  if (!S_ISREG(status.st_mode) || static_cast<uint64_t>(status.st_size) != size || written != mtime_ns) {
    close(fd_);
    throw Error(ErrorCode::kIntegrity,
                path_ + ": changed since it was indexed; start again when it is complete");
  }
}

ExportedFile::~ExportedFile() { close(fd_); }

void ExportedFile::will_read(uint64_t offset, uint64_t length) const noexcept {
  posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(length), POSIX_FADV_WILLNEED);
}

}  // namespace rdmaload::server
