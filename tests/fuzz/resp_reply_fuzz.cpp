// The RESP reply parser: what a reply is must not depend on how its bytes arrive, and must cost what was
// received.
#include <algorithm>
#include <string>
#include <vector>

#include "allocation_bound.h"
#include "fuzz_input.h"
#include "transport/resp/reply.h"

namespace rdmaload::resp {
namespace {

bool same(const Reply& a, const Reply& b) {
  return a.type == b.type && a.text == b.text && a.integer == b.integer &&
         std::equal(a.items.begin(), a.items.end(), b.items.begin(), b.items.end(), same);
}

size_t count(const Reply& reply) {
  size_t total = 1;
  for (const Reply& item : reply.items) total += count(item);
  return total;
}

enum class Outcome { kMore, kReply, kRefused };

struct Parsed {
  Outcome outcome = Outcome::kMore;
  Reply reply;
  size_t consumed = 0;
};

Parsed parse(std::string_view bytes) {
  Parsed parsed;
  // An element of three bytes becomes a Reply, in a vector that doubles; there are at most a thousand.
  const fuzz::AllocationBound bound(4 * bytes.size() + 4096 +
                                    3 * sizeof(Reply) * std::min<size_t>(bytes.size(), 1001));
  try {
    if (auto reply = parse_reply(bytes, parsed.consumed)) {
      parsed.outcome = Outcome::kReply;
      parsed.reply = std::move(*reply);
    }
  } catch (const Error& error) {
    FUZZ_CHECK(error.code() == ErrorCode::kFormat);
    parsed.outcome = Outcome::kRefused;
  }
  return parsed;
}

void check_header(std::string_view bytes) {
  try {
    const auto header = parse_header(bytes);
    if (!header) return;
    FUZZ_CHECK(header->consumed >= 3 && header->consumed <= bytes.size());
    FUZZ_CHECK(bytes.substr(header->consumed - 2, 2) == "\r\n");
    FUZZ_CHECK(header->text == bytes.substr(1, header->consumed - 3));
    if (header->type == Type::kBulk || header->type == Type::kAggregate) FUZZ_CHECK(header->length >= 0);
    for (size_t i = 1; i < header->consumed; ++i) FUZZ_CHECK(!parse_header(bytes.substr(0, i)));
    if (header->type == Type::kError) {
      const Status status = status_of_error(header->text, "here");
      FUZZ_CHECK(!status.ok() && status.message().size() < 400);
      FUZZ_CHECK(std::all_of(status.message().begin(), status.message().end(),
                             [](char c) { return c >= ' ' && c < 127; }));
    }
  } catch (const Error& error) {
    FUZZ_CHECK(error.code() == ErrorCode::kFormat);
  }
}

}  // namespace
}  // namespace rdmaload::resp

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rdmaload::resp;
  rdmaload::fuzz::FuzzInput input(data, size);
  const size_t step = 1 + input.byte();
  const std::string_view bytes = input.rest();
  check_header(bytes);

  const Parsed whole = parse(bytes);
  if (whole.outcome == Outcome::kReply) {
    FUZZ_CHECK(whole.consumed > 0 && whole.consumed <= bytes.size());
    FUZZ_CHECK(count(whole.reply) <= 1001);
    // What follows it belongs to the next reply, and changes nothing.
    const Parsed alone = parse(bytes.substr(0, whole.consumed));
    FUZZ_CHECK(alone.outcome == Outcome::kReply && alone.consumed == whole.consumed);
    FUZZ_CHECK(same(alone.reply, whole.reply));
  }
  // Arriving piece by piece: more is wanted until the reply is there, or until it can no longer become one.
  bool refused = false;
  const size_t stride = std::max(step, bytes.size() / 64);
  for (size_t arrived = 0; arrived < bytes.size(); arrived += stride) {
    const Parsed part = parse(bytes.substr(0, arrived));
    FUZZ_CHECK(!refused || part.outcome == Outcome::kRefused);
    refused = part.outcome == Outcome::kRefused;
    switch (whole.outcome) {
      case Outcome::kReply:
        FUZZ_CHECK(part.outcome == (arrived < whole.consumed ? Outcome::kMore : Outcome::kReply));
        if (part.outcome == Outcome::kReply) FUZZ_CHECK(same(part.reply, whole.reply));
        break;
      case Outcome::kMore:
        FUZZ_CHECK(part.outcome == Outcome::kMore);
        break;
      case Outcome::kRefused:
        FUZZ_CHECK(part.outcome != Outcome::kReply);
        break;
    }
  }
  return 0;
}
