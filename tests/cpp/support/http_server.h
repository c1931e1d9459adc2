// An HTTP/1.1 server for one test, on the sessions of resp_server.h: a script answers request by request.
#pragma once

#include <algorithm>
#include <cctype>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "support/resp_server.h"

namespace rdmaload::testing {

using HttpServer = RespServer;
using HttpSession = RespSession;

struct HttpRequest {
  std::string method, target;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string header(const std::string& name) const {
    const auto found = headers.find(name);
    return found == headers.end() ? "" : found->second;
  }
  // Of "Range: bytes=FIRST-LAST".
  std::pair<size_t, size_t> range() const {
    const std::string text = header("range");
    const auto dash = text.find('-');
    return {std::stoul(text.substr(6, dash - 6)), std::stoul(text.substr(dash + 1))};
  }
};

inline std::optional<HttpRequest> next_request(HttpSession& session) {
  const auto head = session.receive_until("\r\n\r\n");
  if (!head) return std::nullopt;
  HttpRequest request;
  request.method = head->substr(0, head->find(' '));
  const auto target = request.method.size() + 1;
  request.target = head->substr(target, head->find(' ', target) - target);
  for (size_t at = head->find("\r\n") + 2; at + 2 < head->size();) {
    const auto end = head->find("\r\n", at);
    const std::string line = head->substr(at, end - at);
    const auto colon = line.find(": ");
    std::string name = line.substr(0, colon);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    request.headers[name] = line.substr(colon + 2);
    at = end + 2;
  }
  return request;
}

inline std::string response(const std::string& status, const std::string& headers, std::string_view body) {
  return "HTTP/1.1 " + status + "\r\n" + headers + "Content-Length: " + std::to_string(body.size()) +
         "\r\n\r\n" + std::string(body);
}

// What an honest store answers: objects by path, each with an ETag, by range.
class HttpStore {
 public:
  void put(const std::string& path, std::string value) {
    std::lock_guard lock(mutex_);
    values_[path] = std::move(value);
  }
  static std::string range_headers(size_t first, size_t last, size_t total, const std::string& etag) {
    return "Content-Range: bytes " + std::to_string(first) + "-" + std::to_string(last) + "/" +
           std::to_string(total) + "\r\nETag: " + etag + "\r\nAccept-Ranges: bytes\r\n";
  }
  std::string answer(const HttpRequest& request) const {
    std::lock_guard lock(mutex_);
    const auto found = values_.find(request.target);
    if (found == values_.end()) return response("404 Not Found", "", "<Error><Code>NoSuchKey</Code></Error>");
    const std::string& value = found->second;
    const auto [first, asked] = request.range();
    if (first >= value.size()) {
      return response("416 Range Not Satisfiable",
                      "Content-Range: bytes */" + std::to_string(value.size()) + "\r\n", "");
    }
    const size_t last = std::min(asked, value.size() - 1);
    return response("206 Partial Content", range_headers(first, last, value.size(), "\"1\""),
                    std::string_view(value).substr(first, last - first + 1));
  }
  // A script that serves until the client leaves.
  void serve(HttpSession& session) const {
    while (const auto request = next_request(session)) {
      if (!session.send(answer(*request))) return;
    }
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, std::string> values_;  // Guarded by mutex_.
};

}  // namespace rdmaload::testing
