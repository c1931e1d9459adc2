// The weight server over TCP: it owns the listening socket and the threads. It has the one over RDMA as a
// part.
//
// Each thread is an epoll loop that owns its connections; the first one also accepts and hands a new
// connection to the loop that has the fewest. Sessions know nothing of sockets: another transport drives them
// the same way. It serves from construction to stop(); the destructor stops, too. Any thread may call it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "server/rdma_service.h"
#include "server/session.h"
#include "server/store.h"
#include "transport/tls_server.h"

namespace rdmaload::server {

struct ServerOptions {
  std::string host = "127.0.0.1";  // a numeric address or a name; "" or "0.0.0.0" is every address
  int port = 0;                    // 0: a free one
  std::string password;            // empty: nobody is asked
  TlsServerOptions tls;            // without a certificate: plain
  int threads = 2;
  int max_connections = 10'000;
  // A connection with a request or a reply under way of which nothing moves for so long is closed; so is one
  // that has not said who it is.
  std::chrono::duration<double> stall_timeout{120};
  std::string version;  // of rdmaload, for INFO
  RdmaOptions rdma;     // where it listens besides
};

class Server {
 public:
  // Throws Error(kUnavailable) naming the address when it cannot listen, kInvalid for options that make no
  // sense, and what TlsServerContext throws.
  Server(std::shared_ptr<Store> store, ServerOptions options);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  int port() const noexcept { return shared_.port; }
  int rdma_port() const noexcept { return shared_.rdma_port; }  // 0: not over RDMA
  const Counters& counters() const noexcept { return counters_; }
  const std::shared_ptr<Store>& store() const noexcept { return store_; }

  // Closes every connection and joins the threads. May be called again.
  void stop();
  // False when `seconds` passed and it still serves; true after stop() or a client's SHUTDOWN.
  bool wait(std::chrono::duration<double> seconds);
  // What an operator should read, oldest first; the list is emptied, and holds the last hundred lines.
  std::vector<std::string> take_log();

 private:
  class Loop;
  friend class Loop;

  void ask_to_stop();
  // A line of these parts. Without memory for it nothing is said: whoever has an error to tell goes on.
  void log(std::initializer_list<std::string_view> parts) noexcept;
  std::string client_lines();
  static uint64_t next_id();  // of a session, in this process
  void joined(const Session& session);
  void left(const Session& session);
  std::unique_ptr<RdmaService> make_rdma();
  Loop& least_busy();

  const std::shared_ptr<Store> store_;
  const ServerOptions options_;
  Counters counters_;
  Shared shared_;
  const std::unique_ptr<const TlsServerContext> tls_;  // null: plain
  int listener_ = -1;

  std::mutex mutex_;
  std::condition_variable stopped_;
  bool stopping_ = false;  // Guarded by mutex_, as is what follows.
  std::deque<std::string> log_;
  std::unordered_map<uint64_t, const Session*> sessions_;

  std::mutex join_mutex_;  // one caller of stop() joins
  std::vector<std::unique_ptr<Loop>> loops_;
  std::unique_ptr<RdmaService> rdma_;
};

}  // namespace rdmaload::server
