// Reads from our own server: RDMALOAD.READ names the memory of every piece of a value, the server writes the
// pieces there and then sends an ordinary reply on the same queue pair, which so arrives after them.
//
// Pieces whose bytes nobody wants (they are part of the checksum), and pieces of memory that is not
// registered, go to a ring of registered memory; those of the latter kind are copied from there and counted.
// Of a read into GPU memory all wanted pieces must be registered: nothing is copied there from here.
#include <algorithm>
#include <cstring>
#include <deque>
#include <optional>
#include <vector>

#include "core/crc32c.h"
#include "memory/host_arena.h"
#include "transport/rdma/lane.h"

namespace rdmaload::rdma {
namespace {

constexpr uint64_t kLeastRingBytes = 1 << 20;
// Where memory may not be locked for destinations, there is not much for the ring either.
constexpr uint64_t kEnoughRingBytes = 4 << 20;
// Reads in flight at once, whatever their size: their commands and replies are small, but not nothing.
constexpr size_t kMostReads = 256;

// Memory for pieces, given back in the order in which it was taken.
class StagingRing {
 public:
  explicit StagingRing(uint64_t bytes, ProtectionDomain& domain)
      : memory_(bytes), region_(domain.register_memory(memory_.span(), Access::kRemoteWrite)) {}

  uint64_t capacity() const noexcept { return memory_.size(); }
  // Contiguous; nullopt while too much of it is taken.
  std::optional<std::span<std::byte>> take(uint64_t bytes) {
    if (taken_.empty()) head_ = 0;
    const uint64_t tail = taken_.empty() ? 0 : taken_.front().first;
    const bool wrapped = !taken_.empty() && head_ <= tail;
    uint64_t begin = head_;
    if (wrapped) {
      if (tail - head_ < bytes) return std::nullopt;
    } else if (capacity() - head_ < bytes) {
      if (tail < bytes) return std::nullopt;
      begin = 0;
    }
    head_ = begin + bytes;
    taken_.emplace_back(begin, bytes);
    return memory_.span().subspan(begin, bytes);
  }
  void give_back() noexcept { taken_.pop_front(); }
  uint64_t remote_address(const std::byte* data) const {
    return region_->address() + static_cast<uint64_t>(data - memory_.data());
  }
  uint32_t key() const noexcept { return region_->remote_key(); }

 private:
  HostArena memory_;
  std::unique_ptr<MemoryRegion> region_;
  uint64_t head_ = 0;
  std::deque<std::pair<uint64_t, uint64_t>> taken_;  // begin and length, oldest first
};

class DirectLane final : public Lane {
 public:
  DirectLane(std::unique_ptr<Session> session, std::shared_ptr<Destinations> destinations,
             uint64_t bytes_in_flight)
      : Lane(std::move(session), std::move(destinations)), share_(bytes_in_flight) {}
  ~DirectLane() override { close(); }

  bool idle() const noexcept override { return in_flight_.empty() && held_ == nullptr; }
  bool suits(uint64_t) const noexcept override { return true; }

  void take(ReadQueue& queue, size_t) override {
    for (;;) {
      Read* read = std::exchange(held_, nullptr);
      if (read == nullptr) {
        const bool first = in_flight_.empty();
        if (!first && (in_flight_bytes_ >= share_ || in_flight_.size() >= kMostReads)) return;
        read = queue.try_pop(first ? UINT64_MAX : share_ - in_flight_bytes_);
        if (read == nullptr) return;
      }
      if (read->owner->cancelled()) {
        complete(*read, Status(ErrorCode::kCancelled, "the read was cancelled"));
      } else {
        held_ = read;  // so that it is failed with the others when this throws
        if (!begin(*read)) return;
        held_ = nullptr;
      }
    }
  }

  void turn(std::chrono::milliseconds time) override {
    bool moved = session_->flush();
    moved |= session_->receive_text();
    while (!in_flight_.empty()) {
      const auto header = resp::parse_header(session_->text());
      if (!header) break;
      const size_t consumed = header->consumed;
      answered(*header);
      session_->text().erase(0, consumed);
      moved = true;
    }
    if (!moved && !in_flight_.empty()) check_activity(*in_flight_.front().read);
    session_->channel().turn(moved ? std::chrono::milliseconds(0) : time);
  }

