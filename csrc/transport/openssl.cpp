#include "transport/openssl.h"

#include <dlfcn.h>

#include <string>

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

}  // namespace rdmaload
