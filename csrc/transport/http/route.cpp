#include "transport/http/route.h"

#include "core/error.h"
#include "transport/http/response.h"

namespace rdmaload::http {
namespace {

constexpr int kPollMilliseconds = 20;

void wait(Socket& socket, bool writable, Deadline deadline, const GiveUp& give_up, const std::string& proxy) {
  if (give_up()) throw Error(ErrorCode::kCancelled, "connecting was cancelled");
  if (deadline.passed()) throw Error(ErrorCode::kTimeout, "the proxy " + proxy + " did not answer in time");
  socket.wait(!writable, writable, deadline.poll_milliseconds(kPollMilliseconds));
}

// Asks the proxy to carry bytes to the server.
void open_tunnel(Socket& socket, const Route& route, Deadline deadline, const GiveUp& give_up) {
  const std::string proxy = route.proxy->authority();
  const bool six = route.server.host.find(':') != std::string::npos;
  const std::string place =
      (six ? "[" + route.server.host + "]" : route.server.host) + ":" + std::to_string(route.server.port);
  std::string text = "CONNECT " + place + " HTTP/1.1\r\nHost: " + place + "\r\n";
  if (!route.proxy_authorization.empty()) {
    text += "Proxy-Authorization: " + route.proxy_authorization + "\r\n";
  }
  text += "\r\n";
  for (size_t sent = 0; sent < text.size();) {
    const size_t now = socket.try_send(std::as_bytes(std::span(text).subspan(sent)));
    sent += now;
    if (now == 0) wait(socket, true, deadline, give_up, proxy);
  }
  std::string in;
  for (;;) {
    // One by one: what follows the answer is the server's, for TLS. It is short, and comes once a connection.
    std::byte byte;
    if (socket.try_receive(std::span(&byte, 1)) == 0) {
      wait(socket, false, deadline, give_up, proxy);
      continue;
    }
    in += static_cast<char>(byte);
    const auto head = parse_head(in);
    if (!head) continue;
    if (head->status >= 200 && head->status < 300) return;
    throw Error(head->status == 407 ? ErrorCode::kAuthentication : ErrorCode::kUnavailable,
                "the proxy " + proxy + " answered " + std::to_string(head->status) + " to CONNECT " + place);
  }
}

}  // namespace

std::string Route::key() const {
  const std::string own =
      server.shown().substr(0, server.shown().find(server.authority())) + server.authority();
  return proxy ? own + " " + proxy->authority() + " " + proxy_authorization : own;
}

ByteStream connect(const Route& route, const TlsContext* tls, Deadline deadline, const GiveUp& give_up) {
  if (route.server.tls && tls == nullptr) {
    throw Error(ErrorCode::kNotSupported, "https to " + route.server.authority() +
                                              " needs TLS, which this build or machine does not have");
  }
  const Url& first = route.proxy ? *route.proxy : route.server;
  if (route.proxy && route.proxy->tls) {
    throw Error(ErrorCode::kNotSupported,
                "the proxy " + first.authority() + " is reached by TLS: use an http:// proxy");
  }
  if (!route.proxy || !route.server.tls) {
    return ByteStream::connect({first.host, first.port, {}}, route.server.tls ? tls : nullptr, deadline,
                               give_up);
  }
  Socket socket = Socket::connect(first.host, first.port, deadline, give_up);
  open_tunnel(socket, route, deadline, give_up);
  return ByteStream::over(std::move(socket), tls, route.server.host, deadline, give_up);
}

}  // namespace rdmaload::http
