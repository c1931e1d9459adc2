// Reads from a Valkey: GET by GET, each reply written by the server to where the window was announced last,
// planned by run_plan.h.
//
// A few requests are ahead of the reply that is being written: as long as each reply before fills its window,
// a server waits at its end for the next announcement, so every reply lands where it was planned.
//
// A reply that is no such value (no such key, an error, another size) is shorter or longer, and what was
// asked for after it lands in the rest of its window and beyond, not where it was planned. Then all replies
// that are outstanding are collected as a plain stream; when the last is there, values are copied to their
// places, the others become their reads' errors, and what was not asked for yet is planned anew.
#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <vector>

#include "core/crc32c.h"
#include "transport/rdma/lane.h"
#include "transport/rdma/run_plan.h"
#include "transport/segment_cursor.h"

namespace rdmaload::rdma {
namespace {

// Of a run: two are staged, so a few dozen keep the copies at a few percent, and one connection from taking
// all of a small load.
constexpr size_t kLeastRun = 4;
constexpr size_t kMostRun = 48;
constexpr size_t kMostAhead = 4;  // requests beyond the reply that is being written
constexpr std::string_view kCrlf = "\r\n";

class ValkeyLane final : public Lane {
 public:
  ValkeyLane(std::unique_ptr<Session> session, std::shared_ptr<Destinations> destinations,
             uint64_t bytes_in_flight)
      : Lane(std::move(session), std::move(destinations)),
        // The replies to requests that are ahead wait in the server's memory.
        ahead_(std::clamp<uint64_t>(bytes_in_flight / session_->window_bytes(), 2, 1 + kMostAhead) - 1) {}
  ~ValkeyLane() override { close(); }

  bool idle() const noexcept override { return entries_.empty(); }
  bool suits(uint64_t longest_read) const noexcept override {
    return bulk_reply_bytes(longest_read) <= session_->window_bytes();
  }

  void take(ReadQueue& queue, size_t workers) override {
    if (sent_ < entries_.size()) return;  // the next run is planned when this one is asked for
    std::vector<Read*> reads;
    for (Read* read : queue.try_pop_share(workers, kLeastRun, kMostRun)) {
      if (read->owner->cancelled()) {
        complete(*read, Status(ErrorCode::kCancelled, "the read was cancelled"));
      } else if (read->device_fill != nullptr) {
        complete(
            *read,
            Status(ErrorCode::kNotSupported,
                   "the replies of a Valkey bring their framing, which is taken off in host memory: every "
                   "value is staged there and copied"));
      } else if (!suits(read->length)) {  // came after the worker had looked: for a longer window
        if (!queue.push(*read, Clock::time_point::min())) {
          complete(*read, Status(ErrorCode::kCancelled, "the transport was closed"));
        }
      } else {
        reads.push_back(read);
      }
    }
    if (reads.empty()) return;
    if (entries_.empty()) session_->last_activity = Clock::now();
    const size_t begin = entries_.size();
    std::vector<RunValue> values;
    for (Read* read : reads) {  // in flight from here on, whatever is thrown below
      read->crc = 0;
      read->copied_bytes = 0;
      read->checksum_time = {};
      entries_.push_back({read, {}, {}, nullptr});
      values.push_back(value_of(*read));
    }
    std::vector<const MemoryRegion*> regions(reads.size());
    for (size_t i = 0; i < values.size(); ++i) {
      if (!values[i].contiguous()) continue;
      const auto found = destinations_->find(values[i].front, session_->channel().domain());
      if (found.region == nullptr || found.bytes < values[i].length) continue;
      values[i].registered = found.memory;
      regions[i] = found.region;
    }
    for (size_t i = 0; i < values.size(); ++i) {
      entries_[begin + i].region = regions[i];
      entries_[begin + i].value = values[i];
    }
    plan(begin);
  }

