#include "transport/rdma/channel.h"

#include <algorithm>
#include <cstring>

#include "core/checked.h"

namespace rdmaload::rdma {
namespace {

enum class Opcode : uint16_t { kGetFeatures = 0, kSetFeatures = 1, kKeepalive = 2, kRegisterMemory = 3 };

// Where the fields of control messages lie; big-endian, the rest of the 32 bytes is reserved.
constexpr size_t kSelectOffset = 2, kFeaturesOffset = 24;
constexpr size_t kAddressOffset = 16, kLengthOffset = 24, kKeyOffset = 28;

// A request is signaled at the latest after so many that were not, or after a quarter of the send buffer:
// what they hold is free soon, and a sleeping thread is not woken for each.
constexpr size_t kSignalEvery = 32;
// Places of the send queue that streams leave to control messages.
constexpr size_t kControlRoom = 16;
// Taken by one turn(): a peer that never stops sending does not keep its owner from other work.
constexpr size_t kMaxCompletionsPerTurn = 4096;
constexpr size_t kMaxWriteBytes = size_t{1} << 30;  // cards take 2 GiB in one request

template <typename T>
void put(std::span<std::byte> message, size_t offset, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) {
    message[offset + i] = static_cast<std::byte>(value >> (8 * (sizeof(T) - 1 - i)));
  }
}

template <typename T>
T get(std::span<const std::byte> message, size_t offset) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i)
    value = static_cast<T>(value << 8 | static_cast<T>(message[offset + i]));
  return value;
}

}  // namespace

Channel::Channel(std::unique_ptr<QueuePair> queue_pair, const ChannelOptions& options)
    : side_(options.side),
      keepalive_interval_(options.keepalive_interval),
      receive_memory_(kReceiveDepth * kControlBytes),
      send_memory_(std::max(options.send_buffer_bytes, 2 * kControlBytes)),
      receive_region_(queue_pair->domain()->register_memory(receive_memory_.span(), Access::kReceive)),
      send_region_(queue_pair->domain()->register_memory(send_memory_.span(), Access::kSource)),
      queue_pair_(std::move(queue_pair)) {
  for (size_t slot = 0; slot < kReceiveDepth; ++slot) repost(slot);
}

Channel::~Channel() { close(); }

void Channel::close() noexcept { queue_pair_->close(); }

void Channel::open(const MemoryRegion& region, uint64_t offset, uint32_t length, Deadline deadline,
                   const GiveUp& give_up) {
  start(region, offset, length);
  establish(*queue_pair_, deadline, give_up);
  while (!ready()) {
    if (turn(std::chrono::milliseconds(deadline.poll_milliseconds(kGiveUpPollMilliseconds)))) continue;
    if (give_up && give_up())
      throw Error(ErrorCode::kCancelled, "connecting was cancelled: " + queue_pair_->description());
    if (deadline.passed()) {
      throw Error(ErrorCode::kTimeout,
                  "connected over RDMA, but the server never announced its receive window: " +
                      queue_pair_->description());
    }
  }
}

void Channel::start(const MemoryRegion& region, uint64_t offset, uint32_t length) {
  queue_pair_->start();
  announce(region, offset, length);
}

void Channel::announce(const MemoryRegion& region, uint64_t offset, uint32_t length) {
  if (length == 0 || offset > region.bytes() || length > region.bytes() - offset) {
    throw Error(ErrorCode::kInvalid, "a receive window must lie in its registered memory and not be empty");
  }
  // A Valkey server before 9.2 frees memory that it did not allocate when a window's length changes, and
  // dies.
  if (window_length_ != 0 && length != window_length_) {
    throw Error(ErrorCode::kInvalid, "the receive window of a connection had " +
                                         std::to_string(window_length_) + " bytes and cannot become " +
                                         std::to_string(length));
  }
  window_length_ = length;
  received_ = 0;
  Control message{};
  put(message, 0, static_cast<uint16_t>(Opcode::kRegisterMemory));
  put(message, kAddressOffset, region.address() + offset);
  put(message, kLengthOffset, length);
  put(message, kKeyOffset, region.remote_key());
  due_announcement_ = message;
  if (queue_pair_->established()) send_due_control();
}

// --- sending

size_t Channel::stream_room() const noexcept {
  if (!peer_window_ || queue_pair_->send_room() <= kControlRoom) return 0;
  if (side_ == Side::kClient && unanswered_.size() >= kMaxUnansweredSends) return 0;
  return std::min<size_t>(peer_window_->length - peer_window_->used, kMaxWriteBytes);
}

