#include "transport/http/connection.h"

#include <algorithm>
#include <array>
#include <limits>

namespace rdmaload::http {
namespace {

// How long a worker sleeps in poll before it looks whether its read was cancelled.
constexpr int kPollMilliseconds = 20;
// One recv with a checksum: small enough that the checksum right after it reads from the second-level cache.
constexpr size_t kChecksumPieceBytes = 256 << 10;
constexpr size_t kPieceBytes = 1 << 20;
constexpr size_t kScratchBytes = 256 << 10;
constexpr size_t kVectors = 256;
// Heads of object stores have 300 to 900 bytes. What comes with them of the body is copied to its place, so
// this also bounds the copy.
constexpr size_t kHeadPieceBytes = 1 << 10;

}  // namespace

Connection::Connection(ByteStream stream) : stream_(std::move(stream)), scratch_(kScratchBytes) {}

const ResponseHead& Connection::request(std::string_view text, const Patience& patience) {
  answered_ = false;
  body_ended_ = false;
  send(text, patience);
  for (;;) {
    std::optional<ResponseHead> head;
    while (!(head = parse_head(std::string_view(in_).substr(in_used_)))) receive_more(patience);
    in_used_ += head->consumed;
    if (head->status >= 200) {
      head_ = std::move(*head);
      break;
    }
  }
  chunked_.reset();
  payload_ = 0;
  until_close_ = false;
  if (head_.status == 204 || head_.status == 304) {
    body_ended_ = true;
  } else if (head_.chunked) {
    chunked_.emplace();
  } else if (head_.content_length) {
    payload_ = *head_.content_length;
    body_ended_ = payload_ == 0;
  } else {
    payload_ = std::numeric_limits<uint64_t>::max();
    until_close_ = true;
  }
  return head_;
}

void Connection::send(std::string_view text, const Patience& patience) {
  const Deadline silent = Deadline::after(patience.silence);
  while (!text.empty()) {
    const size_t sent = stream_.try_send(std::as_bytes(std::span(text)));
    text.remove_prefix(sent);
    if (sent > 0) continue;
    if (patience.give_up()) throw Error(ErrorCode::kCancelled, "the read was cancelled");
    if (silent.passed()) throw Error(ErrorCode::kTimeout, "the server does not take the request");
    stream_.wait(false, true, silent.poll_milliseconds(kPollMilliseconds));
  }
}

size_t Connection::receive_some(std::span<iovec> vectors, const Patience& patience) {
  const Deadline silent = Deadline::after(patience.silence);
  for (;;) {
    if (patience.give_up()) throw Error(ErrorCode::kCancelled, "the read was cancelled");
    if (const size_t got = stream_.try_receive(vectors); got > 0) {
      answered_ = true;
      return got;
    }
    if (silent.passed()) throw Error(ErrorCode::kTimeout, "no byte came in time");
    stream_.wait(true, false, silent.poll_milliseconds(kPollMilliseconds));
  }
}

void Connection::receive_more(const Patience& patience) {
  stream_.set_low_water(1);
  in_.erase(0, in_used_);
  in_used_ = 0;
  std::array<std::byte, kHeadPieceBytes> piece;
  iovec vector{piece.data(), piece.size()};
  const size_t got = receive_some(std::span(&vector, 1), patience);
  in_.append(reinterpret_cast<const char*>(piece.data()), got);
}

// Until there is payload to receive, or the body has ended.
void Connection::find_payload(const Patience& patience) {
  while (payload_ == 0 && !body_ended_ && chunked_) {
    in_used_ += chunked_->take_framing(std::string_view(in_).substr(in_used_));
    payload_ = chunked_->payload();
    if (chunked_->done()) {
      body_ended_ = true;
    } else if (payload_ == 0) {
      receive_more(patience);
    }
  }
}

void Connection::moved(uint64_t bytes) {
  payload_ -= bytes;
  if (chunked_) chunked_->payload_received(bytes);
  if (payload_ == 0 && !chunked_) body_ended_ = true;
}

void Connection::receive(SegmentCursor& cursor, const Patience& patience) {
  find_payload(patience);
  const uint64_t wanted = std::min(payload_, cursor.left());
  if (wanted == 0) throw Error(ErrorCode::kUnavailable, "the body ended early");
  if (in_used_ < in_.size()) {
    const size_t size = std::min<uint64_t>(wanted, in_.size() - in_used_);
    cursor.copy_from(std::as_bytes(std::span(in_).subspan(in_used_, size)));
    in_used_ += size;
    moved(size);
  } else {
    std::array<iovec, kVectors> vectors;
    const size_t piece = cursor.checksums() ? kChecksumPieceBytes : kPieceBytes;
    const size_t count = cursor.next(vectors, std::min<uint64_t>(wanted, piece), scratch_.span());
    // Woken for every packet, a thread spends more time on waking than on receiving.
    stream_.set_low_water(wanted > 2 * kChecksumPieceBytes ? static_cast<int>(kChecksumPieceBytes) : 1);
    const size_t got = receive_some(std::span(vectors).first(count), patience);
    cursor.advance({vectors.data(), count}, got);
    moved(got);
  }
  // The last chunk's framing: without it the connection cannot be used again.
  if (cursor.left() == 0) find_payload(patience);
}

std::string Connection::receive_text(size_t limit, const Patience& patience) {
  std::string text;
  while (text.size() < limit) {
    try {
      find_payload(patience);
      if (body_ended_) break;
      if (in_used_ == in_.size()) receive_more(patience);
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kCancelled) throw;
      body_ended_ = false;
      head_.keep_alive = false;
      break;  // what came says enough
    }
    const size_t size = std::min<uint64_t>({payload_, in_.size() - in_used_, limit - text.size()});
    text.append(in_, in_used_, size);
    in_used_ += size;
    moved(size);
  }
  return text;
}

bool Connection::reusable() {
  if (!head_.keep_alive || !body_ended_ || until_close_ || in_used_ != in_.size()) return false;
  try {
    return !stream_.wait(true, false, 0);  // readable: closed, or bytes that nobody asked for
  } catch (const Error&) {
    return false;
  }
}

}  // namespace rdmaload::http
