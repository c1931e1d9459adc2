// What a build without OpenSSL says; linked with a tls.cpp that was compiled so.
#include <doctest/doctest.h>

#include "core/error.h"
#include "transport/tls.h"

namespace rdmaload {
namespace {

template <typename Use>
void check_refused(Use use) {
  try {
    use();
    FAIL("nothing was thrown");
  } catch (const Error& error) {
    const std::string text = error.what();
    CHECK(error.code() == ErrorCode::kNotSupported);
    CHECK(text.find("OpenSSL") != std::string::npos);
    CHECK(text.find("libssl-dev") != std::string::npos);
  }
}

TEST_CASE("a build without OpenSSL refuses TLS, naming what is missing and what to install") {
  check_refused([] { TlsContext context{TlsOptions{}}; });
  check_refused([] { tls_library(); });
}

}  // namespace
}  // namespace rdmaload