size_t Channel::try_send(std::span<const std::byte> bytes) {
  size_t taken = 0;
  while (taken < bytes.size()) {
    const size_t room = std::min(stream_room(), bytes.size() - taken);
    if (room == 0) break;
    const auto piece = bytes.subspan(taken, room);
    if (room <= queue_pair_->inline_bytes()) {
      post_stream(piece, std::nullopt, std::nullopt);
      taken += room;
      continue;
    }
    const std::span<std::byte> space = buffer_space(room);
    if (space.empty()) break;
    std::memcpy(space.data(), piece.data(), space.size());
    buffer_head_ += space.size();
    counters_.copied_bytes += space.size();
    post_stream(space, send_region_->local_key(), std::nullopt);
    taken += space.size();
  }
  return taken;
}

size_t Channel::try_send_registered(std::span<const std::byte> bytes, uint32_t key, uint64_t id) {
  const size_t room = std::min(stream_room(), bytes.size());
  if (room == 0 || ids_full()) return 0;
  post_stream(bytes.first(room), key, id);
  return room;
}

bool Channel::try_write(std::span<const std::byte> bytes, uint32_t key, uint64_t remote_address,
                        uint32_t remote_key, std::optional<uint64_t> id) {
  if (bytes.size() > kMaxWriteBytes) throw Error(ErrorCode::kInvalid, "a remote write is at most 1 GiB");
  if (!ready() || queue_pair_->send_room() <= kControlRoom || (id && ids_full())) return false;
  const bool signaled = sign(id);
  queue_pair_->post_write(0, bytes, key, remote_address, remote_key, std::nullopt, signaled);
  ++counters_.remote_writes;
  return true;
}

bool Channel::try_fence(uint64_t id) {
  if (!ready() || ids_full()) return false;
  Control message{};
  put(message, 0, static_cast<uint16_t>(Opcode::kKeepalive));
  return post_control(message, id);
}

void Channel::post_stream(std::span<const std::byte> bytes, std::optional<uint32_t> key,
                          std::optional<uint64_t> id) {
  const auto length = static_cast<uint32_t>(bytes.size());
  const bool signaled = sign(id);
  queue_pair_->post_write(0, bytes, key, peer_window_->address + peer_window_->used, peer_window_->key,
                          length, signaled);
  peer_window_->used += length;
  total_sent_ += length;
  if (side_ == Side::kClient) unanswered_.push(total_sent_);
  ++counters_.stream_writes;
}

bool Channel::post_control(const Control& message, std::optional<uint64_t> id) {
  if (queue_pair_->send_room() == 0 || signaled_.full()) return false;
  if (side_ == Side::kClient && unanswered_.full()) return false;
  if (queue_pair_->inline_bytes() >= message.size()) {
    const bool signaled = sign(id);
    queue_pair_->post_send(0, message, std::nullopt, signaled);
  } else {
    std::span<std::byte> space = buffer_space(message.size());
    if (space.size() < message.size() && !space.empty()) {  // the end of the buffer: go on at its beginning
      const uint64_t before = buffer_head_;
      buffer_head_ += space.size();
      space = buffer_space(message.size());
      if (space.size() < message.size()) buffer_head_ = before;
    }
    if (space.size() < message.size()) return false;
    std::memcpy(space.data(), message.data(), message.size());
    buffer_head_ += message.size();
    const bool signaled = sign(id);
    queue_pair_->post_send(0, space, send_region_->local_key(), signaled);
  }
  if (side_ == Side::kClient) unanswered_.push(total_sent_);
  ++counters_.sends;
  return true;
}

// Free memory of the send buffer from its head on, in one piece.
std::span<std::byte> Channel::buffer_space(size_t bytes) noexcept {
  const size_t size = send_memory_.size();
  const size_t at = buffer_head_ % size;
  const size_t free = size - (buffer_head_ - buffer_tail_);
  return send_memory_.span().subspan(at, std::min({bytes, free, size - at}));
}

// Whether the next request is signaled; notes what its completion will mean.
bool Channel::sign(std::optional<uint64_t> id) {
  const bool signaled = id || unsignaled_ + 1 >= kSignalEvery ||
                        buffer_head_ - buffer_signaled_ >= send_memory_.size() / 4 ||
                        queue_pair_->send_room() <= kControlRoom;
  if (!signaled) {
    ++unsignaled_;
    return false;
  }
  unsignaled_ = 0;
  buffer_signaled_ = buffer_head_;
  signaled_.push({buffer_head_, id});
  if (id) ++ids_under_way_;
  return true;
}

bool Channel::ids_full() const noexcept { return ids_under_way_ + completed_.size() >= kSendDepth; }

size_t Channel::take_completed(std::span<uint64_t> ids) {
  size_t count = 0;
  for (; count < ids.size() && !completed_.empty(); completed_.pop()) ids[count++] = completed_.front();
  return count;
}

void Channel::answered(uint64_t position) noexcept {
  while (!unanswered_.empty() && unanswered_.front() <= position) unanswered_.pop();
}

// --- receiving

