// http and https urls: text to what a connection and a request line need, and a redirect's Location. Pure.
#pragma once

#include <string>
#include <string_view>

namespace rdmaload::http {

struct Url {
  bool tls = false;
  std::string host;  // without the brackets of an IPv6 address
  int port = 80;
  std::string target = "/";  // path and query, as they are sent; the query may be a secret

  bool same_server(const Url& other) const {
    return tls == other.tls && host == other.host && port == other.port;
  }
  // "host", "host:8080", "[::1]:8080": the port only where it is not the scheme's own.
  std::string authority() const;
  // Safe to show: scheme, authority and path without the query.
  std::string shown() const;
};

// Throws kInvalid for what is no http(s) url, has a user in it, or holds a byte that a request line must not
// hold. The message does not show the query.
Url parse_url(std::string_view text);
// What a Location header means for a request to `base`: an absolute url, or a path on the same server.
Url resolve_location(const Url& base, std::string_view location);

}  // namespace rdmaload::http
