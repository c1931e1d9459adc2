// The functions of OpenSSL that this project calls, from the libssl that is opened at run time.
//
// Opened rather than linked: an import then never fails for want of it, security updates of the machine
// apply, the machine's own store of certificates is found, and in a Python process it is the very library
// that the ssl module uses. Only headers are needed to build; a build without them has no TLS and says so.
// Included by tls.cpp and tls_server.cpp alone.
#pragma once

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>
#include <openssl/x509v3.h>

#include <memory>
#include <string>

#include "core/error.h"

namespace rdmaload {

#define RDMALOAD_OPENSSL_FUNCTIONS(X)    \
  X(BIO_clear_flags)                     \
  X(BIO_get_data)                        \
  X(BIO_get_new_index)                   \
  X(BIO_meth_new)                        \
  X(BIO_meth_set_create)                 \
  X(BIO_meth_set_ctrl)                   \
  X(BIO_meth_set_read_ex)                \
  X(BIO_meth_set_write_ex)               \
  X(BIO_new)                             \
  X(BIO_set_data)                        \
  X(BIO_set_flags)                       \
  X(BIO_set_init)                        \
  X(ERR_clear_error)                     \
  X(ERR_error_string_n)                  \
  X(ERR_peek_last_error)                 \
  X(OpenSSL_version)                     \
  X(SSL_CTX_check_private_key)           \
  X(SSL_CTX_ctrl)                        \
  X(SSL_CTX_free)                        \
  X(SSL_CTX_load_verify_dir)             \
  X(SSL_CTX_load_verify_file)            \
  X(SSL_CTX_new)                         \
  X(SSL_CTX_set_default_passwd_cb)       \
  X(SSL_CTX_set_default_read_buffer_len) \
  X(SSL_CTX_set_default_verify_paths)    \
  X(SSL_CTX_set_options)                 \
  X(SSL_CTX_set_session_id_context)      \
  X(SSL_CTX_set_verify)                  \
  X(SSL_CTX_use_PrivateKey_file)         \
  X(SSL_CTX_use_certificate_chain_file)  \
  X(SSL_connect)                         \
  X(SSL_ctrl)                            \
  X(SSL_free)                            \
  X(SSL_get0_param)                      \
  X(SSL_get_error)                       \
  X(SSL_get_verify_result)               \
  X(SSL_is_init_finished)                \
  X(SSL_new)                             \
  X(SSL_read_ex)                         \
  X(SSL_set_accept_state)                \
  X(SSL_set_bio)                         \
  X(SSL_shutdown)                        \
  X(SSL_write_ex)                        \
  X(TLS_client_method)                   \
  X(TLS_server_method)                   \
  X(X509_VERIFY_PARAM_set1_host)         \
  X(X509_VERIFY_PARAM_set1_ip_asc)       \
  X(X509_VERIFY_PARAM_set_hostflags)     \
  X(X509_verify_cert_error_string)

struct OpenSsl {
  // Opens this library; throws kNotSupported, which names it and what to install.
  explicit OpenSsl(const char* soname);
#define X(name) decltype(&::name) name;
  RDMALOAD_OPENSSL_FUNCTIONS(X)
#undef X
};

// The process's one, opened at first use and never closed: other libraries may use it until the end.
const OpenSsl& openssl();

// Why the last call of this thread failed, in OpenSSL's words.
std::string openssl_error();
// The file of this option cannot be used, and why.
Error unusable_file(const char* option, const std::string& path);
// A password callback that asks nobody: a terminal would wait for ever.
int no_password(char*, int, int, void*);

struct ContextDeleter {
  void operator()(SSL_CTX* context) const noexcept { openssl().SSL_CTX_free(context); }
};
using ContextPtr = std::unique_ptr<SSL_CTX, ContextDeleter>;
// What both sides want of TLS: 1.2 or newer, no renegotiation, no compression, partial writes. `mode` is
// added.
ContextPtr make_context(const SSL_METHOD* method, long mode = 0);
// The certificate that this side shows, and its key (empty: in the same file). Throws what unusable_file()
// says of `cert_option` or `key_option`.
void use_certificate(SSL_CTX* context, const char* cert_option, const std::string& cert_file,
                     const char* key_option, const std::string& key_file);
// A way to give OpenSSL bytes by callbacks. Made once per process and kind, and never freed, as the library
// is never closed.
using BioRead = int (*)(BIO*, char*, size_t, size_t*);
using BioWrite = int (*)(BIO*, const char*, size_t, size_t*);
BIO_METHOD* make_bio_method(const char* name, BioRead read, BioWrite write);

}  // namespace rdmaload
