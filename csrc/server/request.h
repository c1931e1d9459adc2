// RESP requests: an incremental parser that does no I/O.
//
// It takes bytes from the front of what has arrived and copies small arguments into memory of its own, so
// that the caller's buffer is free again after each call. An argument above `kSmallArgumentBytes` is only
// announced: the caller takes its bytes from the stream itself, straight into their final memory, and says
// so. Inline commands (telnet, `PING\r\n`) are understood, too. What it holds is bounded by its limits and
// follows what was received, never what was announced. One thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rdmaload::server {

constexpr size_t kSmallArgumentBytes = 16 << 10;  // keys, names and options are below; weights are above
constexpr uint64_t kMaxArgumentBytes = uint64_t{512} << 20;  // Redis' own default, proto-max-bulk-len

struct RequestLimits {
  size_t arguments = 16 << 10;  // an MGET keeps a reference for each until it is answered
  size_t bytes = 4 << 20;       // of all small arguments of one request together
};

// What a client may send before it has said who it is; Redis' own bounds.
constexpr RequestLimits kUnknownClientLimits{10, 64 << 10};

class RequestParser {
 public:
  enum class Event {
    kMore,           // everything was taken; the request is not complete
    kRequest,        // arguments() hold it until the next call
    kLargeArgument,  // the next large_bytes() of the stream are argument number arguments_so_far()
    kError,          // error() says why; the stream cannot be understood any more
  };

  void set_limits(const RequestLimits& limits) { limits_ = limits; }

  // Takes from the front of `bytes` what belongs to the event.
  Event next(std::string_view& bytes);

  // A large argument's place holds an empty text.
  const std::vector<std::string_view>& arguments() const noexcept { return arguments_; }
  const std::string& error() const noexcept { return error_; }

  // Meaningful after kLargeArgument. Arguments that came before it can be looked at.
  uint64_t large_bytes() const noexcept { return body_left_; }
  size_t arguments_so_far() const noexcept { return ends_.size(); }
  std::string_view argument_so_far(size_t index) const;
  // The caller has taken all of large_bytes() from the stream.
  void large_argument_taken();

  // The request that next() gave last is done with: what it took is given back, but for a little.
  void forget_request() noexcept {
    if (done_) reset();
  }
  // Gives up a request that is not complete, with what it took.
  void drop_request() noexcept { reset(); }
  // What it has taken from the system.
  size_t held_bytes() const noexcept {
    return text_.capacity() + line_.capacity() + ends_.capacity() * sizeof(size_t) +
           arguments_.capacity() * sizeof(std::string_view);
  }

  // Whether a request has begun that is not complete.
  bool partial() const noexcept { return state_ != State::kStart || !line_.empty(); }

 private:
  enum class State { kStart, kLength, kBody, kLarge, kBodyEnd, kFailed };

  // A whole line without its end; false while more is needed or when it failed.
  bool take_line(std::string_view& bytes, size_t max_bytes);
  Event fail(std::string message);
  Event begin_array();
  Event begin_argument();
  Event inline_request();
  bool split_inline(std::string_view text);
  bool add_inline(std::string_view word);
  Event complete();
  void reset() noexcept;

  RequestLimits limits_;
  State state_ = State::kStart;
  bool done_ = false;  // the last call gave a request, whose memory this one may reuse
  std::string line_;   // of a header or an inline command, as far as it has arrived
  std::string text_;   // the small arguments, back to back
  std::vector<size_t> ends_;
  std::vector<std::string_view> arguments_;
  uint64_t arguments_left_ = 0;
  uint64_t body_left_ = 0;
  std::string error_;
};

}  // namespace rdmaload::server
