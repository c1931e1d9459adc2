#include "transport/tls.h"

#if RDMALOAD_HAS_OPENSSL

#include <arpa/inet.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include "core/error.h"
#include "transport/openssl.h"

namespace rdmaload {
namespace {

// What alerts are called in OpenSSL's error numbers.
constexpr int kAlert = 1000;

bool is_address(const std::string& name) {
  in6_addr binary;
  return inet_pton(AF_INET, name.c_str(), &binary) == 1 || inet_pton(AF_INET6, name.c_str(), &binary) == 1;
}

}  // namespace

TlsContext::TlsContext(TlsOptions options) : options_(std::move(options)) {
  const OpenSsl& ssl = openssl();
  ContextPtr made = make_context(ssl.TLS_client_method());
  SSL_CTX* const context = made.get();
  ssl.SSL_CTX_set_verify(context, options_.verify ? SSL_VERIFY_PEER : SSL_VERIFY_NONE, nullptr);
  const TlsOptions& with = options_;
  if (with.verify && with.ca_file.empty() && with.ca_dir.empty()) {
    ssl.SSL_CTX_set_default_verify_paths(context);  // none there: verification says so
  }
  if (!with.ca_file.empty() && ssl.SSL_CTX_load_verify_file(context, with.ca_file.c_str()) != 1) {
    throw unusable_file("ca_file", with.ca_file);
  }
  if (!with.ca_dir.empty() && (::access((with.ca_dir + "/.").c_str(), X_OK) != 0 ||
                               ssl.SSL_CTX_load_verify_dir(context, with.ca_dir.c_str()) != 1)) {
    throw unusable_file("ca_dir", with.ca_dir);
  }
  if (!with.client_cert_file.empty()) {
    use_certificate(context, "client_cert_file", with.client_cert_file, "client_key_file",
                    with.client_key_file);
  }
  context_ = made.release();
}

TlsContext::~TlsContext() { openssl().SSL_CTX_free(context_); }

// Everything that OpenSSL's callbacks use; its address does not change.
struct TlsStream::Session {
  Session(Socket connected, const TlsContext& context, const std::string& host);
  ~Session();

  void shake_hands(Deadline deadline, const GiveUp& give_up);
  // What a call that returned `result` waits for is noted in `reading`, `writing`; false when it failed.
  bool would_block(int result, bool& reading, bool& writing);
  Error failure(int result);

  Socket socket;
  const bool verify;
  const std::string name;
  SSL* ssl = nullptr;
  bool established = false;
  bool broken = false;
  std::optional<Error> socket_failure;  // what stopped the socket, for a callback cannot throw
  std::optional<Error> send_failure;    // kept back: see write()
  std::optional<Error> late_failure;    // met after bytes had been received, which go first
  // What the last receive and the last send wait for.
  bool receive_reads = true, receive_writes = false;
  bool send_reads = false, send_writes = true;
  bool may_hold_bytes = true;  // OpenSSL may have read more than was asked of it

  static int read(BIO* bio, char* to, size_t size, size_t* got);
  static int write(BIO* bio, const char* from, size_t size, size_t* sent);
  static BIO_METHOD* method() {
    static BIO_METHOD* const made = make_bio_method("rdmaload socket", read, write);
    return made;
  }
};

TlsStream::Session::Session(Socket connected, const TlsContext& context, const std::string& host)
    : socket(std::move(connected)),
      verify(context.options().verify),
      name(context.options().server_name.empty() ? host : context.options().server_name) {
  const OpenSsl& lib = openssl();
  ssl = lib.SSL_new(context.context_);
  BIO* const bio = ssl != nullptr ? lib.BIO_new(method()) : nullptr;
  if (bio == nullptr) {
    lib.SSL_free(ssl);
    throw Error(ErrorCode::kUnavailable, "OpenSSL cannot make a connection: " + openssl_error());
  }
  lib.BIO_set_data(bio, this);
  lib.SSL_set_bio(ssl, bio, bio);  // owns it now
  X509_VERIFY_PARAM* const expected = lib.SSL_get0_param(ssl);
  int set = 1;
  if (is_address(name)) {
    set = lib.X509_VERIFY_PARAM_set1_ip_asc(expected, name.c_str());
  } else {
    lib.X509_VERIFY_PARAM_set_hostflags(expected, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    set = lib.X509_VERIFY_PARAM_set1_host(expected, name.c_str(), name.size());
    // An address is no name to ask for (RFC 6066).
    lib.SSL_ctrl(ssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name,
                 const_cast<char*>(name.c_str()));
  }
  if (set != 1) {
    lib.SSL_free(ssl);
    throw Error(ErrorCode::kInvalid, "'" + name + "' is no name that a certificate can have (server_name)");
  }
}

TlsStream::Session::~Session() {
  const OpenSsl& lib = openssl();
  if (established && !broken) lib.SSL_shutdown(ssl);  // sends close_notify if there is room, never waits
  lib.SSL_free(ssl);
  lib.ERR_clear_error();
}

int TlsStream::Session::read(BIO* bio, char* to, size_t size, size_t* got) {
  const OpenSsl& lib = openssl();
  auto& self = *static_cast<Session*>(lib.BIO_get_data(bio));
  lib.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY);
  try {
    *got = self.socket.try_receive(std::as_writable_bytes(std::span(to, size)));
    if (*got > 0) return 1;
    lib.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY);
  } catch (const Error& error) {
    self.socket_failure = error;
  }
  return 0;
}

