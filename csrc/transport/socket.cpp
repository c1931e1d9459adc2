#include "transport/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "core/error.h"

namespace rdmaload {
namespace {

Error unavailable(const std::string& what, const std::string& endpoint, int error) {
  return Error(ErrorCode::kUnavailable, what + " " + endpoint + ": " + std::strerror(error));
}

struct AddressListDeleter {
  void operator()(addrinfo* list) const noexcept { freeaddrinfo(list); }
};
using AddressList = std::unique_ptr<addrinfo, AddressListDeleter>;

AddressList resolve(const std::string& host, int port, const std::string& endpoint) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  const int failure = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list);
  if (failure != 0) {
    throw Error(ErrorCode::kUnavailable, "resolving " + endpoint + ": " + gai_strerror(failure));
  }
  return AddressList(list);
}

void set_option(int fd, int level, int name, int value) {
  setsockopt(fd, level, name, &value, sizeof(value));  // all of ours are improvements, none is required
}

}  // namespace

Socket Socket::connect(const std::string& host, int port, Deadline deadline, const GiveUp& give_up) {
  const std::string endpoint =
      (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + std::to_string(port);
  const AddressList addresses = resolve(host, port, endpoint);
  int last_error = ECONNREFUSED;
  for (const addrinfo* address = addresses.get(); address != nullptr; address = address->ai_next) {
    Socket socket(::socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), endpoint);
    if (socket.fd_ < 0) {
      last_error = errno;
      continue;
    }
    set_option(socket.fd_, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(socket.fd_, SOL_SOCKET, SO_KEEPALIVE, 1);
    if (::connect(socket.fd_, address->ai_addr, address->ai_addrlen) == 0) return socket;
    if (errno != EINPROGRESS) {
      last_error = errno;
      continue;
    }
    while (!socket.wait(false, true, deadline.poll_milliseconds(kGiveUpPollMilliseconds))) {
      if (give_up()) throw Error(ErrorCode::kCancelled, "connecting to " + endpoint + " was cancelled");
      if (deadline.passed()) throw Error(ErrorCode::kTimeout, "connecting to " + endpoint + " took too long");
    }
    int error = 0;
    socklen_t size = sizeof(error);
    getsockopt(socket.fd_, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error == 0) return socket;
    last_error = error;
  }
  throw unavailable("connecting to", endpoint, last_error);
}

Socket Socket::connect_unix(const std::string& path, Deadline deadline, const GiveUp& give_up) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    throw Error(ErrorCode::kInvalid, "'" + path + "' is no path of a unix socket: 1 to " +
                                         std::to_string(sizeof(address.sun_path) - 1) + " bytes are allowed");
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), path);
  if (socket.fd_ < 0) throw unavailable("connecting to", path, errno);
  while (::connect(socket.fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    if (errno == EINTR) continue;
    // A full backlog: unlike TCP the attempt is over, and nothing tells when there is room.
    if (errno != EAGAIN) throw unavailable("connecting to", path, errno);
    ::poll(nullptr, 0, deadline.poll_milliseconds(kGiveUpPollMilliseconds));
    if (give_up()) throw Error(ErrorCode::kCancelled, "connecting to " + path + " was cancelled");
    if (deadline.passed()) throw Error(ErrorCode::kTimeout, "connecting to " + path + " took too long");
  }
  return socket;
}

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

Socket::Socket(Socket&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      low_water_(other.low_water_),
      endpoint_(std::move(other.endpoint_)) {}

Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(low_water_, other.low_water_);
  std::swap(endpoint_, other.endpoint_);
  return *this;
}

size_t Socket::try_send(std::span<const std::byte> bytes) {
  for (;;) {
    const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent >= 0) return static_cast<size_t>(sent);
    if (errno == EAGAIN || errno == EWOULDBLOCK) return 0;
    if (errno != EINTR) throw unavailable("sending to", endpoint_, errno);
  }
}

size_t Socket::try_receive(std::span<iovec> vectors) {
  msghdr message{};
  message.msg_iov = vectors.data();
  message.msg_iovlen = vectors.size();
  for (;;) {
    const ssize_t got = ::recvmsg(fd_, &message, 0);
    if (got > 0) return static_cast<size_t>(got);
    if (got == 0) throw Error(ErrorCode::kUnavailable, endpoint_ + " closed the connection");
    if (errno == EAGAIN || errno == EWOULDBLOCK) return 0;
    if (errno != EINTR) throw unavailable("receiving from", endpoint_, errno);
  }
}

size_t Socket::try_receive(std::span<std::byte> bytes) {
  iovec vector{bytes.data(), bytes.size()};
  return try_receive(std::span(&vector, 1));
}

bool Socket::wait(bool readable, bool writable, int milliseconds) {
  pollfd entry{fd_, static_cast<short>((readable ? POLLIN : 0) | (writable ? POLLOUT : 0)), 0};
  const int ready = ::poll(&entry, 1, milliseconds);
  if (ready < 0 && errno != EINTR) throw unavailable("waiting for", endpoint_, errno);
  return ready > 0;
}

void Socket::set_low_water(int bytes) noexcept {
  if (bytes == low_water_) return;
  set_option(fd_, SOL_SOCKET, SO_RCVLOWAT, bytes);
  low_water_ = bytes;
}

}  // namespace rdmaload