bool Channel::turn(std::chrono::milliseconds time) {
  if (progress()) return true;
  if (keepalive_due_ != Clock::time_point::max()) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(keepalive_due_ - Clock::now());
    time = std::clamp(left, std::chrono::milliseconds(0), time);
  }
  const bool was_established = queue_pair_->established();
  queue_pair_->wait(time);
  return progress() || queue_pair_->established() != was_established;
}

Clock::time_point Channel::next_due() const noexcept { return keepalive_due_; }

bool Channel::progress() {
  std::array<Completion, 32> completions;
  size_t taken = 0;
  while (taken < kMaxCompletionsPerTurn) {
    const size_t count = queue_pair_->poll(completions);
    for (size_t i = 0; i < count; ++i) handle(completions[i]);
    taken += count;
    if (count < completions.size()) break;
  }
  const uint64_t sent = counters_.sends;
  send_due_control();
  return taken > 0 || counters_.sends != sent;
}

void Channel::send_due_control() {
  if (!queue_pair_->established()) return;
  if (due_announcement_ && post_control(*due_announcement_, std::nullopt)) {
    due_announcement_.reset();
    ++counters_.announcements;
  }
  if (due_features_ && post_control(*due_features_, std::nullopt)) due_features_.reset();
  if (side_ != Side::kServer) return;
  const Clock::time_point now = Clock::now();
  if (keepalive_due_ == Clock::time_point::max()) keepalive_due_ = now + keepalive_interval_;
  if (now < keepalive_due_) return;
  // Without room there is enough under way that the client hears.
  Control message{};
  put(message, 0, static_cast<uint16_t>(Opcode::kKeepalive));
  post_control(message, std::nullopt);
  keepalive_due_ = now + keepalive_interval_;
}

void Channel::handle(const Completion& completion) {
  if (!completion.error.empty()) {
    throw Error(ErrorCode::kUnavailable,
                "the RDMA connection failed (" + completion.error + "): " + queue_pair_->description());
  }
  if (completion.kind != Completion::Kind::kReceive) {
    if (signaled_.empty()) throw broken("a completion that nothing was posted for");
    const Signaled& done = signaled_.front();
    buffer_tail_ = done.buffer_end;
    if (done.id) {
      completed_.push(*done.id);
      --ids_under_way_;
    }
    signaled_.pop();
    return;
  }
  ++counters_.receives;
  if (completion.immediate) {
    handle_stream(completion);
  } else {
    if (completion.bytes != kControlBytes) {
      throw broken("a control message of " + std::to_string(completion.bytes) + " bytes instead of 32");
    }
    handle_control(receive_memory_.span().subspan(completion.id * kControlBytes, kControlBytes));
  }
  repost(completion.id);
}

void Channel::handle_stream(const Completion& completion) {
  const uint32_t bytes = *completion.immediate;
  if (bytes != completion.bytes) {
    throw broken("a write of " + std::to_string(completion.bytes) + " bytes that it called " +
                 std::to_string(bytes));
  }
  if (bytes > window_length_ - received_) {
    throw broken("a write of " + std::to_string(bytes) + " bytes where its window had " +
                 std::to_string(window_length_ - received_) + " left");
  }
  received_ += bytes;
  total_received_ += bytes;
}

void Channel::handle_control(std::span<const std::byte> message) {
  switch (static_cast<Opcode>(get<uint16_t>(message, 0))) {
    case Opcode::kGetFeatures:
      if (side_ == Side::kClient) return;  // the answer to a question that we do not ask
      due_features_.emplace();  // no features; another such question before the answer changes nothing
      put(*due_features_, kSelectOffset, get<uint16_t>(message, kSelectOffset));
      return;
    case Opcode::kSetFeatures:
      if (get<uint64_t>(message, kFeaturesOffset) != 0) throw broken("features that nobody offered");
      return;
    case Opcode::kKeepalive:
      return;
    case Opcode::kRegisterMemory: {
      PeerWindow window;
      window.address = get<uint64_t>(message, kAddressOffset);
      window.length = get<uint32_t>(message, kLengthOffset);
      window.key = get<uint32_t>(message, kKeyOffset);
      if (window.length == 0 || !checked_add(window.address, window.length)) {
        throw broken("a receive window of " + std::to_string(window.length) + " bytes");
      }
      // It announces again when it has consumed all of the window before, and so taken those receives.
      if (peer_window_ && peer_window_->used == peer_window_->length) answered(total_sent_);
      peer_window_ = window;
      return;
    }
  }
  throw broken("a control message of unknown kind " + std::to_string(get<uint16_t>(message, 0)));
}

void Channel::repost(uint64_t slot) {
  queue_pair_->post_receive(slot, receive_memory_.span().subspan(slot * kControlBytes, kControlBytes),
                            receive_region_->local_key());
}

Error Channel::broken(const std::string& what) const {
  return Error(ErrorCode::kFormat, "the peer breaks the Valkey-over-RDMA protocol with " + what + ": " +
                                       queue_pair_->description());
}

}  // namespace rdmaload::rdma
