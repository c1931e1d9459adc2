// TLS over a socket: the client's side of one connection, and what all connections to one server share.
//
// Knows nothing of what is said over it. The peer is verified (chain, name or IP address, dates) unless the
// options say otherwise; TLS 1.2 is the oldest version spoken. In a build without OpenSSL's headers, or on a
// machine without its library, the constructor of TlsContext throws kNotSupported.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "core/deadline.h"
#include "transport/socket.h"

struct ssl_ctx_st;

namespace rdmaload {

struct TlsOptions {
  std::string ca_file;           // PEM, one or many; with no ca_dir either: the system's store
  std::string ca_dir;            // of certificates under their hashed names
  std::string client_cert_file;  // PEM, with its chain; empty: none
  std::string client_key_file;   // PEM; empty: the key is in client_cert_file
  std::string server_name;       // asked for (SNI) and verified; empty: the host that is connected to
  bool verify = true;            // false: anybody may be the server
};

// Immutable; any thread may connect with it.
class TlsContext {
 public:
  // Reads the files. Throws kAuthentication when one cannot be used, kNotSupported without OpenSSL.
  explicit TlsContext(TlsOptions options);
  ~TlsContext();
  TlsContext(const TlsContext&) = delete;
  TlsContext& operator=(const TlsContext&) = delete;

  const TlsOptions& options() const noexcept { return options_; }

 private:
  friend class TlsStream;
  const TlsOptions options_;
  ssl_ctx_st* context_ = nullptr;
};

// Belongs to one thread. The methods mean what those of Socket mean.
class TlsStream {
 public:
  // Shakes hands as a client of `host`. Throws kAuthentication when the peer's certificate is not accepted
  // or ours is not, kTimeout, kCancelled, kUnavailable.
  TlsStream(Socket socket, const TlsContext& context, const std::string& host, Deadline deadline,
            const GiveUp& give_up);
  ~TlsStream();  // says good-bye (close_notify) if there is room for it, without waiting
  TlsStream(TlsStream&&) noexcept;
  TlsStream& operator=(TlsStream&&) noexcept;

  // After a result smaller than asked the next call must begin with the bytes that are left.
  size_t try_send(std::span<const std::byte> bytes);
  // Decrypts into the vectors until they are full or nothing more has come. Throws kUnavailable when the
  // peer ended the connection, whether with TLS's own end or, which its message says, without.
  size_t try_receive(std::span<iovec> vectors);
  bool wait(bool readable, bool writable, int milliseconds);
  // In bytes as they come, which are a little more than those that they decrypt to.
  void set_low_water(int bytes) noexcept;

 private:
  struct Session;
  std::unique_ptr<Session> session_;
};

// The name and version of the library. Throws kNotSupported as TlsContext does.
std::string tls_library();

}  // namespace rdmaload
