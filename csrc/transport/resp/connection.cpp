#include "transport/resp/connection.h"

#include <algorithm>

#include "transport/resp/handshake.h"

namespace rdmaload::resp {
namespace {

// One recv: small enough that the checksum right after it reads from the second-level cache.
constexpr size_t kPieceBytes = 256 << 10;
constexpr size_t kScratchBytes = 256 << 10;
constexpr size_t kVectors = 256;  // per recvmsg; more segments take more calls
constexpr std::string_view kCrlf = "\r\n";

// "$1044480\r\n": the length of the header line that a value of this size must have.
size_t bulk_header_bytes(uint64_t length) { return 1 + std::to_string(length).size() + 2; }

}  // namespace

Connection::Connection(const Endpoint& endpoint, const GiveUp& give_up)
    : endpoint_(endpoint),
      stream_(ByteStream::connect({endpoint.host, endpoint.port, endpoint.socket_path}, endpoint.tls.get(),
                                  Deadline::after(endpoint.connect_timeout), give_up)),
      last_activity_(Clock::now()),
      scratch_(kScratchBytes) {
  handshake(give_up);
}

void Connection::handshake(const GiveUp& give_up) {
  const Deadline deadline = Deadline::after(endpoint_.connect_timeout);
  shake_hands(endpoint_, [&](std::initializer_list<std::string_view> arguments) {
    return command(arguments, deadline, give_up);
  });
}

Reply Connection::command(std::initializer_list<std::string_view> arguments, Deadline deadline,
                          const GiveUp& give_up) {
  append_command(out_, arguments);
  for (;;) {
    bool moved = send_some();
    size_t consumed = 0;
    if (auto reply = parse_reply(in_, consumed)) {
      in_.erase(0, consumed);
      return std::move(*reply);
    }
    std::array<std::byte, 4096> piece;
    if (const size_t got = stream_.try_receive(piece); got > 0) {
      in_.append(reinterpret_cast<const char*>(piece.data()), got);
      moved = true;
    }
    if (give_up()) throw Error(ErrorCode::kCancelled, "connecting to " + endpoint_.name + " was cancelled");
    if (moved) continue;
    if (deadline.passed()) {
      throw Error(ErrorCode::kTimeout, endpoint_.name +
                                           ": the server accepted the connection but did not answer " +
                                           std::string(*arguments.begin()) + " in time");
    }
    stream_.wait(true, out_sent_ < out_.size(), deadline.poll_milliseconds(kGiveUpPollMilliseconds));
  }
}

void Connection::enqueue(Read& read) {
  if (read.offset == 0 && read.length == read.object_bytes) {
    append_command(out_, {"GET", read.object});
  } else {
    // An empty range never reaches a transport, so the inclusive end is well defined.
    append_command(out_, {"GETRANGE", read.object, std::to_string(read.offset),
                          std::to_string(read.offset + read.length - 1)});
  }
  if (in_flight_.empty()) last_activity_ = Clock::now();
  in_flight_.push_back(&read);
  in_flight_bytes_ += read.length;
}

void Connection::turn(int milliseconds) {
  drained_ = false;
  bool moved = send_some();
  if (receive_some()) {
    last_activity_ = Clock::now();
    moved = true;
  }
  if ((moved && !drained_) || in_flight_.empty()) return;
  const Deadline silent = Deadline::at(
      last_activity_ + std::chrono::duration_cast<Clock::duration>(endpoint_.inactivity_timeout));
  if (silent.passed()) {
    throw Error(ErrorCode::kTimeout, context(*in_flight_.front()) + ": no byte came for " +
                                         std::to_string(endpoint_.inactivity_timeout.count()) +
                                         " s (inactivity_timeout)");
  }
  // Woken for every packet, a thread spends more time on waking than on receiving. Values that turn out
  // shorter (errors) are seen when the wait ends.
  stream_.set_low_water(unreceived_bytes() > 2 * kPieceBytes ? kPieceBytes : 1);
  stream_.wait(true, out_sent_ < out_.size(), silent.poll_milliseconds(milliseconds));
}

// Payload bytes that are asked for and have not come.
uint64_t Connection::unreceived_bytes() const noexcept {
  switch (state_) {
    case State::kHeader:
      return in_flight_bytes_;
    case State::kPayload:
      return in_flight_bytes_ - in_flight_.front()->length + cursor_.left();
    case State::kTrailer:
      return in_flight_bytes_ - in_flight_.front()->length;
  }
  return 0;
}

bool Connection::has_cancelled_reads() const noexcept {
  return std::any_of(in_flight_.begin(), in_flight_.end(),
                     [](const Read* read) { return read->owner->cancelled(); });
}

void Connection::fail_all(const Status& first) noexcept {
  std::deque<Read*> reads;
  reads.swap(in_flight_);
  in_flight_bytes_ = 0;
  bool head = true;
  for (Read* read : reads) {
    if (read->owner->cancelled()) {
      read->owner->complete(*read, Status(ErrorCode::kCancelled, "the read was cancelled"));
    } else if (head || first.code() == ErrorCode::kCancelled) {
      read->owner->complete(*read, first);
    } else {
      // What a silent server costs is a time-out for each of them, whichever is reported.
      const ErrorCode code =
          first.code() == ErrorCode::kTimeout ? ErrorCode::kTimeout : ErrorCode::kUnavailable;
      read->owner->complete(
          *read, Status(code, context(*read) + ": the connection was lost (" + first.message() + ")"));
    }
    head = false;
  }
}

bool Connection::send_some() {
  bool moved = false;
  while (out_sent_ < out_.size()) {
    const size_t sent = stream_.try_send(std::as_bytes(std::span(out_).subspan(out_sent_)));
    if (sent == 0) break;
    out_sent_ += sent;
    moved = true;
  }
  if (out_sent_ == out_.size()) {
    out_.clear();
    out_sent_ = 0;
  }
  return moved;
}

bool Connection::receive_some() {
  switch (state_) {
    case State::kHeader:
      return !in_flight_.empty() && receive_header();
    case State::kPayload:
      return receive_payload();
    case State::kTrailer:
      return receive_trailer();
  }
  return false;
}

// How many bytes outside of payloads can be asked for without reading into the payload that follows them.
size_t Connection::expected_bytes() const {
  const size_t trailer = state_ == State::kTrailer ? kCrlf.size() : 0;
  const size_t next = state_ == State::kTrailer ? 1 : 0;
  const size_t header = next < in_flight_.size() ? bulk_header_bytes(in_flight_[next]->length) : 0;
  const size_t wanted = trailer + header;
  // Longer lines than expected (errors) come in small steps: rare, and they must not swallow a payload.
  return wanted > in_.size() ? wanted - in_.size() : 1;
}

bool Connection::receive_header() {
  bool moved = false;
  for (;;) {
    if (const auto header = parse_header(in_)) {
      Read& read = *in_flight_.front();
      const size_t consumed = header->consumed;
      switch (header->type) {
        case Type::kBulk:
          if (in_[0] != '$') {
            throw Error(ErrorCode::kFormat,
                        context(read) + ": the server answered with a text or an error, not a value");
          }
          if (header->length == 0 && read.length != read.object_bytes) {  // GETRANGE of an absent key
            throw Error(ErrorCode::kNotFound, context(read) + ": there is no such key");
          }
          if (static_cast<uint64_t>(header->length) != read.length) {
            throw Error(ErrorCode::kIntegrity, context(read) + ": the value has " +
                                                   std::to_string(header->length) + " bytes, expected " +
                                                   std::to_string(read.length));
          }
          in_.erase(0, consumed);
          begin_payload();
          return true;
        case Type::kNull:
          in_.erase(0, consumed);
          finish(Status(ErrorCode::kNotFound, context(read) + ": there is no such key"));
          return true;
        case Type::kError: {
          const Status status = status_of_error(header->text, context(read));
          in_.erase(0, consumed);
          finish(status);
          return true;
        }
        default:
          throw Error(ErrorCode::kFormat,
                      context(read) + ": the server answered GET with a reply that is no value");
      }
    }
    std::array<std::byte, 64> piece;
    const size_t wanted = std::min(piece.size(), expected_bytes());
    const size_t got = stream_.try_receive(std::span(piece).first(wanted));
    if (got == 0) return moved;
    in_.append(reinterpret_cast<const char*>(piece.data()), got);
    moved = true;
  }
}

void Connection::begin_payload() {
  Read& read = *in_flight_.front();
  cursor_ = SegmentCursor(read);
  if (!in_.empty()) {  // only after a reply that was shorter than expected: an error, a nil
    const size_t size = std::min<uint64_t>(in_.size(), cursor_.left());
    cursor_.copy_from(std::as_bytes(std::span(in_).first(size)));
    in_.erase(0, size);
  }
  state_ = cursor_.left() > 0 ? State::kPayload : State::kTrailer;
}

bool Connection::receive_payload() {
  std::array<iovec, kVectors> vectors;
  const size_t count = cursor_.next(vectors, kPieceBytes, scratch_.span());
  const size_t got = stream_.try_receive(std::span(vectors).first(count));
  if (got == 0) return false;
  size_t room = 0;
  for (size_t i = 0; i < count; ++i) room += vectors[i].iov_len;
  drained_ = got < room;
  cursor_.advance({vectors.data(), count}, got);
  if (cursor_.left() == 0) state_ = State::kTrailer;
  return true;
}

bool Connection::receive_trailer() {
  bool moved = false;
  while (in_.size() < kCrlf.size()) {
    std::array<std::byte, 64> piece;
    const size_t wanted = std::min(piece.size(), expected_bytes());
    const size_t got = stream_.try_receive(std::span(piece).first(wanted));
    if (got == 0) return moved;
    in_.append(reinterpret_cast<const char*>(piece.data()), got);
    moved = true;
  }
  if (!std::string_view(in_).starts_with(kCrlf)) {
    throw Error(ErrorCode::kFormat, context(*in_flight_.front()) + ": the value does not end with CRLF");
  }
  in_.erase(0, kCrlf.size());
  finish(Status());
  return true;
}

void Connection::finish(const Status& status) {
  Read& read = *in_flight_.front();
  in_flight_.pop_front();
  in_flight_bytes_ -= read.length;
  state_ = State::kHeader;
  read.owner->complete(read, status);
}

std::string Connection::context(const Read& read) const {
  return endpoint_.name + " key '" + read.object + "'";
}

}  // namespace rdmaload::resp
