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

}  // namespace rdmaload
