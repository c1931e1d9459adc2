#include "transport/openssl.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>

#include "core/error.h"

#define RDMALOAD_TEXT_OF(x) #x
#define RDMALOAD_TEXT(x) RDMALOAD_TEXT_OF(x)

namespace rdmaload {

OpenSsl::OpenSsl(const char* soname) {
  const auto refuse = [soname](const std::string& problem) -> Error {
    return Error(ErrorCode::kNotSupported, "TLS needs OpenSSL's " + std::string(soname) + ": " + problem +
                                               " (Debian, Ubuntu: apt-get install libssl3; Fedora, RHEL: dnf "
                                               "install openssl-libs)");
  };
  void* library = dlopen(soname, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    throw refuse(why != nullptr ? why : "it cannot be opened");
  }
  // What libssl needs, libcrypto, is searched as well.
#define X(name)                                                   \
  name = reinterpret_cast<decltype(name)>(dlsym(library, #name)); \
  if (name == nullptr) throw refuse("it lacks " #name);
  RDMALOAD_OPENSSL_FUNCTIONS(X)
#undef X
}

const OpenSsl& openssl() {
  // The layout of structures and the numbers of errors are those of the headers' major version.
  static const OpenSsl* const opened = new OpenSsl("libssl.so." RDMALOAD_TEXT(OPENSSL_SHLIB_VERSION));
  return *opened;
}

std::string openssl_error() {
  const OpenSsl& ssl = openssl();
  const unsigned long error = ssl.ERR_peek_last_error();
  if (error == 0) return "no reason given";
  char text[256];
  ssl.ERR_error_string_n(error, text, sizeof(text));
  // "error:0A000086:SSL routines::certificate verify failed": what is after the last colon says it.
  const std::string_view whole = text;
  const size_t colon = whole.rfind(':');
  return std::string(colon == std::string_view::npos ? whole : whole.substr(colon + 1));
}

Error unusable_file(const char* option, const std::string& path) {
  const bool readable = ::access(path.c_str(), R_OK) == 0;
  const std::string reason = readable ? openssl_error() : std::strerror(errno);
  return Error(ErrorCode::kAuthentication, std::string(option) + "=" + path + " cannot be used: " + reason);
}

int no_password(char*, int, int, void*) { return -1; }

ContextPtr make_context(const SSL_METHOD* method, long mode) {
  // What one recv may bring: several records of 16 KiB. OpenSSL alone asks for 5 bytes and then for a record.
  constexpr size_t kReadAheadBytes = 128 << 10;
  const OpenSsl& ssl = openssl();
  ssl.ERR_clear_error();
  ContextPtr made(ssl.SSL_CTX_new(method));
  SSL_CTX* const context = made.get();
  if (context == nullptr) throw Error(ErrorCode::kNotSupported, "OpenSSL cannot start: " + openssl_error());
  ssl.SSL_CTX_ctrl(context, SSL_CTRL_SET_MIN_PROTO_VERSION, TLS1_2_VERSION, nullptr);
  ssl.SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  ssl.SSL_CTX_ctrl(context, SSL_CTRL_MODE,
                   SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | mode, nullptr);
  ssl.SSL_CTX_ctrl(context, SSL_CTRL_SET_READ_AHEAD, 1, nullptr);
  ssl.SSL_CTX_set_default_read_buffer_len(context, kReadAheadBytes);
  ssl.SSL_CTX_set_default_passwd_cb(context, no_password);
  return made;
}

void use_certificate(SSL_CTX* context, const char* cert_option, const std::string& cert_file,
                     const char* key_option, const std::string& key_file) {
  const OpenSsl& ssl = openssl();
  if (ssl.SSL_CTX_use_certificate_chain_file(context, cert_file.c_str()) != 1) {
    throw unusable_file(cert_option, cert_file);
  }
  const bool together = key_file.empty();
  const std::string& key = together ? cert_file : key_file;
  if (ssl.SSL_CTX_use_PrivateKey_file(context, key.c_str(), SSL_FILETYPE_PEM) != 1 ||
      ssl.SSL_CTX_check_private_key(context) != 1) {
    throw unusable_file(together ? cert_option : key_option, key);
  }
}

BIO_METHOD* make_bio_method(const char* name, BioRead read, BioWrite write) {
  const OpenSsl& ssl = openssl();
  BIO_METHOD* const made = ssl.BIO_meth_new(ssl.BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, name);
  ssl.BIO_meth_set_read_ex(made, read);
  ssl.BIO_meth_set_write_ex(made, write);
  ssl.BIO_meth_set_ctrl(
      made, [](BIO*, int command, long, void*) -> long { return command == BIO_CTRL_FLUSH ? 1 : 0; });
  ssl.BIO_meth_set_create(made, [](BIO* bio) -> int {
    openssl().BIO_set_init(bio, 1);
    return 1;
  });
  return made;
}

}  // namespace rdmaload
