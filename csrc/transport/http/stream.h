// What an HTTP connection needs of a byte stream: TCP here, TLS beside it.
//
// Owns its socket; belongs to one thread at a time. Never blocks but in wait(). Errors name the endpoint.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <memory>
#include <span>

#include "core/deadline.h"
#include "transport/http/url.h"
#include "transport/socket.h"

namespace rdmaload::http {

class Stream {
 public:
  virtual ~Stream() = default;
  // Bytes taken; 0 when there is no room now. Throws kUnavailable.
  virtual size_t try_send(std::span<const std::byte> bytes) = 0;
  // Bytes received; 0 when there are none now. Throws kUnavailable when the peer closed or reset.
  virtual size_t try_receive(std::span<iovec> vectors) = 0;
  // Waits up to `milliseconds` until it can be read (or, if asked, written). False when the time passed.
  virtual bool wait(bool readable, bool writable, int milliseconds) = 0;
};

// A stream to the server of `url`. Throws kUnavailable, kTimeout, kCancelled; kNotSupported for https in a
// build without TLS.
std::unique_ptr<Stream> connect_stream(const Url& url, Deadline deadline, const GiveUp& give_up);

}  // namespace rdmaload::http