  void turn(std::chrono::milliseconds time) override {
    bool moved = !collecting_ && send_requests();
    if (!entries_.empty() && !armed_ && arrived_ < sent_) arm();
    moved |= session_->flush();
    while (armed_ && (collecting_ ? collect() : take_reply())) moved = true;
    if (!moved && !entries_.empty()) check_activity(*entries_[std::min(arrived_, entries_.size() - 1)].read);
    session_->channel().turn(moved ? std::chrono::milliseconds(0) : time);
  }

  bool has_cancelled_reads() const noexcept override {
    return std::any_of(entries_.begin(), entries_.end(),
                       [](const Entry& entry) { return entry.read->owner->cancelled(); });
  }

  void fail_all(const Status& first) noexcept override {
    if (armed_) put_back(kept_);
    armed_ = false;
    // A value that had arrived before the reply that never came is as good as any, now that its end is.
    while (arrived_ > 0) finish_front();
    settle();
    std::deque<Entry> entries;
    entries.swap(entries_);
    sent_ = 0;
    bool head = true;
    for (Entry& entry : entries) {
      complete(*entry.read, lost(*entry.read, first, head));
      head = false;
    }
  }

 private:
  struct Entry {
    Read* read;
    RunValue value;
    RunStep step;
    const MemoryRegion* region;  // of value.registered
    size_t slot = 0;             // of a staged one
    uint64_t position = 0;       // where its command ends in the stream of commands
  };
  // What became of a request whose reply was collected.
  struct Outcome {
    Status status;
    uint64_t value;  // where it begins in collected_, when there is one
  };
  // Bytes at the end of a value while the header of the next lies over them.
  struct Kept {
    Read* read = nullptr;
    std::byte* place = nullptr;
    size_t size = 0;
    std::array<std::byte, 32> bytes;
  };

  bool send_requests() {
    bool queued = false;
    while (sent_ < entries_.size() && sent_ - arrived_ <= ahead_ &&
           (sent_ == arrived_ || entries_[sent_ - 1].step.fills_window)) {
      const Read& read = *entries_[sent_].read;
      if (read.offset == 0 && read.length == read.object_bytes) {
        const std::array<std::string_view, 2> get{"GET", read.object};
        entries_[sent_].position = session_->queue(get);
      } else {
        // An empty range never reaches a transport, so the inclusive end is well defined.
        const std::string begin = std::to_string(read.offset);
        const std::string end = std::to_string(read.offset + read.length - 1);
        const std::array<std::string_view, 4> range{"GETRANGE", read.object, begin, end};
        entries_[sent_].position = session_->queue(range);
      }
      ++sent_;
      queued = true;
    }
    return queued;
  }

  // Announces the window of the reply that comes next. The last one is full, or nothing is outstanding (then
  // its request is not sent yet: what is queued is flushed after this).
  void arm() {
    Entry& entry = entries_[arrived_];
    armed_ = true;  // first: what is kept is put back even if announcing fails halfway
    seen_ = 0;
    kept_.size = entry.step.kept_bytes;
    if (entry.step.direct) {
      if (kept_.size > 0) {
        kept_.read = entries_[arrived_ - 1].read;
        kept_.place = entry.step.window;
        std::memcpy(kept_.bytes.data(), kept_.place, kept_.size);
        kept_.read->copied_bytes += kept_.size;
      }
      window_ = entry.step.window;
      session_->channel().announce(*entry.region,
                                   static_cast<uint64_t>(window_ - entry.value.registered.data()),
                                   session_->window_bytes());
    } else {
      entry.slot = next_slot_;
      next_slot_ = (next_slot_ + 1) % Session::kSlots;
      window_ = session_->slot(entry.slot).data();
      session_->announce_slot(entry.slot);
    }
  }

