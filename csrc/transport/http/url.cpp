#include "transport/http/url.h"

#include <algorithm>
#include <charconv>

#include "core/error.h"

namespace rdmaload::http {
namespace {

std::string lower(std::string_view text) {
  std::string result(text);
  std::transform(result.begin(), result.end(), result.begin(),
                 [](unsigned char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  return result;
}

std::string_view without_query(std::string_view text) { return text.substr(0, text.find_first_of("?#")); }

[[noreturn]] void refuse(std::string_view text, const char* why) {
  const bool printable = std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 0x7f; });
  throw Error(
      ErrorCode::kInvalid,
      "the url " + (printable ? "'" + std::string(without_query(text)) + "' " : "") + std::string(why));
}

// Some servers send names as they are where a url is to be encoded.
std::string sendable(std::string_view text) {
  constexpr std::string_view kHex = "0123456789ABCDEF";
  std::string result;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte > ' ' && byte < 0x7f) {
      result += c;
    } else {
      result += {'%', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return result;
}

}  // namespace

std::string Url::authority() const {
  const std::string name = host.find(':') == std::string::npos ? host : "[" + host + "]";
  return port == (tls ? 443 : 80) ? name : name + ":" + std::to_string(port);
}

std::string Url::shown() const {
  return (tls ? "https://" : "http://") + authority() + std::string(without_query(target));
}

Url parse_url(std::string_view text) {
  Url url;
  const auto scheme_end = text.find("://");
  if (scheme_end == std::string_view::npos) refuse(text, "has no scheme");
  const std::string scheme = lower(text.substr(0, scheme_end));
  if (scheme != "http" && scheme != "https") refuse(text, "is neither http nor https");
  url.tls = scheme == "https";
  url.port = url.tls ? 443 : 80;
  std::string_view rest = text.substr(scheme_end + 3);
  const auto authority_end = std::min(rest.find_first_of("/?#"), rest.size());
  std::string_view authority = rest.substr(0, authority_end);
  rest = rest.substr(authority_end);
  rest = rest.substr(0, rest.find('#'));  // a fragment is never sent
  // Not shown: what stands before the "@" is a secret.
  if (authority.find('@') != std::string_view::npos)
    refuse("", "has a user in it: pass credentials as headers");
  std::string_view port;
  if (authority.starts_with('[')) {
    const auto bracket = authority.find(']');
    if (bracket == std::string_view::npos) refuse(text, "has a bracket that does not close");
    url.host = lower(authority.substr(1, bracket - 1));
    port = authority.substr(bracket + 1);
    if (!port.empty() && port[0] != ':') refuse(text, "has something between ']' and the port");
  } else {
    const auto colon = authority.find(':');
    url.host = lower(authority.substr(0, colon));
    if (colon != std::string_view::npos) port = authority.substr(colon);
  }
  if (url.host.empty()) refuse(text, "names no host");
  if (port.size() > 1) {
    const auto [end, error] = std::from_chars(port.data() + 1, port.data() + port.size(), url.port);
    if (error != std::errc() || end != port.data() + port.size() || url.port < 1 || url.port > 65535) {
      refuse(text, "has a port that is no number from 1 to 65535");
    }
  }
  url.target = rest.starts_with('/') ? std::string(rest) : "/" + std::string(rest);
  const auto sendable = [](char c) { return c > ' ' && c < 0x7f; };
  if (!std::all_of(url.target.begin(), url.target.end(), sendable) ||
      !std::all_of(url.host.begin(), url.host.end(), sendable)) {
    refuse(text, "holds a space, a control character or a byte above 127: percent-encode it");
  }
  return url;
}

Url resolve_location(const Url& base, std::string_view given) {
  const std::string location = sendable(given);
  if (location.find("://") != std::string_view::npos &&
      location.find("://") < location.find_first_of("/?#") + 1) {
    return parse_url(location);
  }
  const std::string origin = (base.tls ? "https://" : "http://") + base.authority();
  if (location.starts_with("//")) return parse_url((base.tls ? "https:" : "http:") + location);
  if (location.starts_with('/')) return parse_url(origin + location);
  const std::string_view path = without_query(base.target);
  return parse_url(origin + std::string(path.substr(0, path.rfind('/') + 1)) + location);
}

}  // namespace rdmaload::http