  bool has_cancelled_reads() const noexcept override {
    return std::any_of(in_flight_.begin(), in_flight_.end(),
                       [](const InFlight& entry) { return entry.read->owner->cancelled(); });
  }

  void fail_all(const Status& first) noexcept override {
    std::deque<InFlight> entries;
    entries.swap(in_flight_);
    in_flight_bytes_ = 0;
    bool head = true;
    for (InFlight& entry : entries) {
      complete(*entry.read, lost(*entry.read, first, head));
      head = false;
    }
    if (held_ != nullptr) {
      Read& read = *std::exchange(held_, nullptr);
      complete(read, lost(read, first, head));
    }
  }

 private:
  // A stretch of the value and where it goes.
  struct Piece {
    uint64_t offset;  // in the object
    uint64_t length;
    std::byte* data;       // its place; null: dropped
    bool is_staged;        // it goes to the ring first
    std::byte* staged;     // where there
    uint64_t address = 0;  // as the server gets them
    uint32_t key = 0;
  };
  struct InFlight {
    Read* read;
    std::vector<Piece> pieces;
    bool has_staged = false;
    std::deque<uint64_t> positions;  // in the stream of commands: where each of its commands ends
    Status failed;
  };

  // Queues the commands of a read; false while the ring has no room for what it stages.
  bool begin(Read& read) {
    InFlight entry{&read, {}, false, {}, {}};
    read.crc = 0;
    read.copied_bytes = 0;
    read.checksum_time = {};
    if (read.device_fill != nullptr) read.device_fill->dropped_crcs.clear();
    uint64_t offset = read.offset, staged_bytes = 0;
    for (const Segment& segment : read.segments) {
      std::byte* data = segment.data;
      for (size_t left = segment.size; left > 0;) {
        Piece piece{offset, left, data, data == nullptr, nullptr};
        if (data != nullptr) {
          const auto found = destinations_->find({data, left}, session_->channel().domain());
          piece.length = found.bytes;
          piece.is_staged = found.region == nullptr;
          if (piece.is_staged && read.device_fill != nullptr) {
            complete(read, Status(ErrorCode::kNotSupported,
                                  "the card cannot write there: " + destinations_->device_reason()));
            return true;
          }
          if (!piece.is_staged) {
            piece.address = found.remote_address(data);
            piece.key = found.region->remote_key();
          }
          data += piece.length;
        }
        offset += piece.length;
        left -= piece.length;
        if (piece.data == nullptr && !read.checksum) continue;  // nobody needs them
        if (piece.is_staged) staged_bytes += piece.length;
        entry.pieces.push_back(piece);
      }
    }
    if (entry.pieces.empty()) {
      complete(read, Status());
      return true;
    }
    if (staged_bytes > 0 && !place_in_ring(entry, staged_bytes)) return false;
    if (in_flight_.empty()) session_->last_activity = Clock::now();
    queue_commands(entry);
    in_flight_bytes_ += read.length;
    in_flight_.push_back(std::move(entry));
    return true;
  }

  bool place_in_ring(InFlight& entry, uint64_t bytes) {
    if (!ring_ || ring_->capacity() < bytes) {
      if (std::any_of(in_flight_.begin(), in_flight_.end(), [](const auto& e) { return e.has_staged; })) {
        return false;  // until the ring that there is can go
      }
      ring_.reset();
      ring_.emplace(std::max({kLeastRingBytes, 2 * bytes, std::min(share_, kEnoughRingBytes)}),
                    *session_->channel().domain());
    }
    const auto memory = ring_->take(bytes);
    if (!memory) return false;
    std::byte* at = memory->data();
    for (Piece& piece : entry.pieces) {
      if (!piece.is_staged) continue;
      piece.staged = at;
      piece.address = ring_->remote_address(at);
      piece.key = ring_->key();
      at += piece.length;
    }
    entry.has_staged = true;
    return true;
  }

