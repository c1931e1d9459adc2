// A connected, non-blocking TCP socket.
//
// Owns one descriptor; belongs to one thread. Every wait has a deadline. Errors name the endpoint, never a credential.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <span>
#include <string>

#include "core/deadline.h"

namespace rdmaload {

class Socket {
 public:
  Socket() = default;  // not connected
  // Resolves (IPv4, IPv6 or a name) and tries each address in turn. Throws kUnavailable or kTimeout. Resolving a name
  // is the one step that the system's resolver, not the deadline, bounds.
  static Socket connect(const std::string& host, int port, Deadline deadline);
  ~Socket();
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&& other) noexcept;

  bool connected() const noexcept { return fd_ >= 0; }

  // Bytes taken by the kernel; 0 when it has no room now. Throws kUnavailable.
  size_t try_send(std::span<const std::byte> bytes);
  // Bytes received; 0 when there are none now. Throws kUnavailable when the peer closed or reset.
  size_t try_receive(std::span<iovec> vectors);
  size_t try_receive(std::span<std::byte> bytes);
  // Waits up to `milliseconds` until it can be read (or, if asked, written). False when the time passed.
  bool wait(bool readable, bool writable, int milliseconds);

 private:
  Socket(int fd, std::string endpoint) : fd_(fd), endpoint_(std::move(endpoint)) {}
  int fd_ = -1;
  std::string endpoint_;
};

}  // namespace rdmaload
