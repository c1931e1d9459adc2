// One thread of the server: an epoll loop and the connections that it owns.
//
// add(), stop() and load() are for any thread; everything else is the loop's own. Included by server.cpp and
// loop.cpp only.
#pragma once

#include <sys/epoll.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "server/channel.h"
#include "server/server.h"
#include "server/splice_pipe.h"

namespace rdmaload::server {

class Server::Loop {
 public:
  using Clock = std::chrono::steady_clock;

  // Throws Error(kUnavailable) when the system has no descriptors left.
  Loop(Server& server, bool accepts);
  ~Loop();
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  void start();
  void join();
  void stop();
  // Takes an accepted socket, which counts as a connection already.
  void add(int fd);
  int load() const { return load_; }

 private:
  struct Connection {
    Connection(int fd, const TlsServerContext* tls, SplicePipe& pipe, Shared& shared, uint64_t id,
               std::string address, Clock::time_point now)
        : session(shared, id, std::move(address)), channel(fd, tls, pipe), since(now), moved(now) {}
    Session session;
    Channel channel;  // the last that can throw: what throws leaves the descriptor to the caller
    uint32_t events = EPOLLIN;
    bool input_ended = false;
    const Clock::time_point since;
    Clock::time_point moved;  // when a byte last went either way
  };
  using Connections = std::unordered_map<int, std::unique_ptr<Connection>>;

  // Owns a descriptor.
  class Descriptor {
   public:
    explicit Descriptor(int fd);
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const noexcept { return fd_; }

   private:
    int fd_;
  };

  void wake();
  void watch(int fd, uint32_t events, int operation);
  void run();
  void take_inbox();
  void begin(int fd);
  void accept_some();
  void tick();
  void attend(int fd, uint32_t events);
  void handle(Connection& connection, uint32_t events);
  bool receive(Connection& connection);    // false: the connection is lost
  bool send_some(Connection& connection);  // likewise
  void drop(Connection& connection);

  Server& server_;
  const Descriptor epoll_;
  const Descriptor wake_;
  std::vector<std::byte> buffer_;
  SplicePipe pipe_;
  Connections connections_;  // by descriptor
  std::vector<int> again_;   // descriptors with input that epoll does not know of: TLS has taken it already
  bool listener_paused_ = false;
  Clock::time_point now_ = Clock::now();
  std::atomic<bool> stop_ = false;
  std::atomic<int> load_ = 0;
  std::mutex mutex_;
  std::vector<int> inbox_;  // Guarded by mutex_.
  std::thread thread_;
};

}  // namespace rdmaload::server
