// Hands the kernel references to memory instead of copies of it: vmsplice(2) into a pipe, splice(2) from
// there into a socket.
//
// TCP sends from the very pages, and on loopback they stay in use until the receiver has read them: whoever
// calls this must never write there again, nor let anybody else, unless the pages are detached before
// (HostArena::detach). Nothing stays in the pipe after a call, so all connections of a thread share one.
// Costs a quarter of send()'s CPU per byte with huge pages, half with ordinary ones (docs/performance.md).
// Belongs to one thread.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <span>
#include <string>

namespace rdmaload::server {

class SplicePipe {
 public:
  // Where the system offers none of it (a sandbox, no descriptors left) refusal() says why.
  SplicePipe();
  ~SplicePipe();
  SplicePipe(const SplicePipe&) = delete;
  SplicePipe& operator=(const SplicePipe&) = delete;

  // Empty: it works. May change when the system refuses a call later; then everything is to be copied.
  const std::string& refusal() const noexcept { return refusal_; }

  // As send(2) on a non-blocking socket, from the front of `bytes`. `more`: others follow at once. The
  // thread must block SIGPIPE.
  ssize_t send(int socket, std::span<const std::byte> bytes, bool more);

 private:
  // Also takes out again whatever `target` did not. -1 with EAGAIN, too, when a call is refused for good.
  ssize_t pass_on(int target, std::span<const std::byte> bytes, unsigned flags);
  void refuse(const char* call);  // by errno
  void close_all() noexcept;

  int read_ = -1;
  int write_ = -1;
  int sink_ = -1;
  std::string refusal_;
};

}  // namespace rdmaload::server