  // Looks at what has come of the reply in the window; true when that was new.
  bool take_reply() {
    const uint64_t received = session_->channel().received();
    if (received == seen_) return false;
    seen_ = received;
    session_->last_activity = Clock::now();
    Entry& entry = entries_[arrived_];
    const Read& read = *entry.read;
    const std::string header = "$" + std::to_string(read.length) + std::string(kCrlf);
    const std::string_view text(reinterpret_cast<const char*>(window_), received);
    if (text.substr(0, header.size()) != std::string_view(header).substr(0, text.size())) {
      collecting_ = true;
      collected_ = text;
      collect();
      return true;
    }
    if (received > entry.step.reply_bytes) {
      throw Error(ErrorCode::kFormat, context(read) + ": more bytes came than the reply has");
    }
    if (received < entry.step.reply_bytes) return true;
    if (!text.ends_with(kCrlf)) {
      throw Error(ErrorCode::kFormat, context(read) + ": the value does not end with CRLF");
    }
    arrive();
    return true;
  }

  // Takes what has come of the outstanding replies, as a stream; true when that was new. Ends when all are
  // there.
  bool collect() {
    Channel& channel = session_->channel();
    const uint64_t received = channel.received();
    const bool more = received != seen_;
    if (more) {
      collected_.append(reinterpret_cast<const char*>(window_) + seen_, received - seen_);
      seen_ = received;
      session_->last_activity = Clock::now();
    }
    while (arrived_ + outcomes_.size() < sent_ && parse_outcome()) {
    }
    if (arrived_ + outcomes_.size() < sent_) {
      if (channel.window_full()) {  // and the rest goes elsewhere
        // Not where a staged value still waits for what overwrites its end.
        const bool waits = arrived_ > 0 && !entries_[arrived_ - 1].step.direct;
        const size_t slot = waits ? (entries_[arrived_ - 1].slot + 1) % Session::kSlots : 0;
        session_->announce_slot(slot);
        window_ = session_->slot(slot).data();
        seen_ = 0;
      }
      return more;
    }
    if (collected_.size() != parsed_) {
      throw Error(ErrorCode::kFormat, session_->endpoint().name + ": more came than was asked for");
    }
    // Nothing is outstanding, so nothing can be written any more: memory may be set right and handed over.
    channel.answered(entries_[sent_ - 1].position);
    armed_ = false;
    put_back(kept_);
    while (arrived_ > 0) finish_front();
    settle();
    collecting_ = false;
    plan(0);
    return true;
  }

  // The next reply of the collected stream; false while it is not whole.
  bool parse_outcome() {
    const Read& read = *entries_[arrived_ + outcomes_.size()].read;
    const std::string_view text = std::string_view(collected_).substr(parsed_);
    const auto header = resp::parse_header(text.substr(0, resp::kMaxLineBytes));
    if (!header) return false;
    Outcome outcome{Status(), 0};
    size_t size = header->consumed;
    switch (header->type) {
      case resp::Type::kNull:
        outcome.status = no_such_key(read);
        break;
      case resp::Type::kError:
        outcome.status = resp::status_of_error(header->text, context(read));
        break;
      case resp::Type::kBulk: {
        const auto length = static_cast<uint64_t>(header->length);
        if (length > 2 * uint64_t{session_->window_bytes()}) {  // not worth its memory: the connection ends
          const Status status = wrong_size(read, length);
          throw Error(status.code(), status.message());
        }
        if (text.size() < size + length + kCrlf.size()) return false;
        if (text.substr(size + length, kCrlf.size()) != kCrlf) {
          throw Error(ErrorCode::kFormat, context(read) + ": the value does not end with CRLF");
        }
        outcome.value = parsed_ + size;
        if (length == 0 && read.length != read.object_bytes) {  // GETRANGE of an absent key
          outcome.status = no_such_key(read);
        } else if (length != read.length) {
          outcome.status = wrong_size(read, length);
        }
        size += length + kCrlf.size();
        break;
      }
      default:
        throw Error(ErrorCode::kFormat,
                    context(read) + ": the server answered GET with a reply that is no value");
    }
    outcomes_.push_back(std::move(outcome));
    parsed_ += size;
    return true;
  }