  void queue_commands(InFlight& entry) {
    const std::string size = std::to_string(entry.read->object_bytes);
    std::vector<std::string> numbers;
    std::vector<std::string_view> arguments;
    const size_t most = session_->max_segments();
    for (size_t first = 0; first < entry.pieces.size();) {
      numbers.clear();
      size_t segments = 0;
      // Pieces that follow each other in the value and in memory are one segment.
      for (; first < entry.pieces.size(); ++segments) {
        if (segments == most) break;
        const Piece& piece = entry.pieces[first];
        uint64_t length = piece.length;
        for (++first; first < entry.pieces.size(); ++first) {
          const Piece& next = entry.pieces[first];
          if (next.key != piece.key || next.address != piece.address + length ||
              next.offset != piece.offset + length) {
            break;
          }
          length += next.length;
        }
        for (const uint64_t number : {piece.offset, length, piece.address, uint64_t{piece.key}}) {
          numbers.push_back(std::to_string(number));
        }
      }
      arguments.assign({"RDMALOAD.READ", entry.read->object, size});
      arguments.insert(arguments.end(), numbers.begin(), numbers.end());
      entry.positions.push_back(session_->queue(arguments));
    }
  }

  void answered(const resp::Header& header) {
    InFlight& entry = in_flight_.front();
    Read& read = *entry.read;
    switch (header.type) {
      case resp::Type::kInteger:
        if (static_cast<uint64_t>(header.length) != read.object_bytes && entry.failed.ok()) {
          entry.failed = wrong_size(read, std::to_string(header.length));
        }
        break;
      case resp::Type::kError:
        if (entry.failed.ok()) entry.failed = status_of(read, header.text);
        break;
      default:
        throw Error(ErrorCode::kFormat,
                    context(read) + ": the server answered RDMALOAD.READ with a reply that is no number");
    }
    session_->channel().answered(entry.positions.front());
    entry.positions.pop_front();
    if (!entry.positions.empty()) return;
    if (entry.failed.ok()) deliver(entry);
    if (entry.has_staged) ring_->give_back();
    const Status status = std::move(entry.failed);
    in_flight_bytes_ -= read.length;
    in_flight_.pop_front();
    complete(read, status);
  }

  Status wrong_size(const Read& read, std::string_view size) const {
    return Status(ErrorCode::kIntegrity, context(read) + ": the value has " + std::string(size) +
                                             " bytes, expected " + std::to_string(read.object_bytes));
  }

  Status status_of(const Read& read, std::string_view text) const {
    const std::string_view word = text.substr(0, text.find(' '));
    if (word == "NOTFOUND") return Status(ErrorCode::kNotFound, context(read) + ": there is no such key");
    if (word == "SIZE") {
      return wrong_size(read, text.size() > word.size() ? text.substr(word.size() + 1, 20) : "other");
    }
    if (word == "RANGE") {
      return Status(ErrorCode::kIntegrity, context(read) + ": the value ends before the range that is read");
    }
    return resp::status_of_error(text, context(read));
  }

  // The bytes have arrived: the checksum of all of them in their order, and the staged ones to their places.
  void deliver(InFlight& entry) {
    Read& read = *entry.read;
    if (read.device_fill != nullptr) {  // what is on the GPU is verified there
      for (const Piece& piece : entry.pieces) {
        if (piece.data == nullptr) {
          read.device_fill->dropped_crcs.push_back(crc32c(0, {piece.staged, piece.length}));
        }
      }
      return;
    }
    const auto begin = read.checksum ? Clock::now() : Clock::time_point{};
    for (const Piece& piece : entry.pieces) {
      const std::byte* bytes = piece.is_staged ? piece.staged : piece.data;
      if (read.checksum) read.crc = crc32c(read.crc, {bytes, piece.length});
      if (piece.is_staged && piece.data != nullptr) {
        std::memcpy(piece.data, piece.staged, piece.length);
        read.copied_bytes += piece.length;
      }
    }
    if (read.checksum) read.checksum_time = Clock::now() - begin;
  }

  const uint64_t share_;
  std::deque<InFlight> in_flight_;
  uint64_t in_flight_bytes_ = 0;
  Read* held_ = nullptr;  // taken, but there was no room in the ring
  std::optional<StagingRing> ring_;
};

}  // namespace

std::unique_ptr<Lane> make_direct_lane(std::unique_ptr<Session> session,
                                       std::shared_ptr<Destinations> destinations, uint64_t bytes_in_flight) {
  return std::make_unique<DirectLane>(std::move(session), std::move(destinations), bytes_in_flight);
}

}  // namespace rdmaload::rdma
