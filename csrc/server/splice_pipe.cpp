#include "server/splice_pipe.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace rdmaload::server {
namespace {

// Of 64 KiB to 1 MiB the least CPU per byte (docs/performance.md); any user may have such a pipe.
constexpr int kPipeBytes = 256 << 10;

constexpr std::byte kProbe{};

// The call itself, not this socket's state.
bool is_forbidden(int error) {
  return error == EINVAL || error == EPERM || error == EACCES || error == ENOSYS || error == EOPNOTSUPP;
}

}  // namespace

SplicePipe::SplicePipe() {
  int ends[2] = {-1, -1};
  const bool made = pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0;
  read_ = ends[0];
  write_ = ends[1];
  if (!made) {
    refuse("pipe2");
  } else if (fcntl(write_, F_SETPIPE_SZ, kPipeBytes) < kPipeBytes) {
    refuse("F_SETPIPE_SZ");
  } else if ((sink_ = open("/dev/null", O_WRONLY | O_CLOEXEC)) < 0) {
    refuse("/dev/null");
  } else {
    pass_on(sink_, {&kProbe, 1}, 0);  // a sandbox may forbid it
  }
}

SplicePipe::~SplicePipe() { close_all(); }

ssize_t SplicePipe::send(int socket, std::span<const std::byte> bytes, bool more) {
  const auto part = std::min<size_t>(bytes.size(), kPipeBytes);
  return pass_on(socket, bytes.first(part), more || part < bytes.size() ? SPLICE_F_MORE : 0);
}

ssize_t SplicePipe::pass_on(int target, std::span<const std::byte> bytes, unsigned flags) {
  iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
  // Less than all where the bytes begin within a page: they lie in one page more than the pipe has room for.
  const ssize_t filled = vmsplice(write_, &piece, 1, SPLICE_F_NONBLOCK);
  if (filled <= 0) {
    refuse("vmsplice");
    errno = EAGAIN;
    return -1;
  }
  const auto length = static_cast<size_t>(filled);
  const ssize_t sent = splice(read_, nullptr, target, nullptr, length, SPLICE_F_NONBLOCK | flags);
  int error = sent == 0 ? EAGAIN : errno;
  auto left = length - static_cast<size_t>(std::max<ssize_t>(sent, 0));
  while (left > 0) {
    const ssize_t gone = splice(read_, nullptr, sink_, nullptr, left, SPLICE_F_NONBLOCK);
    if (gone <= 0) {  // others' bytes must never come out of it
      refuse("splice");
      break;
    }
    left -= static_cast<size_t>(gone);
  }
  if (sent < 0 && is_forbidden(error)) {
    errno = error;
    if (refusal_.empty()) refuse("splice");
    error = EAGAIN;
  }
  errno = error;
  return sent > 0 ? sent : -1;
}

void SplicePipe::refuse(const char* call) {
  refusal_ = std::string(call) + ": " + std::strerror(errno);
  close_all();
}

void SplicePipe::close_all() noexcept {
  for (int* fd : {&read_, &write_, &sink_}) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
  }
}

}  // namespace rdmaload::server
