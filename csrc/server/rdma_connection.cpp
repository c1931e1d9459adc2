#include "server/rdma_connection.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "core/error.h"

namespace rdmaload::server {
namespace {

// Requests are short; a SET of a chunk fills the window four times, each of which costs a message back.
constexpr uint32_t kWindowBytes = 256 << 10;
// Two chunks: while the card reads one the next is copied.
constexpr size_t kRingBytes = 2 << 20;
constexpr uint64_t kCopyBytes = 512 << 10;   // at a time
constexpr uint64_t kDirectBytes = 4 << 10;   // a write of its own costs more than copying less
constexpr uint64_t kBytesPerTurn = 4 << 20;  // then others get their turn
constexpr uint32_t kInputPerTurn = 1 << 20;
constexpr uint32_t kInputPiece = 64 << 10;  // what a session may have to keep when its replies are full
constexpr size_t kUnsignaled = 32;          // values that wait for one completion
constexpr uint64_t kMaxWriteBytes = uint64_t{1} << 30;

}  // namespace

RdmaConnection::RdmaConnection(std::unique_ptr<rdma::QueuePair> queue_pair, Shared& shared, uint64_t id,
                               std::span<std::byte> scratch)
    : shared_(shared),
      scratch_(scratch),
      window_memory_(kWindowBytes),
      channel_(std::move(queue_pair), {.side = rdma::Side::kServer}),
      session_(shared, id, channel_.queue_pair().peer_address(), Road::kRdma) {
  rdma::QueuePair& pair = channel_.queue_pair();
  window_region_ = channel_.domain()->register_memory(window_memory_.span(), rdma::Access::kBound);
  pair.start();
  window_ = pair.make_window(*window_region_);
  if (window_ == nullptr) {
    window_ = channel_.domain()->register_memory(window_memory_.span(), rdma::Access::kRemoteWrite);
    ++shared_.counters.rdma_unbound_windows;
  }
  channel_.announce(*window_, 0, kWindowBytes);
}

// The window first, which holds on to the queue pair; then the queue pair, before anything that the card may
// read goes.
RdmaConnection::~RdmaConnection() {
  window_.reset();
  channel_.close();
}

bool RdmaConnection::step() {
  bool moved = channel_.turn(std::chrono::milliseconds(0));
  release_completed();
  if (channel_.ready()) {
    if (take_input()) moved = true;
    if (send_some()) moved = true;
    // A reply that says why must have reached the client before the queue pair goes.
    if (session_.closing() && session_.replies().empty() && !fenced_ && channel_.try_fence(next_id_)) {
      in_flight_.push_back({next_id_++, {}});
      fenced_ = true;
    }
  }
  count();
  return moved || !channel_.arm();
}

void RdmaConnection::release_completed() {
  std::array<uint64_t, 64> ids;
  while (const size_t count = channel_.take_completed(ids)) {
    for (const uint64_t id : std::span(ids).first(count)) {
      while (!in_flight_.empty() && in_flight_.front().id <= id) {
        ring_tail_ = std::max(ring_tail_, in_flight_.front().ring_end);
        in_flight_.pop_front();
      }
    }
    moved_ = Clock::now();
  }
}

bool RdmaConnection::take_input() {
  uint32_t turn = 0;
  while (session_.wants_input() && turn < kInputPerTurn) {
    const auto left = static_cast<uint32_t>(channel_.received()) - consumed_;
    if (left > 0) {
      const uint32_t part = std::min(left, kInputPiece);
      session_.consume({reinterpret_cast<const char*>(window_memory_.data()) + consumed_, part});
      consumed_ += part;
      turn += part;
    } else if (channel_.window_full()) {
      channel_.announce(*window_, 0, kWindowBytes);
      consumed_ = 0;
    } else {
      break;
    }
  }
  return turn > 0;
}

bool RdmaConnection::send_some() {
  ReplyQueue& replies = session_.replies();
  uint64_t turn = 0;
  while (!replies.empty() && turn < kBytesPerTurn) {
    const uint64_t sent = send_front();
    if (sent == 0) break;
    replies.sent(sent);
    turn += sent;
    shared_.counters.bytes_sent += sent;
    session_.resume();
  }
  return turn > 0;
}

uint64_t RdmaConnection::send_front() {
  const ReplyQueue::Front front = session_.replies().front();
  if (!copied_.bytes.empty()) return send_copied(front);
  const bool large = front.length >= kDirectBytes || front.place;
  if (front.value != nullptr && large) {
    const auto length = static_cast<size_t>(std::min(front.length, kMaxWriteBytes));
    RegisteredBytes held =
        shared_.store.memory()->registered(front.value, static_cast<size_t>(front.offset), length);
    if (held.region != nullptr) return send_direct(front, std::move(held));
  }
  if (front.place || front.file != nullptr || (front.value != nullptr && large)) {
    return copy_front(front) ? send_copied(front) : 0;
  }
  return send_small();
}

// Text and small values, as many as there are, in one write.
uint64_t RdmaConnection::send_small() {
  std::array<iovec, 64> vectors;
  const size_t count = session_.replies().gather(vectors, scratch_.size(), ReplyQueue::Large::kApart);
  size_t bytes = 0;
  for (const iovec& part : std::span(vectors).first(count)) {
    std::memcpy(scratch_.data() + bytes, part.iov_base, part.iov_len);
    bytes += part.iov_len;
  }
  return channel_.try_send(scratch_.first(bytes));
}

uint64_t RdmaConnection::send_direct(const ReplyQueue::Front& front, RegisteredBytes held) {
  const std::span<const std::byte> bytes = held.bytes;
  const uint32_t key = held.region->local_key();
  uint64_t taken = bytes.size();
  if (front.place) {
    // The last of a request tells when the others are done, too.
    const bool tell = !front.more_placed || bytes.size() < front.length || unsignaled_.size() >= kUnsignaled;
    const auto id = tell ? std::optional(next_id_) : std::nullopt;
    if (!channel_.try_write(bytes, key, front.place->address, front.place->key, id)) return 0;
    unsignaled_.push_back(std::move(held));
    if (tell) in_flight_.push_back({next_id_++, std::exchange(unsignaled_, {})});
  } else {
    taken = channel_.try_send_registered(bytes, key, next_id_);
    if (taken == 0) return 0;
    unsignaled_.push_back(std::move(held));
    in_flight_.push_back({next_id_++, std::exchange(unsignaled_, {})});
  }
  shared_.counters.rdma_direct_bytes += taken;
  return taken;
}

uint64_t RdmaConnection::send_copied(const ReplyQueue::Front& front) {
  uint64_t taken = copied_.bytes.size();
  if (front.place) {
    if (!channel_.try_write(copied_.bytes, ring_->local_key(), front.place->address, front.place->key,
                            next_id_)) {
      return 0;
    }
  } else {
    taken = channel_.try_send_registered(copied_.bytes, ring_->local_key(), next_id_);
    if (taken == 0) return 0;
  }
  copied_.bytes = copied_.bytes.subspan(taken);
  in_flight_.push_back(
      {next_id_++, std::exchange(unsignaled_, {}), copied_.bytes.empty() ? copied_.ring_end : 0});
  shared_.counters.rdma_copied_bytes += taken;
  return taken;
}

// False: the ring is full.
bool RdmaConnection::copy_front(const ReplyQueue::Front& front) {
  const std::span<std::byte> into = ring_space(static_cast<size_t>(std::min(front.length, kCopyBytes)));
  if (into.empty()) return false;
  if (front.value != nullptr) {
    std::memcpy(into.data(), front.value->bytes().data() + front.offset, into.size());
  } else {
    read_file(front, into);
  }
  copied_ = {into, ring_head_};
  return true;
}

void RdmaConnection::read_file(const ReplyQueue::Front& front, std::span<std::byte> into) {
  size_t done = 0;
  while (done < into.size()) {
    const ssize_t got = pread(front.file->descriptor(), into.data() + done, into.size() - done,
                              static_cast<off_t>(front.offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      ++shared_.counters.files_failed;
      throw Error(ErrorCode::kIntegrity,
                  front.file->path() + (got == 0 ? ": ends before byte " : ": cannot be read at byte ") +
                      std::to_string(front.offset + done) +
                      ": it changed while it was served; the connection of " + session_.address() +
                      " was closed");
    }
    done += static_cast<size_t>(got);
  }
}

// The next bytes of the ring, in one piece and at most so many; empty when all are in flight.
std::span<std::byte> RdmaConnection::ring_space(size_t bytes) {
  if (ring_ == nullptr) {
    ring_memory_ = std::make_unique<HostArena>(kRingBytes);
    ring_ = channel_.domain()->register_memory(ring_memory_->span(), rdma::Access::kSource);
  }
  const auto at = static_cast<size_t>(ring_head_ % kRingBytes);
  const auto free = static_cast<size_t>(kRingBytes - (ring_head_ - ring_tail_));
  const auto space = ring_memory_->span().subspan(at, std::min({bytes, free, kRingBytes - at}));
  ring_head_ += space.size();
  return space;
}

void RdmaConnection::count() {
  Counters& counters = shared_.counters;
  const rdma::Channel::Counters& done = channel_.counters();
  const uint64_t requests = done.sends + done.stream_writes + done.remote_writes;
  counters.rdma_work_requests += requests - std::exchange(counted_requests_, requests);
  const uint64_t input = channel_.total_received();
  const uint64_t output = done.stream_writes + done.remote_writes;
  counters.bytes_received += input - counted_input_;
  if (input != counted_input_ || output != counted_output_) moved_ = Clock::now();
  counted_input_ = input;
  counted_output_ = output;
}

}  // namespace rdmaload::server
