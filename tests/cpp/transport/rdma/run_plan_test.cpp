// The plan of a run, and a model of a server and a card that write what it says.
#include "transport/rdma/run_plan.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <optional>

#include "support/reads.h"

namespace rdmaload::rdma {
namespace {

using testing::pick;
using testing::RecordingOwner;

Read read_of(std::vector<Segment> segments) {
  Read read;
  read.segments = std::move(segments);
  for (const Segment& segment : read.segments) read.length += segment.size;
  return read;
}

// Reads of `count` values of `length` bytes, one behind the other in `memory`.
std::vector<RunValue> row_of(std::vector<std::byte>& memory, size_t at, size_t count, size_t length) {
  std::vector<RunValue> values;
  for (size_t i = 0; i < count; ++i) {
    RunValue value = value_of(read_of({{memory.data() + at + i * length, length}}));
    value.registered = memory;
    values.push_back(value);
  }
  return values;
}

std::string kinds(std::span<const RunStep> steps) {
  std::string text;
  for (const RunStep& step : steps) text += step.direct ? 'd' : 's';
  return text;
}

TEST_CASE("a reply is header, value and CRLF") {
  CHECK(bulk_header_bytes(1) == std::strlen("$1\r\n"));
  CHECK(bulk_header_bytes(1044480) == std::strlen("$1044480\r\n"));
  CHECK(bulk_reply_bytes(1000) == std::strlen("$1000\r\n") + 1000 + 2);
}

TEST_CASE("segments that touch each other count as one") {
  std::vector<std::byte> memory(100);
  std::byte* base = memory.data();
  const RunValue whole = value_of(read_of({{base, 10}, {base + 10, 0}, {base + 10, 5}}));
  CHECK(whole.contiguous());
  CHECK(whole.front.data() == base);
  CHECK(whole.back.size() == 15);
  const RunValue dropped_first = value_of(read_of({{nullptr, 8}, {base, 10}, {base + 10, 5}}));
  CHECK_FALSE(dropped_first.contiguous());
  CHECK(dropped_first.front.empty());
  CHECK(dropped_first.back.size() == 15);
  const RunValue dropped_last = value_of(read_of({{base, 10}, {nullptr, 8}}));
  CHECK(dropped_last.front.size() == 10);
  CHECK(dropped_last.back.empty());
  const RunValue apart = value_of(read_of({{base, 10}, {base + 20, 30}, {base + 50, 1}}));
  CHECK_FALSE(apart.contiguous());
  CHECK(apart.front.size() == 10);
  CHECK(apart.back.data() == base + 20);
  CHECK(apart.back.size() == 31);
}

TEST_CASE("the first and the last value of a run are staged, those between land in their places") {
  std::vector<std::byte> memory(1000);
  const auto values = row_of(memory, 100, 5, 100);
  const auto steps = plan_run(values, bulk_reply_bytes(100));
  CHECK(kinds(steps) == "sddds");
  CHECK(steps[1].window == memory.data() + 200 - std::strlen("$100\r\n"));
  CHECK(steps[1].kept_bytes == 0);  // the first value is copied when this reply has come
  CHECK(steps[2].kept_bytes == std::strlen("$100\r\n"));
  CHECK(steps[0].ends_after_next);
  CHECK(steps[2].ends_after_next);
  CHECK_FALSE(steps[3].ends_after_next);
  CHECK_FALSE(steps[4].ends_after_next);
}

TEST_CASE("two values have no neighbours on both sides") {
  std::vector<std::byte> memory(1000);
  CHECK(kinds(plan_run(row_of(memory, 100, 2, 100), bulk_reply_bytes(100))) == "ss");
  CHECK(kinds(plan_run(row_of(memory, 100, 1, 100), bulk_reply_bytes(100))) == "s");
  CHECK(plan_run({}, 100).empty());
}

TEST_CASE(
    "a value whose reply does not fill the window is staged, so that a longer one cannot overwrite others") {
  std::vector<std::byte> memory(1000);
  CHECK(kinds(plan_run(row_of(memory, 100, 5, 100), bulk_reply_bytes(100) + 1)) == "sssss");
}

TEST_CASE("a hole on either side, or memory that is not registered, makes a value staged") {
  std::vector<std::byte> memory(1000);
  auto values = row_of(memory, 100, 5, 100);
  SUBCASE("before") { values[1].back = values[1].back.first(99); }
  SUBCASE("behind") {
    values[3].front = values[3].front.subspan(1);
    CHECK(kinds(plan_run(values, bulk_reply_bytes(100))) == "sdsss");  // and it has no place of its own
    return;
  }
  SUBCASE("not registered") { values[2].registered = {}; }
  SUBCASE("the header would lie outside of what is registered") {
    values[2].registered = std::span(memory).subspan(300 - 5);
  }
  SUBCASE("the CRLF would lie outside of what is registered") {
    values[2].registered = std::span(memory).first(401);
  }
  CHECK(kinds(plan_run(values, bulk_reply_bytes(100))) == "sdsds");
}

// One connection that executes a plan as the transport does, against a server that writes its replies in
// pieces, in order, at any time.
class Lane {
 public:
  Lane(std::vector<Read*> reads, std::span<std::byte> registered, const std::vector<std::byte>& object)
      : reads_(std::move(reads)), object_(object) {
    for (Read* read : reads_) {
      values_.push_back(value_of(*read));
      values_.back().registered = registered;
    }
  }
  void plan(uint64_t window_bytes) { steps_ = plan_run(values_, window_bytes); }
  bool done() const { return finished_ == reads_.size(); }
  size_t direct() const {
    return static_cast<size_t>(
        std::count_if(steps_.begin(), steps_.end(), [](const RunStep& step) { return step.direct; }));
  }
  bool verified() const { return verified_; }

