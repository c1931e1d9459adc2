// A connected, non-blocking TCP or unix socket.
//
// Owns one descriptor; belongs to one thread. Every wait has a deadline. Errors name the endpoint, never a
// credential.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <functional>
#include <span>
#include <string>

#include "core/deadline.h"

namespace rdmaload {

// Asked while waiting for a connection; true ends the wait with kCancelled.
using GiveUp = std::function<bool()>;
constexpr int kGiveUpPollMilliseconds = 20;  // how often it is asked

class Socket {
 public:
  Socket() = default;  // not connected
  // Resolves (IPv4, IPv6 or a name) and tries each address in turn. Throws kUnavailable, kTimeout or
  // kCancelled. Resolving a name is the one step that the system's resolver, not the deadline, bounds.
  static Socket connect(const std::string& host, int port, Deadline deadline, const GiveUp& give_up);
  // The unix socket at this path. Throws the same, and kInvalid for a path longer than the system takes.
  static Socket connect_unix(const std::string& path, Deadline deadline, const GiveUp& give_up);
  ~Socket();
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&& other) noexcept;

  bool connected() const noexcept { return fd_ >= 0; }
  const std::string& endpoint() const noexcept { return endpoint_; }

  // Bytes taken by the kernel; 0 when it has no room now. Throws kUnavailable.
  size_t try_send(std::span<const std::byte> bytes);
  // Bytes received; 0 when there are none now. Throws kUnavailable when the peer closed or reset.
  size_t try_receive(std::span<iovec> vectors);
  size_t try_receive(std::span<std::byte> bytes);
  // Waits up to `milliseconds` until it can be read (or, if asked, written). False when the time passed.
  bool wait(bool readable, bool writable, int milliseconds);
  // From now on wait() calls it readable when this many bytes have come (or the peer has closed). The system
  // may say so earlier. A hint: fewer wake-ups where more than that is known to be on its way.
  void set_low_water(int bytes) noexcept;

 private:
  Socket(int fd, std::string endpoint) : fd_(fd), endpoint_(std::move(endpoint)) {}
  int fd_ = -1;
  int low_water_ = 1;
  std::string endpoint_;
};

}  // namespace rdmaload