  // Completes those whose replies were collected. Nothing lands any more.
  void settle() noexcept {
    for (const Outcome& outcome : outcomes_) {
      Read& read = *entries_.front().read;
      entries_.pop_front();
      --sent_;
      if (outcome.status.ok()) {
        SegmentCursor cursor(read);
        cursor.copy_from(std::as_bytes(std::span(collected_)).subspan(outcome.value, read.length));
      }
      complete(read, outcome.status);
    }
    outcomes_.clear();
    collected_.clear();
    parsed_ = 0;
  }

  // Plans what was not asked for yet, from entries_[begin] on, as a run of its own.
  void plan(size_t begin) {
    std::vector<RunValue> values;
    for (size_t i = begin; i < entries_.size(); ++i) values.push_back(entries_[i].value);
    const std::vector<RunStep> steps = plan_run(values, session_->window_bytes());
    for (size_t i = 0; i < steps.size(); ++i) entries_[begin + i].step = steps[i];
  }

  Status no_such_key(const Read& read) const {
    return Status(ErrorCode::kNotFound, context(read) + ": there is no such key");
  }
  Status wrong_size(const Read& read, uint64_t size) const {
    return Status(ErrorCode::kIntegrity, context(read) + ": the value has " + std::to_string(size) +
                                             " bytes, expected " + std::to_string(read.length));
  }

  // The reply is whole. What its header lay over is put back before anything that may fail: from here on its
  // neighbour counts as arrived. Then the next window is announced, so that the server goes on while what is
  // complete now is finished.
  void arrive() {
    session_->channel().answered(entries_[arrived_].position);
    put_back(kept_);
    ++arrived_;
    armed_ = false;
    if (arrived_ < sent_) arm();
    const size_t finished = arrived_ - (entries_[arrived_ - 1].step.ends_after_next ? 1 : 0);
    for (size_t i = 0; i < finished; ++i) finish_front();
  }

  void put_back(Kept& kept) noexcept {
    if (kept.size == 0) return;
    std::memcpy(kept.place, kept.bytes.data(), kept.size);
    kept.read->copied_bytes += kept.size;
    kept.size = 0;
  }

  void finish_front() noexcept {
    Entry entry = entries_.front();
    entries_.pop_front();
    --arrived_;
    --sent_;
    Read& read = *entry.read;
    if (entry.step.direct) {
      if (read.checksum) {
        const auto begin = Clock::now();
        for (const Segment& segment : read.segments)
          read.crc = crc32c(read.crc, {segment.data, segment.size});
        read.checksum_time = Clock::now() - begin;
      }
    } else {
      const auto begin = Clock::now();
      SegmentCursor cursor(read);
      cursor.copy_from(session_->slot(entry.slot).subspan(bulk_header_bytes(read.length), read.length));
      if (read.checksum) read.checksum_time = Clock::now() - begin;
    }
    complete(read, Status());
  }

  const uint64_t ahead_;
  // In the order of their requests: arrived_ of them wait for the next reply, sent_ were asked for.
  std::deque<Entry> entries_;
  size_t sent_ = 0;
  size_t arrived_ = 0;
  bool armed_ = false;           // the window of entries_[arrived_] is announced
  std::byte* window_ = nullptr;  // where it begins
  uint64_t seen_ = 0;            // bytes in it that were looked at
  size_t next_slot_ = 0;
  Kept kept_;  // of the window that is announced
  bool collecting_ = false;
  std::string collected_;         // the stream of replies since one was not what was planned
  size_t parsed_ = 0;             // of it
  std::deque<Outcome> outcomes_;  // of entries_[arrived_] and on
};

}  // namespace

std::unique_ptr<Lane> make_valkey_lane(std::unique_ptr<Session> session,
                                       std::shared_ptr<Destinations> destinations, uint64_t bytes_in_flight) {
  return std::make_unique<ValkeyLane>(std::move(session), std::move(destinations), bytes_in_flight);
}

}  // namespace rdmaload::rdma
