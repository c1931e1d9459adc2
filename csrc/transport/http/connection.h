// One HTTP/1.1 connection: a request at a time, the head of its response, and the body into its final place.
//
// Belongs to one thread at a time. Any failure is thrown as an Error (kUnavailable, kTimeout, kFormat,
// kCancelled) and leaves the connection good for nothing but being destroyed.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "core/deadline.h"
#include "memory/host_arena.h"
#include "transport/byte_stream.h"
#include "transport/http/response.h"
#include "transport/segment_cursor.h"

namespace rdmaload::http {

// How long to wait for the next byte, and what ends the wait early.
struct Patience {
  std::chrono::duration<double> silence;
  const GiveUp& give_up;
};

class Connection {
 public:
  explicit Connection(ByteStream stream);

  // Sends a request without a body and receives the head of its response; interim ones (1xx) are skipped.
  const ResponseHead& request(std::string_view text, const Patience& patience);
  // Whether any byte of the response to the last request has come.
  bool answered() const noexcept { return answered_; }

  // Moves what there is of the body, at least one byte, to the cursor's places. Throws kUnavailable when the
  // body ends before the cursor is full.
  void receive(SegmentCursor& cursor, const Patience& patience);
  // The rest of a body that is not weights, at most `limit` bytes of it.
  std::string receive_text(size_t limit, const Patience& patience);

  // Whether the next request may be sent: the body was received to its end and the server keeps the
  // connection.
  bool reusable();

 private:
  void send(std::string_view text, const Patience& patience);
  size_t receive_some(std::span<iovec> vectors, const Patience& patience);
  void receive_more(const Patience& patience);
  void find_payload(const Patience& patience);
  void moved(uint64_t bytes);

  ByteStream stream_;
  HostArena scratch_;
  std::string in_;  // received and not yet used: a head, framing, the start of a body
  size_t in_used_ = 0;
  ResponseHead head_;
  std::optional<ChunkedBody> chunked_;
  uint64_t payload_ = 0;      // bytes of the body that follow without framing
  bool body_ended_ = true;    // nothing of the last response is left
  bool until_close_ = false;  // the body has no length: it ends with the connection
  bool answered_ = false;
};

}  // namespace rdmaload::http
