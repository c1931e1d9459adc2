// One connection of the Valkey-over-RDMA protocol, seen from either side: two byte streams over a queue pair.
//
// Each side announces a window, a range of registered memory; the other writes its stream into it, in order,
// and says with each write how many bytes came. When a window is full the announcer, having consumed it,
// announces again (the same or another place of the same length). The stream's meaning (RESP) is the
// caller's.
//
// Belongs to the thread of its queue pair. No call but turn() and open() sleeps. A violation of the protocol
// by the peer is Error(kFormat), a lost connection kUnavailable; after either only close() and the destructor
// may follow. What the peer says never makes it allocate.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "memory/host_arena.h"
#include "transport/rdma/fixed_queue.h"
#include "transport/rdma/queue_pair.h"

namespace rdmaload::rdma {

constexpr size_t kControlBytes = 32;  // every message that is sent, rather than written
// A Valkey server re-posts receives before it runs commands, and does not wait for one (RNR retry count 0):
// so many of our sends and writes may be unanswered. The rest of 1024 is for the control messages of full
// windows.
constexpr size_t kMaxUnansweredSends = 960;
constexpr std::chrono::seconds kKeepaliveInterval{3};  // a server's; as Valkey

enum class Side { kClient, kServer };

struct ChannelOptions {
  Side side = Side::kClient;
  // Registered memory that try_send() copies through.
  size_t send_buffer_bytes = size_t{128} << 10;
  std::chrono::milliseconds keepalive_interval = kKeepaliveInterval;  // of a server
};

class Channel {
 public:
  // Of a queue pair that is not started: posts its receives. Throws what registering and posting throw.
  Channel(std::unique_ptr<QueuePair> queue_pair, const ChannelOptions& options);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // Starts the queue pair, and returns when it is established, `window` (below) is announced and the peer's
  // window is known. Throws kUnavailable, kTimeout, kCancelled, kFormat.
  void open(const MemoryRegion& region, uint64_t offset, uint32_t length, Deadline deadline,
            const GiveUp& give_up);
  // The same without waiting, for a server's loop: ready() says when it is done, turn() brings it there.
  void start(const MemoryRegion& region, uint64_t offset, uint32_t length);
  // Established, and the peer has announced a window: bytes can be sent.
  bool ready() const noexcept { return peer_window_.has_value(); }

  // --- receiving

  // "Write here from now on": the window is [offset, offset + length) of the region, which was registered
  // kRemoteWrite and stays so until this is announced again or closed. received() starts again at 0. Rules of
  // the protocol that are the caller's to keep: only when the last window is full, or when the peer has
  // nothing left to send. The length must never change on a connection (a Valkey server dies of it):
  // kInvalid.
  void announce(const MemoryRegion& region, uint64_t offset, uint32_t length);
  // Bytes that lie in the current window, from its start on. They grow in turn() only.
  uint64_t received() const noexcept { return received_; }
  uint32_t window_length() const noexcept { return window_length_; }
  bool window_full() const noexcept { return received_ == window_length_; }
  // Over all windows of the connection: turn() after turn(), also when a turn() filled a window.
  uint64_t total_received() const noexcept { return total_received_; }

  // --- sending

  // Sends the front of `bytes` through the send buffer, as far as there is room there, in the peer's window
  // and in the send queue; how many bytes were taken. 0: call turn(), then again.
  size_t try_send(std::span<const std::byte> bytes);
  // The same from registered memory, without a copy. When some bytes were taken (not 0), `id` is completed
  // once they are no longer needed.
  size_t try_send_registered(std::span<const std::byte> bytes, uint32_t key, uint64_t id);
  // A plain write to memory that the peer named, before whatever is sent later. False when the send queue is
  // full now. With an id it is completed once the bytes are no longer needed (those of all writes before it,
  // too); without one it has no completion of its own.
  bool try_write(std::span<const std::byte> bytes, uint32_t key, uint64_t remote_address, uint32_t remote_key,
                 std::optional<uint64_t> id);
  // Ids that were completed since the last call, oldest first; how many. Ids that nobody takes count towards
  // the kSendDepth that may be under way.
  size_t take_completed(std::span<uint64_t> ids);
  // Bytes of the stream that were taken so far: a position in it.
  uint64_t total_sent() const noexcept { return total_sent_; }
  // The peer has answered everything up to this position of our stream. A client must say so as replies come:
  // kMaxUnansweredSends without it stop try_send(). (A server need not: its peer makes it wait instead.)
  void answered(uint64_t position) noexcept;
  // `id` is completed when the peer's card has acknowledged all that was sent and written before: who wants
  // to close without losing a reply waits for it. It goes out as a keep-alive. False when there is no room
  // now.
  bool try_fence(uint64_t id);

