#include "transport/tls_server.h"

#if RDMALOAD_HAS_OPENSSL

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "core/error.h"
#include "transport/openssl.h"

namespace rdmaload {
namespace {

constexpr size_t kRecordBytes = 16 << 10;  // of plain text, the most that one may hold
// Ciphertext that may wait; a record may begin below it. Larger spares system calls and costs memory for each
// client that is slow.
constexpr size_t kOutputBytes = 64 << 10;

}  // namespace

TlsServerContext::TlsServerContext(const TlsServerOptions& options) {
  const OpenSsl& ssl = openssl();
  // The buffers of a connection that is idle are given back: there may be thousands.
  ContextPtr made = make_context(ssl.TLS_server_method(), SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX* const context = made.get();
  // What a resumed session must have in common with the server that began it.
  static constexpr unsigned char kName[] = "rdmaload";
  ssl.SSL_CTX_set_session_id_context(context, kName, sizeof(kName) - 1);
  use_certificate(context, "tls_cert", options.cert_file, "tls_key", options.key_file);
  if (!options.client_ca_file.empty()) {
    if (ssl.SSL_CTX_load_verify_file(context, options.client_ca_file.c_str()) != 1) {
      throw unusable_file("tls_client_ca", options.client_ca_file);
    }
    ssl.SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  }
  context_ = made.release();
}

TlsServerContext::~TlsServerContext() { openssl().SSL_CTX_free(context_); }

// What OpenSSL's callbacks use; its address does not change.
struct TlsServerStream::Session {
  Session(int fd, SSL_CTX* context) : fd(fd) {
    const OpenSsl& lib = openssl();
    ssl = lib.SSL_new(context);
    BIO* const bio = ssl != nullptr ? lib.BIO_new(method()) : nullptr;
    if (bio == nullptr) {
      lib.SSL_free(ssl);
      throw Error(ErrorCode::kUnavailable, "OpenSSL cannot make a connection: " + openssl_error());
    }
    lib.BIO_set_data(bio, this);
    lib.SSL_set_bio(ssl, bio, bio);  // owns it now
    lib.SSL_set_accept_state(ssl);
  }
  ~Session() {
    openssl().SSL_free(ssl);
    openssl().ERR_clear_error();
  }

  bool flush();

  static int read(BIO* bio, char* to, size_t size, size_t* got) {
    const OpenSsl& lib = openssl();
    auto& self = *static_cast<Session*>(lib.BIO_get_data(bio));
    lib.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY);
    const ssize_t received = recv(self.fd, to, size, 0);
    if (received > 0) {
      *got = static_cast<size_t>(received);
      return 1;
    }
    if (received == 0) {
      self.cut_off = true;
    } else if (errno == EAGAIN || errno == EINTR) {
      lib.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY);
    }
    return 0;
  }
  // Never full: callers look at has_room() first, and a handshake is a few KiB.
  static int write(BIO* bio, const char* from, size_t size, size_t* written) {
    auto& self = *static_cast<Session*>(openssl().BIO_get_data(bio));
    openssl().BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY);
    try {
      if (self.output.empty()) self.output.reserve(kOutputBytes + 2 * kRecordBytes);
      const auto bytes = std::as_bytes(std::span(from, size));
      self.output.insert(self.output.end(), bytes.begin(), bytes.end());
    } catch (const std::bad_alloc&) {
      return 0;
    }
    *written = size;
    return 1;
  }
  static BIO_METHOD* method() {
    static BIO_METHOD* const made = make_bio_method("rdmaload server", read, write);
    return made;
  }

  const int fd;
  SSL* ssl = nullptr;
  std::vector<std::byte> output;  // ciphertext
  bool cut_off = false;           // the peer closed the socket
  bool broken = false;            // OpenSSL has given up: not even a good-bye
  bool has_input = false;         // the last receive() ended because `into` was full
};

