// One RESP connection with pipelined GETs, whose values are received straight into their final place.
//
// Belongs to one worker thread. Reads that were handed to it and not completed are in its in-flight queue;
// when anything goes wrong with the stream, an Error is thrown and the worker takes them back with
// fail_all().
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>

#include "memory/host_arena.h"
#include "transport/byte_stream.h"
#include "transport/resp/reply.h"
#include "transport/segment_cursor.h"
#include "transport/transport.h"

namespace rdmaload::resp {

struct Endpoint {
  std::string host;
  int port = 6379;
  std::string socket_path;                // of a unix socket, instead of host and port
  std::shared_ptr<const TlsContext> tls;  // null: plain
  std::string username;                   // empty: the default user
  std::string password;                   // empty: none
  int database = 0;
  int protocol = 2;  // RESP version
  std::chrono::duration<double> connect_timeout{10};
  std::chrono::duration<double> inactivity_timeout{30};
  std::string name;  // for messages: the url without secrets
};

class Connection {
 public:
  // Connects, authenticates and selects the database. Throws; kCancelled when `give_up` said so.
  Connection(const Endpoint& endpoint, const GiveUp& give_up);

  bool idle() const noexcept { return in_flight_.empty(); }
  uint64_t in_flight_bytes() const noexcept { return in_flight_bytes_; }
  // Queues the request; it is sent by the next turn().
  void enqueue(Read& read);
  // Sends and receives what can be moved now, waiting up to `milliseconds` when nothing can. Completes reads.
  // Throws kTimeout when the server has been silent for the inactivity time-out while requests were in
  // flight.
  void turn(int milliseconds);
  bool has_cancelled_reads() const noexcept;
  // Completes every read in flight: the one whose reply was being read with `first`, the others with
  // kUnavailable (it was not their fault), kTimeout when that is what `first` is, or kCancelled.
  void fail_all(const Status& first) noexcept;

 private:
  Reply command(std::initializer_list<std::string_view> arguments, Deadline deadline, const GiveUp& give_up);
  void handshake(const GiveUp& give_up);
  bool send_some();
  bool receive_some();
  bool receive_header();
  bool receive_payload();
  bool receive_trailer();
  void begin_payload();
  void finish(const Status& status);
  size_t expected_bytes() const;
  uint64_t unreceived_bytes() const noexcept;
  std::string context(const Read& read) const;

  enum class State { kHeader, kPayload, kTrailer };

  const Endpoint& endpoint_;
  ByteStream stream_;
  std::string out_;  // requests not yet sent
  size_t out_sent_ = 0;
  std::string in_;  // reply bytes outside of payloads: header lines, trailers, errors
  std::deque<Read*> in_flight_;
  uint64_t in_flight_bytes_ = 0;
  State state_ = State::kHeader;
  SegmentCursor cursor_;
  bool drained_ = false;  // the last recv took all there was: asking again at once would only say so
  Clock::time_point last_activity_;
  HostArena scratch_;
};

}  // namespace rdmaload::resp