  // The server writes up to `bytes` more of the reply, and when it is whole the client does its part.
  void advance(size_t bytes) {
    if (reply_.empty()) arm();
    bytes = std::min(bytes, reply_.size() - written_);
    std::memcpy(window_ + written_, reply_.data() + written_, bytes);
    written_ += bytes;
    if (written_ == reply_.size()) arrive();
  }

 private:
  void arm() {
    const RunStep& step = steps_[current_];
    const Read& read = *reads_[current_];
    reply_ = "$" + std::to_string(read.length) + "\r\n";
    reply_.append(reinterpret_cast<const char*>(object_.data()) + read.offset, read.length);
    reply_ += "\r\n";
    REQUIRE(reply_.size() == step.reply_bytes);
    written_ = 0;
    if (step.direct) {
      window_ = step.window;
      kept_.assign(window_, window_ + step.kept_bytes);
    } else {
      staging_.emplace_back(current_, std::vector<std::byte>(reply_.size()));
      window_ = staging_.back().second.data();
    }
  }
  void arrive() {
    reply_.clear();
    const RunStep& step = steps_[current_];
    if (step.direct) std::copy(kept_.begin(), kept_.end(), window_);
    if (step.direct && current_ > 0) finish(current_ - 1);
    if (!step.ends_after_next) finish(current_);
    ++current_;
  }
  void finish(size_t index) {
    Read& read = *reads_[index];
    if (!steps_[index].direct) {
      REQUIRE(staging_.front().first == index);
      const std::byte* from = staging_.front().second.data() + bulk_header_bytes(read.length);
      for (const Segment& segment : read.segments) {
        if (segment.data != nullptr) std::memcpy(segment.data, from, segment.size);
        from += segment.size;
      }
      staging_.pop_front();
    }
    size_t at = read.offset;
    for (const Segment& segment : read.segments) {
      if (segment.data != nullptr)
        verified_ &= std::memcmp(segment.data, object_.data() + at, segment.size) == 0;
      at += segment.size;
    }
    ++finished_;
  }