bool TlsServerStream::Session::flush() {
  size_t sent = 0;
  while (sent < output.size()) {
    const ssize_t now = ::send(fd, output.data() + sent, output.size() - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (now < 0 && errno == EINTR) continue;
    if (now < 0 && errno != EAGAIN) return false;
    if (now < 0) break;
    sent += static_cast<size_t>(now);
  }
  if (sent < output.size()) {
    output.erase(output.begin(), output.begin() + static_cast<ptrdiff_t>(sent));
  } else {
    output = {};  // its memory goes, too: an idle connection should hold none
  }
  return true;
}

TlsServerStream::TlsServerStream(int fd, const TlsServerContext& context)
    : session_(std::make_unique<Session>(fd, context.context_)) {}

TlsServerStream::~TlsServerStream() {
  Session& self = *session_;
  if (!self.broken && established()) openssl().SSL_shutdown(self.ssl);
  self.flush();
}

bool TlsServerStream::established() const noexcept {
  return openssl().SSL_is_init_finished(session_->ssl) == 1;
}

ssize_t TlsServerStream::receive(std::span<std::byte> into) {
  const OpenSsl& lib = openssl();
  Session& self = *session_;
  size_t total = 0;
  self.has_input = false;
  // What a peer asks for without taking answers (handshakes, new keys) must not pile up.
  if (self.output.size() >= kOutputBytes && (!self.flush() || self.output.size() >= kOutputBytes)) {
    errno = EAGAIN;
    return -1;
  }
  while (total < into.size()) {
    lib.ERR_clear_error();
    size_t got = 0;
    const int result = lib.SSL_read_ex(self.ssl, into.data() + total, into.size() - total, &got);
    if (result == 1) {
      total += got;
      continue;
    }
    const int error = lib.SSL_get_error(self.ssl, result);
    if (error == SSL_ERROR_WANT_READ) {
      errno = EAGAIN;
      return total > 0 ? static_cast<ssize_t>(total) : -1;
    }
    // What came before the end is received first; the next call finds the same again.
    if (total > 0) {
      self.has_input = true;
      return static_cast<ssize_t>(total);
    }
    if (error == SSL_ERROR_ZERO_RETURN) return 0;
    self.broken = true;
    errno = self.cut_off ? ECONNRESET : EPROTO;
    return -1;
  }
  self.has_input = true;
  return static_cast<ssize_t>(total);
}

ssize_t TlsServerStream::send(std::span<const iovec> vectors) {
  const OpenSsl& lib = openssl();
  Session& self = *session_;
  size_t total = 0;
  for (const iovec& vector : vectors) {
    size_t done = 0;
    while (done < vector.iov_len) {
      if (!has_room()) {
        if (!self.flush()) {
          self.broken = true;
          errno = EPIPE;
          return -1;
        }
        if (!has_room()) {
          errno = EAGAIN;
          return total > 0 ? static_cast<ssize_t>(total) : -1;
        }
      }
      lib.ERR_clear_error();
      size_t taken = 0;
      const size_t part = std::min(vector.iov_len - done, kRecordBytes);
      if (lib.SSL_write_ex(self.ssl, static_cast<const std::byte*>(vector.iov_base) + done, part, &taken) !=
          1) {
        self.broken = true;
        errno = EPROTO;
        return -1;
      }
      done += taken;
      total += taken;
    }
  }
  return static_cast<ssize_t>(total);
}

bool TlsServerStream::has_room() const noexcept { return session_->output.size() < kOutputBytes; }

bool TlsServerStream::flush() { return session_->flush(); }

bool TlsServerStream::holds_output() const noexcept { return session_->output.size() > 0; }

bool TlsServerStream::holds_input() const noexcept { return session_->has_input; }

}  // namespace rdmaload

#else

#include "transport/tls.h"

namespace rdmaload {

struct TlsServerStream::Session {};

// tls_library() says what a build without TLS lacks.
TlsServerContext::TlsServerContext(const TlsServerOptions&) { tls_library(); }
TlsServerContext::~TlsServerContext() = default;
TlsServerStream::TlsServerStream(int, const TlsServerContext&) { tls_library(); }
TlsServerStream::~TlsServerStream() = default;
bool TlsServerStream::established() const noexcept { return false; }
ssize_t TlsServerStream::receive(std::span<std::byte>) { return -1; }
ssize_t TlsServerStream::send(std::span<const iovec>) { return -1; }
bool TlsServerStream::has_room() const noexcept { return false; }
bool TlsServerStream::flush() { return false; }
bool TlsServerStream::holds_output() const noexcept { return false; }
bool TlsServerStream::holds_input() const noexcept { return false; }

}  // namespace rdmaload

#endif
