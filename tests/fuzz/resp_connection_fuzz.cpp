// A RESP connection before a server that sends anything, in any pieces: each read completes exactly once; one
// that completes well has exactly the bytes that a plain reading of the stream says; nothing is written
// beside its place.
//
// One thread plays both ends of a loopback connection: it writes a piece, lets the connection take its turns,
// writes the next, and closes. No time passes in a run: turns do not wait.
#include <arpa/inet.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/crc32c.h"
#include "fuzz_input.h"
#include "transport/resp/connection.h"

namespace rdmaload::resp {
namespace {

class Listener {
 public:
  Listener() : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t bytes = sizeof(address);
    auto* const any = reinterpret_cast<sockaddr*>(&address);
    FUZZ_CHECK(::bind(fd_, any, bytes) == 0 && ::listen(fd_, 16) == 0);
    FUZZ_CHECK(::getsockname(fd_, any, &bytes) == 0);
    port_ = ntohs(address.sin_port);
  }
  int port() const { return port_; }
  int accept() const {
    const int fd = ::accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
    FUZZ_CHECK(fd >= 0);
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    return fd;
  }

 private:
  int fd_;
  int port_ = 0;
};

class Owner final : public ReadOwner {
 public:
  void complete(Read& read, const Status& status) noexcept override { done.emplace_back(&read, status); }
  bool cancelled() const noexcept override { return false; }
  std::vector<std::pair<Read*, Status>> done;
};

constexpr std::byte kFill{0xa5};
constexpr size_t kGuard = 8;

// One read into segments with guards around each.
struct Destination {
  explicit Destination(fuzz::FuzzInput& input, int number, ReadOwner& owner) {
    const uint8_t shape = input.byte();
    read.object = "k" + std::to_string(number);
    read.length = 1 + (shape & 0x80 ? input.below_or(300) : shape % 8);
    read.object_bytes = read.length + (shape & 0x40 ? 3 : 0);
    read.offset = shape & 0x40 ? 2 : 0;
    read.checksum = true;
    read.owner = &owner;
    memory.assign(read.length + kGuard * 10, kFill);
    size_t left = read.length, at = kGuard;
    for (size_t pieces = 1 + shape / 8 % 4; left > 0; --pieces) {
      const size_t size = pieces <= 1 ? left : std::min<size_t>(left, 1 + input.byte() % 16);
      const bool dropped = pieces == 3;
      read.segments.push_back({dropped ? nullptr : memory.data() + at, size});
      at += size + kGuard;
      left -= size;
    }
  }
  Read read;
  std::vector<std::byte> memory;
};

// The values at the front of the stream: what reads may complete well, in order.
void check_done(const std::vector<std::unique_ptr<Destination>>& reads, const Owner& owner,
                std::string_view stream) {
  FUZZ_CHECK(owner.done.size() == reads.size());
  bool broken = false;
  for (size_t i = 0; i < reads.size(); ++i) {
    const auto& [read, status] = owner.done[i];
    FUZZ_CHECK(read == &reads[i]->read);  // replies come in the order of requests
    const std::string prefix = "$" + std::to_string(read->length) + "\r\n";
    if (status.ok()) {
      FUZZ_CHECK(!broken);
      // Any spelling of this length counts; the plain one is by far the most common.
      const auto header = parse_header(stream);
      FUZZ_CHECK(header && header->type == Type::kBulk && stream[0] == '$');
      FUZZ_CHECK(static_cast<uint64_t>(header->length) == read->length);
      const std::string_view value = stream.substr(header->consumed, read->length);
      FUZZ_CHECK(value.size() == read->length);
      FUZZ_CHECK(stream.substr(header->consumed + read->length, 2) == "\r\n");
      FUZZ_CHECK(read->crc == crc32c(0, std::as_bytes(std::span(value))));
      size_t at = 0;
      for (const Segment& segment : read->segments) {
        if (segment.data != nullptr) {
          FUZZ_CHECK(std::memcmp(segment.data, value.data() + at, segment.size) == 0);
        }
        at += segment.size;
      }
      stream.remove_prefix(header->consumed + read->length + 2);
    } else if (!broken) {
      FUZZ_CHECK(!status.message().empty());
      try {
        const auto header = parse_header(stream);
        const bool skipped = header && (header->type == Type::kError || header->type == Type::kNull);
        broken = !skipped;
        if (skipped) stream.remove_prefix(header->consumed);
      } catch (const Error&) {
        broken = true;
      }
    }
    // Between the segments nothing was written.
    std::vector<bool> place(reads[i]->memory.size());
    for (const Segment& segment : read->segments) {
      if (segment.data == nullptr) continue;
      const auto from = segment.data - reads[i]->memory.data();
      std::fill_n(place.begin() + from, segment.size, true);
    }
    for (size_t at = 0; at < place.size(); ++at) FUZZ_CHECK(place[at] || reads[i]->memory[at] == kFill);
  }
}

// Lets the connection take what has been sent. True once it failed.
bool take_turns(Connection& connection, int peer, Status& failure) {
  int unsent = 1;
  while (ioctl(peer, SIOCOUTQNSD, &unsent) == 0 && unsent > 0) {
  }
  char requests[4096];
  while (::recv(peer, requests, sizeof(requests), MSG_DONTWAIT) > 0) {
  }
  try {
    // A turn moves a header, a payload or a trailer, or finds nothing.
    for (int i = 0; i < 8 && !connection.idle(); ++i) connection.turn(0);
    return connection.idle();
  } catch (const Error& error) {
    failure = Status::from(error);
    return true;
  }
}

}  // namespace
}  // namespace rdmaload::resp

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rdmaload;
  using namespace rdmaload::resp;
  static const Listener listener;
  static const Endpoint endpoint = [] {
    Endpoint made;
    made.host = "127.0.0.1";
    made.port = listener.port();
    made.name = "redis://fuzz";
    return made;
  }();

  fuzz::FuzzInput input(data, size);
  Owner owner;
  std::vector<std::unique_ptr<Destination>> reads;
  for (uint32_t i = 0, count = 1 + input.below_or(5); i < count; ++i) {
    reads.push_back(std::make_unique<Destination>(input, static_cast<int>(i), owner));
  }
  const size_t step = 1 + input.byte();
  const std::string stream(input.rest());

  Connection connection(endpoint, [] { return false; });
  const int peer = listener.accept();
  for (const auto& destination : reads) connection.enqueue(destination->read);
  Status failure;
  bool ended = take_turns(connection, peer, failure);
  for (size_t at = 0; at < stream.size() && !ended; at += step) {
    const size_t piece = std::min(step, stream.size() - at);
    FUZZ_CHECK(::send(peer, stream.data() + at, piece, MSG_NOSIGNAL) == static_cast<ssize_t>(piece));
    ended = take_turns(connection, peer, failure);
  }
  ::shutdown(peer, SHUT_WR);
  // Now nothing is left to wait for: the connection takes the rest and finds the end, however many turns it
  // needs.
  for (size_t turns = 0; !connection.idle() && failure.ok(); ++turns) {
    FUZZ_CHECK(turns < 1000 + 4 * stream.size());
    take_turns(connection, peer, failure);
  }
  connection.fail_all(failure);
  FUZZ_CHECK(connection.idle() && connection.in_flight_bytes() == 0);
  check_done(reads, owner, stream);
  // A reset rather than a close, so that thousands of runs leave no thousands of sockets in TIME_WAIT.
  const linger now{1, 0};
  setsockopt(peer, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
  ::close(peer);
  return 0;
}