int TlsStream::Session::write(BIO* bio, const char* from, size_t size, size_t* sent) {
  const OpenSsl& lib = openssl();
  auto& self = *static_cast<Session*>(lib.BIO_get_data(bio));
  lib.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY);
  try {
    *sent = self.socket.try_send(std::as_bytes(std::span(from, size)));
    if (*sent > 0) return 1;
  } catch (const Error& error) {
    // A peer that refuses us sends an alert and closes: what it said is still to be read, and is the better
    // error. So a failed send looks like a full socket until a receive has found nothing more.
    self.send_failure = error;
  }
  lib.BIO_set_flags(bio, BIO_FLAGS_WRITE | BIO_FLAGS_SHOULD_RETRY);
  return 0;
}

bool TlsStream::Session::would_block(int result, bool& reading, bool& writing) {
  const int error = openssl().SSL_get_error(ssl, result);
  reading = error == SSL_ERROR_WANT_READ;
  writing = error == SSL_ERROR_WANT_WRITE;
  return reading || writing;
}

Error TlsStream::Session::failure(int result) {
  const OpenSsl& lib = openssl();
  broken = true;
  const std::string& peer = socket.endpoint();
  const int error = lib.SSL_get_error(ssl, result);
  if (error == SSL_ERROR_ZERO_RETURN) return Error(ErrorCode::kUnavailable, peer + " closed the connection");
  if (socket_failure) {
    return Error(
        ErrorCode::kUnavailable,
        std::string(socket_failure->what()) +
            (established ? " without ending TLS: it was cut off"
                         : " during the TLS handshake: is it a TLS port, and has it a certificate?"));
  }
  const int reason = ERR_GET_REASON(lib.ERR_peek_last_error());
  const std::string said = openssl_error();
  switch (reason) {
    case SSL_R_CERTIFICATE_VERIFY_FAILED: {
      const long why = lib.SSL_get_verify_result(ssl);
      std::string advice = "give the CA that signed it by ca_file=";
      if (why == X509_V_ERR_HOSTNAME_MISMATCH || why == X509_V_ERR_IP_ADDRESS_MISMATCH) {
        advice = "it is not for '" + name + "': connect by a name that it has, or give that by server_name=";
      } else if (why == X509_V_ERR_CERT_HAS_EXPIRED || why == X509_V_ERR_CERT_NOT_YET_VALID) {
        advice = "renew it, or look at this machine's clock";
      }
      return Error(ErrorCode::kAuthentication, "the certificate of " + peer + " is not accepted: " +
                                                   lib.X509_verify_cert_error_string(why) + "; " + advice);
    }
    case SSL_R_WRONG_VERSION_NUMBER:
    case SSL_R_HTTP_REQUEST:
    case SSL_R_PACKET_LENGTH_TOO_LONG:
      if (!established) {
        return Error(ErrorCode::kUnavailable, peer + " answered, but not with TLS: is this its plain port?");
      }
      break;
    case SSL_R_UNSUPPORTED_PROTOCOL:
    case kAlert + SSL_AD_PROTOCOL_VERSION:
      return Error(ErrorCode::kNotSupported, peer + " offers no TLS 1.2 or newer: " + said);
    case kAlert + SSL_AD_HANDSHAKE_FAILURE:
    case kAlert + SSL_AD_BAD_CERTIFICATE:
    case kAlert + SSL_AD_UNSUPPORTED_CERTIFICATE:
    case kAlert + SSL_AD_CERTIFICATE_REVOKED:
    case kAlert + SSL_AD_CERTIFICATE_EXPIRED:
    case kAlert + SSL_AD_CERTIFICATE_UNKNOWN:
    case kAlert + SSL_AD_UNKNOWN_CA:
    case kAlert + SSL_AD_ACCESS_DENIED:
    case kAlert + SSL_AD_CERTIFICATE_REQUIRED:
      return Error(ErrorCode::kAuthentication,
                   peer + " refused us (" + said +
                       "): give a certificate that it accepts by client_cert_file= and client_key_file=");
    case kAlert + SSL_AD_UNRECOGNIZED_NAME:
      return Error(ErrorCode::kAuthentication,
                   peer + " knows no server of the name '" + name + "': correct server_name=");
    default:
      break;
  }
  return Error(ErrorCode::kUnavailable, "TLS with " + peer + " failed: " + said);
}

