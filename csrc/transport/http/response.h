// HTTP/1.1 responses: a parser that does no I/O.
//
// parse_head() reads a status line and headers; ChunkedBody finds the payload in a chunked body. Both are
// functions of the bytes received so far: bytes of weights never pass through here.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace rdmaload::http {

constexpr size_t kMaxHeadBytes = 64 << 10;      // status line and headers; anything longer is refused
constexpr size_t kMaxChunkLineBytes = 4 << 10;  // size and extensions of one chunk
constexpr size_t kMaxTrailerBytes = 64 << 10;   // of a chunked body

// "bytes 0-9/100", "bytes 0-9/*" or, of a range that was refused, "bytes */100".
struct ContentRange {
  bool satisfied = false;
  uint64_t first = 0, last = 0;   // inclusive; meaningful when satisfied
  std::optional<uint64_t> total;  // nullopt: the server does not know
};

struct ResponseHead {
  int status = 0;
  bool keep_alive = true;
  bool chunked = false;
  std::optional<uint64_t> content_length;
  std::optional<ContentRange> content_range;
  std::string etag;  // with its quotes
  std::string location;
  std::string content_encoding;
  std::optional<int> retry_after_seconds;
  std::optional<std::chrono::sys_seconds> retry_after_date;  // the other form of that header
  size_t consumed = 0;                                       // bytes of the head, the empty line included
};

// nullopt: more bytes are needed. Throws Error(kFormat) for what can never become a response.
std::optional<ResponseHead> parse_head(std::string_view bytes);

// Two ETags of one content; the mark of a weak one is not part of it.
bool same_etag(std::string_view a, std::string_view b);

// The text of <Code> and <Message> in an error document of S3 and its likes, fit to be shown; empty when the
// body is something else.
struct ErrorDocument {
  std::string code;
  std::string message;
};
ErrorDocument parse_error_document(std::string_view body);

// Walks a chunked body: which bytes are framing, and how many bytes of payload follow.
class ChunkedBody {
 public:
  // Takes framing from the front of `bytes`, as much as there is; returns how many bytes. Stops at payload.
  // Throws Error(kFormat).
  size_t take_framing(std::string_view bytes);
  // Payload bytes that come next, before more framing.
  uint64_t payload() const noexcept { return payload_; }
  void payload_received(uint64_t bytes) noexcept { payload_ -= bytes; }
  bool done() const noexcept { return state_ == State::kDone; }

 private:
  enum class State { kSize, kAfterPayload, kTrailer, kDone };
  void line_ended();

  State state_ = State::kSize;
  uint64_t payload_ = 0;
  std::string line_;
  size_t trailer_bytes_ = 0;
};

}  // namespace rdmaload::http
