// One client's connection over RDMA: a session driven through a channel.
//
// Requests come through the client's writes into a small window of ours, the only memory that it can write,
// and that no other client can: the domain is shared, so the window is bound to its queue pair, by cards that
// can. Replies go into its window: text through the channel's send buffer, values straight from where they
// are stored, whose registration gives peers no rights. What lies elsewhere (exported files, small values,
// all values where the system refuses to register them) is copied once, into a registered ring of this
// connection. Placed bytes of RDMALOAD.READ go to where the client said, in the order of replies.
//
// What is in flight holds its value until the card has sent it; close() waits for the card first. What a
// client can make it hold is bounded by the session (replies that wait), the send queue and the ring. One
// thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "memory/host_arena.h"
#include "server/session.h"
#include "transport/rdma/channel.h"

namespace rdmaload::server {

class RdmaConnection {
 public:
  // `scratch` is the thread's: small replies are gathered in it. Throws what registering memory throws.
  RdmaConnection(std::unique_ptr<rdma::QueuePair> queue_pair, Shared& shared, uint64_t id,
                 std::span<std::byte> scratch);
  ~RdmaConnection();
  RdmaConnection(const RdmaConnection&) = delete;
  RdmaConnection& operator=(const RdmaConnection&) = delete;

  // Some work, without sleeping, and only so much that others get their turn. True: call it again, even if
  // nothing has come; false: when one of descriptors() is readable, or at next_due(). Throws Error when the
  // connection is lost or has to be closed: kFormat (the client's fault), kIntegrity (an exported file
  // changed; an operator should read it), kDevice (memory cannot be registered), kUnavailable.
  bool step();
  // Nothing is left to do for a client that said QUIT, or that was told why it is closed.
  bool finished() const noexcept { return fenced_ && in_flight_.empty(); }

  auto descriptors() const noexcept { return channel_.descriptors(); }  // -1: none
  Clock::time_point next_due() const noexcept { return channel_.next_due(); }
  const Session& session() const noexcept { return session_; }
  // Connected, and the client has said where it receives.
  bool ready() const noexcept { return channel_.ready(); }
  // Something is under way that needs the client.
  bool busy() const noexcept { return session_.busy() || !in_flight_.empty(); }
  Clock::time_point since() const noexcept { return since_; }
  Clock::time_point moved() const noexcept { return moved_; }  // when a byte last went either way

 private:
  // What the card may still read; ids grow.
  struct InFlight {
    uint64_t id;
    std::vector<RegisteredBytes> held;
    uint64_t ring_end = 0;  // the ring is free up to here; 0: it holds none of it
  };
  // Copied bytes, the front of the first reply, of which the card has not got all yet.
  struct Copied {
    std::span<const std::byte> bytes;
    uint64_t ring_end = 0;
  };

  void release_completed();
  bool take_input();
  bool send_some();
  // How many bytes of the first reply were taken; 0: there is no room.
  uint64_t send_front();
  uint64_t send_small();
  uint64_t send_direct(const ReplyQueue::Front& front, RegisteredBytes held);
  uint64_t send_copied(const ReplyQueue::Front& front);
  bool copy_front(const ReplyQueue::Front& front);
  void read_file(const ReplyQueue::Front& front, std::span<std::byte> into);
  std::span<std::byte> ring_space(size_t bytes);
  void count();

  Shared& shared_;
  const std::span<std::byte> scratch_;
  const Clock::time_point since_ = Clock::now();
  Clock::time_point moved_ = since_;
  HostArena window_memory_;
  rdma::Channel channel_;
  std::unique_ptr<rdma::MemoryRegion> window_region_;
  std::unique_ptr<rdma::MemoryRegion> window_;  // onto the region, for this client alone
  uint32_t consumed_ = 0;                       // of the window
  Session session_;

  std::unique_ptr<HostArena> ring_memory_;  // null until something has to be copied
  std::unique_ptr<rdma::MemoryRegion> ring_;
  uint64_t ring_head_ = 0;  // positions that only grow; modulo the size they are places
  uint64_t ring_tail_ = 0;
  Copied copied_;

  uint64_t next_id_ = 1;
  std::vector<RegisteredBytes> unsignaled_;  // of writes whose completion a later one will tell
  std::deque<InFlight> in_flight_;
  bool fenced_ = false;  // nothing will be sent any more
  uint64_t counted_input_ = 0;
  uint64_t counted_output_ = 0;
  uint64_t counted_requests_ = 0;
};

}  // namespace rdmaload::server
