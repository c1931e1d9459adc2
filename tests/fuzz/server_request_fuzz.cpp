// The server's request parser and sessions: what a request is must not depend on how its bytes arrive, what
// is held must follow what was received, and a session survives any client.
#include <algorithm>
#include <string>
#include <vector>

#include "allocation_bound.h"
#include "fuzz_input.h"
#include "server/session.h"

namespace rdmaload::server {
namespace {

struct Parsed {
  std::vector<std::vector<std::string>> requests;
  bool failed = false;
  bool operator==(const Parsed&) const = default;
};

Parsed parse(std::string_view bytes, size_t step) {
  RequestParser parser;
  Parsed parsed;
  uint64_t large_left = 0;
  while (!bytes.empty()) {
    std::string_view part = bytes.substr(0, step);
    bytes.remove_prefix(part.size());
    while (!part.empty()) {
      if (large_left > 0) {
        const auto taken = static_cast<size_t>(std::min<uint64_t>(large_left, part.size()));
        part.remove_prefix(taken);
        large_left -= taken;
        if (large_left == 0) parser.large_argument_taken();
        continue;
      }
      switch (parser.next(part)) {
        case RequestParser::Event::kMore:
          FUZZ_CHECK(part.empty());
          break;
        case RequestParser::Event::kRequest:
          FUZZ_CHECK(!parser.arguments().empty());
          parsed.requests.emplace_back(parser.arguments().begin(), parser.arguments().end());
          break;
        case RequestParser::Event::kLargeArgument:
          large_left = parser.large_bytes();
          FUZZ_CHECK(large_left > kSmallArgumentBytes && large_left <= kMaxArgumentBytes);
          break;
        case RequestParser::Event::kError:
          FUZZ_CHECK(!parser.error().empty());
          parsed.failed = true;
          return parsed;
      }
    }
  }
  return parsed;
}

// What a client is answered; everything is sent at once.
std::string converse(std::string_view bytes, size_t step, bool with_password, Road road) {
  constexpr uint64_t kLimit = 8 << 20;
  const auto memory = ValueMemory::make(kLimit);
  std::string answered;
  {
    Store store(memory);
    Counters counters;
    Shared shared{store, counters, with_password ? "p" : "",    "0", 0, 0, 1, 1,
                  {},    [] {},    [] { return std::string(); }};
    Session session(shared, 1, "fuzz", road);
    while (!session.closing()) {
      ReplyQueue& replies = session.replies();
      if (!replies.empty()) {
        iovec vector;
        if (const ReplyQueue::Front front = replies.front(); front.place) {
          FUZZ_CHECK(road == Road::kRdma && front.value != nullptr);
          FUZZ_CHECK(front.length > 0 && front.offset < front.value->bytes().size());
          FUZZ_CHECK(front.length <= front.value->bytes().size() - front.offset);
          replies.sent(std::min<uint64_t>(front.length, 1 << 10));
          session.resume();
          continue;
        }
        if (replies.gather({&vector, 1}, 100, ReplyQueue::Large::kByReference) == 0) {
          const ReplyQueue::Front front = replies.front();
          FUZZ_CHECK(front.value != nullptr && front.length > 0);
          FUZZ_CHECK(front.offset < front.value->bytes().size());
          FUZZ_CHECK(front.length <= front.value->bytes().size() - front.offset);
          replies.sent(front.length);
          session.resume();
          continue;
        }
        answered.append(static_cast<const char*>(vector.iov_base), std::min<size_t>(vector.iov_len, 64));
        replies.sent(vector.iov_len);
        session.resume();
        continue;
      }
      if (bytes.empty()) break;
      FUZZ_CHECK(session.wants_input());
      const auto space = session.value_space();
      const auto part = bytes.substr(0, space.empty() ? step : std::min(step, space.size()));
      bytes.remove_prefix(part.size());
      if (space.empty()) {
        session.consume(part);
      } else {
        std::copy(part.begin(), part.end(), reinterpret_cast<char*>(space.data()));
        session.value_received(part.size());
      }
      FUZZ_CHECK(memory->held_bytes() <= kLimit);
    }
  }
  FUZZ_CHECK(memory->held_bytes() == 0 && memory->used_bytes() == 0 && memory->values() == 0);
  return answered;
}

}  // namespace
}  // namespace rdmaload::server

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rdmaload::server;
  rdmaload::fuzz::FuzzInput input(data, size);
  const size_t step = 1 + input.byte();
  const bool with_password = input.flag();
  const std::string_view bytes = input.rest();
  Parsed whole;
  {
    // Requests that are kept for comparison: a word of four bytes (`$0`, its end) becomes a string and its
    // place.
    const rdmaload::fuzz::AllocationBound bound(128 * bytes.size() + (256 << 10));
    whole = parse(bytes, std::max<size_t>(bytes.size(), 1));
  }
  FUZZ_CHECK(parse(bytes, step) == whole);
  converse(bytes, step, with_password, Road::kTcp);
  converse(bytes, step, with_password, Road::kRdma);
  return 0;
}
