// A connected, non-blocking stream of bytes: a plain socket (TCP or unix) or TLS over one.
//
// A value with Socket's methods; belongs to one thread.
#pragma once

#include <optional>
#include <string>

#include "transport/socket.h"
#include "transport/tls.h"

namespace rdmaload {

struct Address {
  std::string host;
  int port = 0;
  std::string socket_path;  // of a unix socket; host and port mean nothing then
};

class ByteStream {
 public:
  // With `tls` (null: none), shakes hands as well. Throws what Socket and TlsStream throw.
  static ByteStream connect(const Address& address, const TlsContext* tls, Deadline deadline,
                            const GiveUp& give_up) {
    Socket socket = address.socket_path.empty()
                        ? Socket::connect(address.host, address.port, deadline, give_up)
                        : Socket::connect_unix(address.socket_path, deadline, give_up);
    return over(std::move(socket), tls, address.host, deadline, give_up);
  }
  // The same over a connection that was made already, through a proxy say.
  static ByteStream over(Socket socket, const TlsContext* tls, const std::string& host, Deadline deadline,
                         const GiveUp& give_up) {
    ByteStream stream;
    if (tls != nullptr) {
      stream.tls_.emplace(std::move(socket), *tls, host, deadline, give_up);
    } else {
      stream.socket_ = std::move(socket);
    }
    return stream;
  }

  size_t try_send(std::span<const std::byte> bytes) {
    return tls_ ? tls_->try_send(bytes) : socket_.try_send(bytes);
  }
  size_t try_receive(std::span<iovec> vectors) {
    return tls_ ? tls_->try_receive(vectors) : socket_.try_receive(vectors);
  }
  size_t try_receive(std::span<std::byte> bytes) {
    iovec vector{bytes.data(), bytes.size()};
    return try_receive(std::span(&vector, 1));
  }
  bool wait(bool readable, bool writable, int milliseconds) {
    return tls_ ? tls_->wait(readable, writable, milliseconds)
                : socket_.wait(readable, writable, milliseconds);
  }
  void set_low_water(int bytes) noexcept { tls_ ? tls_->set_low_water(bytes) : socket_.set_low_water(bytes); }

 private:
  ByteStream() = default;
  Socket socket_;  // not connected when tls_ owns it
  std::optional<TlsStream> tls_;
};

}  // namespace rdmaload
