// The weight server over RDMA: the listener of a card's address, and the threads that drive its connections.
//
// Each thread sleeps on the descriptors of its connections; the first one also accepts and hands a new
// connection to the thread that has the fewest. The store's memory is registered with the card once, for all
// of them, without rights for any peer. It serves from construction to stop(); the destructor stops, too. Any
// thread may call it.
#pragma once

#include <chrono>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "server/session.h"
#include "transport/rdma/queue_pair.h"

namespace rdmaload::server {

struct RdmaOptions {
  std::string host;         // a card's own numeric address; empty: no RDMA
  std::optional<int> port;  // 0: a free one; none: the same as over TCP, which it may be
  // Each takes half a megabyte of locked memory, and two more once it has to copy.
  int max_connections = 1024;
  std::shared_ptr<rdma::Fabric> fabric;  // null: the cards of this machine
};

class RdmaService {
 public:
  // What it uses of the server that it is a part of; from any of its threads.
  struct Owner {
    Shared& shared;
    int threads;
    std::chrono::duration<double> stall_timeout;
    std::function<uint64_t()> next_id;
    std::function<void(const Session&)> joined;
    std::function<void(const Session&)> left;
    std::function<void(std::initializer_list<std::string_view>)> log;  // does not throw
  };

  // Throws Error naming the address when it cannot listen: kUnavailable, kNotSupported, kDevice, kInvalid.
  RdmaService(Owner owner, RdmaOptions options);
  ~RdmaService();
  RdmaService(const RdmaService&) = delete;
  RdmaService& operator=(const RdmaService&) = delete;

  int port() const noexcept { return port_; }
  // Closes every connection and joins the threads. May be called again.
  void stop();

 private:
  class Loop;
  friend class Loop;
  Loop& least_busy();

  const Owner owner_;
  const RdmaOptions options_;
  std::unique_ptr<rdma::Listener> listener_;
  int port_ = 0;
  std::mutex join_mutex_;  // one caller of stop() joins
  std::vector<std::unique_ptr<Loop>> loops_;
};

}  // namespace rdmaload::server
