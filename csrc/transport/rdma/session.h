// One connection to a server over RDMA, from nothing to where values can be read: route, queue pair, windows,
// credentials, what the server speaks, and a self-test of the way. Then a stream of small replies.
//
// Everything that takes time has a deadline. Belongs to one thread. The memory of the windows is its own: two
// slots, registered for the server to write to, until close().
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "memory/host_arena.h"
#include "transport/rdma/channel.h"
#include "transport/resp/connection.h"

namespace rdmaload::rdma {

// What is known of a value beforehand, to test the way with.
struct Sample {
  std::string object;  // empty: none
  uint64_t bytes = 0;
};

class Session {
 public:
  static constexpr size_t kSlots = 2;
  static constexpr uint32_t kLeastWindowBytes = 4096;

  // Throws kUnavailable, kTimeout, kCancelled, kNotSupported, kDevice, kAuthentication, kFormat, and
  // kIntegrity when the self-test read something else than was sent.
  Session(Fabric& fabric, const resp::Endpoint& endpoint, const Remote& remote, uint32_t window_bytes,
          const GiveUp& give_up);
  ~Session() { close(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // "RDMALOAD.READ over mlx5_0 ..., to 10.0.0.5:6380"
  std::string description() const;
  // Segments per RDMALOAD.READ, or 0 where the server does not know that command.
  size_t max_segments() const noexcept { return max_segments_; }
  // Reads the front of a value in both ways and compares. Does nothing where the server has no such value.
  void test_direct_reads(const Sample& sample, const GiveUp& give_up);

  Channel& channel() noexcept { return *channel_; }
  const resp::Endpoint& endpoint() const noexcept { return endpoint_; }
  uint32_t window_bytes() const noexcept { return window_bytes_; }
  std::span<std::byte> slot(size_t index) const noexcept {
    return staging_.span().subspan(index * window_bytes_, window_bytes_);
  }
  void announce_slot(size_t index);

  // Appends a command to what is to be sent; where the stream of commands then ends.
  uint64_t queue(std::span<const std::string_view> arguments);
  // Sends what there is room for; true when something went.
  bool flush();
  bool has_unsent() const noexcept { return out_sent_ < out_.size(); }

  // Replies as text: for as long as only announce_slot(0) is used. Takes what has come; true when something
  // had.
  bool receive_text();
  std::string& text() noexcept { return text_; }

  // When bytes of replies last came (not keep-alives), or commands were queued with none outstanding.
  Clock::time_point last_activity = Clock::now();
  void close() noexcept { channel_->close(); }

 private:
  resp::Reply ask(std::initializer_list<std::string_view> arguments, Deadline deadline,
                  const GiveUp& give_up);
  void negotiate(Deadline deadline, const GiveUp& give_up);
  void test_stream(Deadline deadline, const GiveUp& give_up);

  // In the order in which they are needed by each other: the channel goes first, then the registration.
  const resp::Endpoint& endpoint_;
  const uint32_t window_bytes_;
  HostArena staging_;
  std::unique_ptr<MemoryRegion> region_;
  std::unique_ptr<Channel> channel_;
  std::string out_;
  size_t out_sent_ = 0;
  uint64_t queued_ = 0;    // bytes of commands, ever
  uint64_t consumed_ = 0;  // of the current window
  std::string text_;
  size_t max_segments_ = 0;
};

}  // namespace rdmaload::rdma