  std::vector<Read*> reads_;
  std::vector<RunValue> values_;
  std::vector<RunStep> steps_;
  const std::vector<std::byte>& object_;
  size_t current_ = 0, finished_ = 0, written_ = 0;
  std::string reply_;
  std::byte* window_ = nullptr;
  std::vector<std::byte> kept_;
  std::deque<std::pair<size_t, std::vector<std::byte>>> staging_;
  bool verified_ = true;
};

TEST_CASE(
    "whatever the reads, the runs and the order of writes: every byte is right, and nothing else is "
    "touched") {
  std::mt19937_64 random(7);
  size_t direct = 0;
  for (int round = 0; round < 400; ++round) {
    const uint64_t chunk = pick(random, 1, 60);
    const size_t chunks = pick(random, 1, 24);
    const uint64_t last = pick(random, 1, chunk);
    const uint64_t total = (chunks - 1) * chunk + last;
    const auto object = testing::random_bytes(total, random());

    // The object's bytes go, in order, to stretches of memory with or without holes between, some dropped.
    struct Piece {
      uint64_t size;
      bool dropped;
      uint64_t hole;
    };
    std::vector<Piece> pieces;
    uint64_t memory_bytes = 32;
    for (uint64_t left = total; left > 0;) {
      const uint64_t size = pick(random, 1, std::min<uint64_t>(left, pick(random, 1, 400)));
      pieces.push_back({size, pick(random, 0, 9) == 0, pick(random, 0, 2) == 0 ? pick(random, 1, 20) : 0});
      left -= size;
      memory_bytes += size + pieces.back().hole;
    }
    memory_bytes += 32;
    constexpr std::byte kFill{0xa5};
    std::vector<std::byte> memory(memory_bytes, kFill), expected(memory_bytes, kFill);
    std::vector<std::pair<std::byte*, uint64_t>> places;  // where each byte of the object goes, by piece
    uint64_t place = 32, at = 0;
    for (const Piece& piece : pieces) {
      if (!piece.dropped) {
        std::copy_n(object.begin() + static_cast<ptrdiff_t>(at), piece.size,
                    expected.begin() + static_cast<ptrdiff_t>(place));
      }
      places.emplace_back(piece.dropped ? nullptr : memory.data() + place, piece.size);
      place += piece.size + piece.hole;
      at += piece.size;
    }

    // Chunks, cut at the borders of pieces.
    std::deque<Read> reads;
    size_t piece = 0;
    uint64_t used = 0;
    for (uint64_t offset = 0; offset < total; offset += chunk) {
      Read read;
      read.offset = offset;
      read.length = std::min(chunk, total - offset);
      for (uint64_t left = read.length; left > 0;) {
        const auto [data, size] = places[piece];
        const uint64_t take = std::min<uint64_t>(left, size - used);
        read.segments.push_back({data == nullptr ? nullptr : data + used, take});
        used += take;
        left -= take;
        if (used == size) {
          ++piece;
          used = 0;
        }
      }
      reads.push_back(std::move(read));
    }

    // Runs of random lengths; registered is a part of the memory, or all of it.
    const uint64_t begin = pick(random, 0, 3) == 0 ? pick(random, 0, memory_bytes - 1) : 0;
    const auto registered = std::span(memory).subspan(
        begin, pick(random, 0, 3) == 0 ? pick(random, 0, memory_bytes - begin) : memory_bytes - begin);
    std::vector<std::unique_ptr<Lane>> lanes;
    for (size_t first = 0; first < reads.size();) {
      const size_t count = pick(random, 1, std::min<uint64_t>(reads.size() - first, 10));
      std::vector<Read*> run;
      for (size_t i = first; i < first + count; ++i) run.push_back(&reads[i]);
      lanes.push_back(std::make_unique<Lane>(run, registered, object));
      lanes.back()->plan(bulk_reply_bytes(chunk));
      direct += lanes.back()->direct();
      first += count;
    }
    for (bool left = true; left;) {
      left = false;
      for (const auto& lane : lanes) {
        if (lane->done()) continue;
        left = true;
        if (pick(random, 0, 1) == 0) lane->advance(pick(random, 1, 30));
      }
    }
    for (const auto& lane : lanes) CHECK(lane->verified());
    CHECK(memory == expected);
    if (memory != expected) break;
  }
  CHECK(direct > 500);  // the test is about them
}

}  // namespace
}  // namespace rdmaload::rdma
