// How a connection to the server of a url is made: directly, with TLS, or through a proxy.
//
// A plain url is asked of the proxy itself (its request names the whole url); for https the proxy only
// carries bytes (CONNECT), and TLS reaches from here to the server.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "transport/byte_stream.h"
#include "transport/http/url.h"

namespace rdmaload::http {

struct Route {
  Url server;
  std::optional<Url> proxy;
  std::string proxy_authorization;  // value of that header; empty: none

  // Requests that may share a connection have the same key. May hold a secret.
  std::string key() const;
  // Whether requests name the whole url, since a proxy reads them.
  bool by_whole_url() const { return proxy && !server.tls; }
};

// Throws kUnavailable, kTimeout, kCancelled, kAuthentication (a certificate, or the proxy's answer),
// kNotSupported for https without `tls`.
ByteStream connect(const Route& route, const TlsContext* tls, Deadline deadline, const GiveUp& give_up);

}  // namespace rdmaload::http