void TlsStream::Session::shake_hands(Deadline deadline, const GiveUp& give_up) {
  const OpenSsl& lib = openssl();
  for (;;) {
    lib.ERR_clear_error();
    const int result = lib.SSL_connect(ssl);
    if (result == 1) break;
    bool reading = false, writing = false;
    if (!would_block(result, reading, writing)) throw failure(result);
    if (send_failure) throw Error(*send_failure);
    socket.wait(reading, writing, deadline.poll_milliseconds(kGiveUpPollMilliseconds));
    if (give_up())
      throw Error(ErrorCode::kCancelled, "connecting to " + socket.endpoint() + " was cancelled");
    if (deadline.passed()) {
      throw Error(ErrorCode::kTimeout,
                  socket.endpoint() + " did not end the TLS handshake in time: is this its TLS port?");
    }
  }
  established = true;
}

TlsStream::TlsStream(Socket socket, const TlsContext& context, const std::string& host, Deadline deadline,
                     const GiveUp& give_up)
    : session_(std::make_unique<Session>(std::move(socket), context, host)) {
  session_->shake_hands(deadline, give_up);
}

TlsStream::~TlsStream() = default;
TlsStream::TlsStream(TlsStream&&) noexcept = default;
TlsStream& TlsStream::operator=(TlsStream&&) noexcept = default;

size_t TlsStream::try_send(std::span<const std::byte> bytes) {
  const OpenSsl& lib = openssl();
  Session& self = *session_;
  if (bytes.empty()) return 0;
  lib.ERR_clear_error();
  size_t sent = 0;
  const int result = lib.SSL_write_ex(self.ssl, bytes.data(), bytes.size(), &sent);
  if (result == 1) {
    self.send_reads = false;
    self.send_writes = true;
    return sent;
  }
  if (!self.would_block(result, self.send_reads, self.send_writes)) throw self.failure(result);
  return 0;
}

size_t TlsStream::try_receive(std::span<iovec> vectors) {
  const OpenSsl& lib = openssl();
  Session& self = *session_;
  if (self.late_failure) throw Error(*self.late_failure);
  size_t total = 0;
  for (const iovec& vector : vectors) {
    size_t done = 0;
    while (done < vector.iov_len) {
      lib.ERR_clear_error();
      size_t got = 0;
      const int result = lib.SSL_read_ex(self.ssl, static_cast<std::byte*>(vector.iov_base) + done,
                                         vector.iov_len - done, &got);
      if (result == 1) {
        done += got;
        total += got;
        continue;
      }
      std::optional<Error> error;
      if (!self.would_block(result, self.receive_reads, self.receive_writes)) {
        error = self.failure(result);
      } else if (self.send_failure) {
        self.broken = true;
        error = *self.send_failure;
      }
      if (error && total == 0) throw Error(*error);
      self.late_failure = std::move(error);
      self.may_hold_bytes = self.late_failure.has_value();
      return total;
    }
  }
  self.may_hold_bytes = true;
  return total;
}

bool TlsStream::wait(bool readable, bool writable, int milliseconds) {
  Session& self = *session_;
  if (readable && self.may_hold_bytes) return true;
  const bool reads = (readable && self.receive_reads) || (writable && self.send_reads);
  const bool writes = (readable && self.receive_writes) || (writable && self.send_writes);
  return self.socket.wait(reads, writes, milliseconds);
}

void TlsStream::set_low_water(int bytes) noexcept { session_->socket.set_low_water(bytes); }

std::string tls_library() { return openssl().OpenSSL_version(OPENSSL_VERSION); }

}  // namespace rdmaload

#else

#include "core/error.h"

namespace rdmaload {
namespace {

[[noreturn]] void refuse() {
  throw Error(
      ErrorCode::kNotSupported,
      "this build of rdmaload has no TLS: OpenSSL's headers were missing when it was built. Install them "
      "(Debian, Ubuntu: apt-get install libssl-dev; Fedora, RHEL: dnf install openssl-devel) and build "
      "again, or install a wheel of ours");
}

}  // namespace

struct TlsStream::Session {};

TlsContext::TlsContext(TlsOptions) { refuse(); }
TlsContext::~TlsContext() = default;
TlsStream::TlsStream(Socket, const TlsContext&, const std::string&, Deadline, const GiveUp&) { refuse(); }
TlsStream::~TlsStream() = default;
TlsStream::TlsStream(TlsStream&&) noexcept = default;
TlsStream& TlsStream::operator=(TlsStream&&) noexcept = default;
size_t TlsStream::try_send(std::span<const std::byte>) { refuse(); }
size_t TlsStream::try_receive(std::span<iovec>) { refuse(); }
bool TlsStream::wait(bool, bool, int) { refuse(); }
void TlsStream::set_low_water(int) noexcept {}
std::string tls_library() { refuse(); }

}  // namespace rdmaload

#endif
