// The server's side of TLS on one connection, and what all connections of a server share.
//
// Records are encrypted into a small buffer and sent several at a time; the caller offers more only while
// there is room. The handshake is done by receive(), as bytes come. TLS 1.2 is the oldest version spoken. In
// a build without OpenSSL's headers, or on a machine without its library, the constructor of TlsServerContext
// throws kNotSupported.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>

struct ssl_ctx_st;

namespace rdmaload {

struct TlsServerOptions {
  std::string cert_file;       // PEM, with its chain
  std::string key_file;        // PEM; empty: the key is in cert_file
  std::string client_ca_file;  // PEM; clients must show a certificate from it; empty: none is asked for
};

// Immutable; any thread may use it.
class TlsServerContext {
 public:
  // Reads the files. Throws kAuthentication when one cannot be used, kNotSupported without OpenSSL.
  explicit TlsServerContext(const TlsServerOptions& options);
  ~TlsServerContext();
  TlsServerContext(const TlsServerContext&) = delete;
  TlsServerContext& operator=(const TlsServerContext&) = delete;

 private:
  friend class TlsServerStream;
  ssl_ctx_st* context_ = nullptr;
};

// Belongs to one thread.
class TlsServerStream {
 public:
  // The descriptor, of a non-blocking socket, stays the caller's, who closes it afterwards.
  TlsServerStream(int fd, const TlsServerContext& context);
  ~TlsServerStream();  // says good-bye (close_notify, or why the handshake failed) without waiting
  TlsServerStream(const TlsServerStream&) = delete;
  TlsServerStream& operator=(const TlsServerStream&) = delete;

  bool established() const noexcept;
  // Decrypts until `into` is full or nothing more has come. As recv(2): 0 when the peer has ended TLS, -1
  // with EAGAIN when there is nothing now, EPROTO when it does not speak TLS, or was refused.
  ssize_t receive(std::span<std::byte> into);
  // Encrypts from the front of the vectors while there is room, and sends. How many bytes it took; -1 with
  // EAGAIN when there is no room.
  ssize_t send(std::span<const iovec> vectors);
  bool has_room() const noexcept;
  // Sends what is encrypted, as far as the socket takes it; false: the connection is lost.
  bool flush();
  bool holds_output() const noexcept;
  // There may be bytes that were taken from the socket and not received yet.
  bool holds_input() const noexcept;

 private:
  struct Session;
  std::unique_ptr<Session> session_;
};

}  // namespace rdmaload