  // --- both

  // Takes what has come and completed, re-posts receives, sends control messages that are due (keep-alives of
  // a server included); when nothing had happened it sleeps up to `time` for something. True when something
  // did.
  bool turn(std::chrono::milliseconds time);
  // For a loop of its own: true when it may sleep on descriptors() until then, else call turn(0) again.
  bool arm() { return queue_pair_->arm(); }
  std::array<int, 2> descriptors() const noexcept { return queue_pair_->descriptors(); }
  // A server's next keep-alive is due then; never for a client.
  Clock::time_point next_due() const noexcept;

  // Where the peer receives; only when ready(). For tests of who may write there.
  uint64_t peer_window_address() const noexcept { return peer_window_->address; }
  uint32_t peer_window_key() const noexcept { return peer_window_->key; }

  QueuePair& queue_pair() noexcept { return *queue_pair_; }
  const std::shared_ptr<ProtectionDomain>& domain() const noexcept { return queue_pair_->domain(); }
  // See QueuePair::close(): afterwards announced memory cannot change any more.
  void close() noexcept;

  // Counted for tests and stats.
  struct Counters {
    uint64_t sends = 0;          // control messages
    uint64_t stream_writes = 0;  // writes with immediate
    uint64_t remote_writes = 0;  // plain writes
    uint64_t announcements = 0;
    uint64_t receives = 0;      // completed receives, of all kinds
    uint64_t copied_bytes = 0;  // through the send buffer
  };
  const Counters& counters() const noexcept { return counters_; }

 private:
  using Control = std::array<std::byte, kControlBytes>;
  struct PeerWindow {
    uint64_t address = 0;
    uint32_t length = 0;
    uint32_t key = 0;
    uint32_t used = 0;
  };
  struct Signaled {
    uint64_t buffer_end = 0;  // the send buffer is free up to here once it has completed
    std::optional<uint64_t> id;
  };

  bool progress();
  void handle(const Completion& completion);
  void handle_control(std::span<const std::byte> message);
  void handle_stream(const Completion& completion);
  void repost(uint64_t slot);
  void send_due_control();
  bool post_control(const Control& message, std::optional<uint64_t> id);
  size_t stream_room() const noexcept;
  void post_stream(std::span<const std::byte> bytes, std::optional<uint32_t> key, std::optional<uint64_t> id);
  bool ids_full() const noexcept;
  bool sign(std::optional<uint64_t> id);
  std::span<std::byte> buffer_space(size_t bytes) noexcept;
  Error broken(const std::string& what) const;

  // What a card may still write to or read from is declared before the queue pair, so that it ends after it.
  const Side side_;
  const std::chrono::milliseconds keepalive_interval_;
  HostArena receive_memory_;
  HostArena send_memory_;
  std::unique_ptr<MemoryRegion> receive_region_;
  std::unique_ptr<MemoryRegion> send_region_;
  const std::unique_ptr<QueuePair> queue_pair_;

  uint64_t received_ = 0;
  uint32_t window_length_ = 0;
  uint64_t total_received_ = 0;

  std::optional<PeerWindow> peer_window_;
  uint64_t total_sent_ = 0;
  FixedQueue<uint64_t> unanswered_{kReceiveDepth};  // a client's: the position in the stream behind each send
  uint64_t buffer_head_ = 0;                        // of the send buffer, as positions that only grow
  uint64_t buffer_tail_ = 0;
  uint64_t buffer_signaled_ = 0;  // the head at the last signaled request
  size_t unsignaled_ = 0;
  FixedQueue<Signaled> signaled_{kSendDepth};
  FixedQueue<uint64_t> completed_{kSendDepth};
  size_t ids_under_way_ = 0;  // in signaled_

  std::optional<Control> due_announcement_;
  std::optional<Control> due_features_;
  Clock::time_point keepalive_due_ = Clock::time_point::max();
  Counters counters_;
};

}  // namespace rdmaload::rdma
