// TLS for a server in the test's own process: certificates made on the spot, and a wire that encrypts.
//
// Uses OpenSSL as it is linked, so that what is tested, which opens it at run time, meets another user of it.
#pragma once

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <signal.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "support/resp_server.h"
#include "support/temp_dir.h"

namespace rdmaload::testing {

struct Certificate {
  std::shared_ptr<X509> x509;
  std::shared_ptr<EVP_PKEY> key;
};

struct CertificateSpec {
  std::string name = "test";
  std::string subject_names = "DNS:localhost,IP:127.0.0.1";  // empty: an authority
  int days_until_start = -2, days_until_end = 2;
};

// Signed by `authority`; by itself without one.
inline Certificate make_certificate(const CertificateSpec& spec, const Certificate* authority = nullptr) {
  static std::atomic<long> serial{1};
  Certificate made{{X509_new(), X509_free}, {EVP_EC_gen("P-256"), EVP_PKEY_free}};
  X509* const x509 = made.x509.get();
  X509_set_version(x509, 2);
  ASN1_INTEGER_set(X509_get_serialNumber(x509), serial++);
  X509_time_adj_ex(X509_getm_notBefore(x509), spec.days_until_start, 0, nullptr);
  X509_time_adj_ex(X509_getm_notAfter(x509), spec.days_until_end, 0, nullptr);
  X509_set_pubkey(x509, made.key.get());
  X509_NAME* const name = X509_get_subject_name(x509);
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_UTF8,
                             reinterpret_cast<const unsigned char*>(spec.name.c_str()), -1, -1, 0);
  const Certificate& signer = authority != nullptr ? *authority : made;
  X509_set_issuer_name(x509, X509_get_subject_name(signer.x509.get()));
  const auto extend = [&](int id, const std::string& value) {
    X509V3_CTX context;
    X509V3_set_ctx_nodb(&context);
    X509V3_set_ctx(&context, signer.x509.get(), x509, nullptr, nullptr, 0);
    X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, id, value.c_str());
    if (extension == nullptr) throw std::runtime_error("no such extension: " + value);
    X509_add_ext(x509, extension, -1);
    X509_EXTENSION_free(extension);
  };
  if (spec.subject_names.empty()) {
    extend(NID_basic_constraints, "critical,CA:TRUE");
  } else {
    extend(NID_subject_alt_name, spec.subject_names);
  }
  if (X509_sign(x509, signer.key.get(), EVP_sha256()) == 0) throw std::runtime_error("cannot sign");
  return made;
}

// The file's path. A password encrypts the key.
inline std::string write_pem(const TempDir& directory, const std::string& name, X509* x509,
                             EVP_PKEY* key = nullptr, const char* password = nullptr) {
  const std::string path = (directory.path() / name).string();
  std::FILE* const file = std::fopen(path.c_str(), "w");
  if (file == nullptr) throw std::runtime_error("cannot write " + path);
  if (x509 != nullptr) PEM_write_X509(file, x509);
  if (key != nullptr) {
    PEM_write_PrivateKey(file, key, password != nullptr ? EVP_aes_128_cbc() : nullptr, nullptr, 0, nullptr,
                         const_cast<char*>(password));
  }
  std::fclose(file);
  return path;
}

struct TlsServerOptions {
  Certificate certificate;
  const Certificate* client_authority = nullptr;  // clients need a certificate from it
  int oldest = TLS1_2_VERSION, newest = TLS1_3_VERSION;
};

// The server's side of TLS on one connection; belongs to the session's thread.
class TlsWire final : public Wire {
 public:
  TlsWire(SSL_CTX* context, int fd) : ssl_(SSL_new(context), SSL_free) { SSL_set_fd(ssl_.get(), fd); }

  ssize_t send(const char* from, size_t size) override {
    size_t sent = 0;
    return ready() && SSL_write_ex(ssl_.get(), from, size, &sent) == 1 ? static_cast<ssize_t>(sent) : -1;
  }
  ssize_t receive(char* to, size_t size) override {
    size_t got = 0;
    return ready() && SSL_read_ex(ssl_.get(), to, size, &got) == 1 ? static_cast<ssize_t>(got) : -1;
  }
  void end() override {
    if (accepted_ && SSL_get_shutdown(ssl_.get()) == 0) SSL_shutdown(ssl_.get());
  }
  // New keys for both directions, which the client has to answer (TLS 1.3).
  void update_keys() {
    if (ready()) SSL_key_update(ssl_.get(), SSL_KEY_UPDATE_REQUESTED);
  }

 private:
  bool ready() {
    if (!accepted_) {
      // OpenSSL writes with write(2): a client that is gone must not end the test.
      sigset_t pipe;
      sigemptyset(&pipe);
      sigaddset(&pipe, SIGPIPE);
      pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
      accepted_ = SSL_accept(ssl_.get()) == 1;
    }
    return accepted_;
  }
  std::unique_ptr<SSL, decltype(&SSL_free)> ssl_;
  bool accepted_ = false;
};

// What RespServer takes to speak TLS, and what its clients asked for.
class TlsSide {
 public:
  explicit TlsSide(const TlsServerOptions& options)
      : context_(SSL_CTX_new(TLS_server_method()), SSL_CTX_free) {
    SSL_CTX* const context = context_.get();
    SSL_CTX_set_min_proto_version(context, options.oldest);
    SSL_CTX_set_max_proto_version(context, options.newest);
    if (options.newest < TLS1_2_VERSION) SSL_CTX_set_cipher_list(context, "DEFAULT:@SECLEVEL=0");
    SSL_CTX_use_certificate(context, options.certificate.x509.get());
    SSL_CTX_use_PrivateKey(context, options.certificate.key.get());
    if (options.client_authority != nullptr) {
      X509_STORE_add_cert(SSL_CTX_get_cert_store(context), options.client_authority->x509.get());
      SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
    }
    SSL_CTX_set_tlsext_servername_callback(context, note_name);
    SSL_CTX_set_tlsext_servername_arg(context, this);
  }
  RespServer::Wrap wrap() {
    return [this](int fd) { return std::make_unique<TlsWire>(context_.get(), fd); };
  }
  // The name that the last client asked for; "" when it asked for none.
  std::string asked_name() const {
    std::lock_guard lock(mutex_);
    return name_;
  }

 private:
  static int note_name(SSL* ssl, int*, void* self) {
    auto& side = *static_cast<TlsSide*>(self);
    const char* name = SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name);
    std::lock_guard lock(side.mutex_);
    side.name_ = name != nullptr ? name : "";
    return SSL_TLSEXT_ERR_OK;
  }
  std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context_;
  mutable std::mutex mutex_;
  std::string name_;  // Guarded by mutex_.
};

}  // namespace rdmaload::testing
