// One client's conversation, without its socket: bytes in, replies out.
//
// The transport asks value_space() where the next bytes belong. While a large value is being received that is
// the value's own memory; otherwise bytes go to consume(). It sends what replies() holds, calls resume() when
// it has sent some, and reads on only while wants_input() holds: a client that does not take its replies is
// not read from, so what it makes us keep stays bounded; what is more than any ordinary client needs, for
// requests of thousands of keys, counts against the store's limit. One thread; the store and the facts are
// shared.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "server/auth_limiter.h"
#include "server/reply_queue.h"
#include "server/request.h"
#include "server/store.h"

namespace rdmaload::server {

// Counted over all connections since the server began.
struct Counters {
  std::atomic<uint64_t> connections_accepted = 0;
  std::atomic<uint64_t> connections_refused = 0;
  std::atomic<uint64_t> connections_now = 0;
  std::atomic<uint64_t> connections_stalled = 0;  // closed because nothing moved for too long
  std::atomic<uint64_t> commands = 0;
  std::atomic<uint64_t> errors = 0;  // error replies
  std::atomic<uint64_t> hits = 0;
  std::atomic<uint64_t> misses = 0;
  std::atomic<uint64_t> bytes_received = 0;
  std::atomic<uint64_t> bytes_sent = 0;
  std::atomic<uint64_t> bytes_by_reference = 0;  // of these, what the kernel sent without a copy
  std::atomic<uint64_t> refused_for_memory = 0;
  std::atomic<uint64_t> tls_failures = 0;  // handshakes
  std::atomic<uint64_t> auth_failures = 0;
  std::atomic<uint64_t> auth_refused = 0;  // not looked at: too many failed before
  std::atomic<uint64_t> files_failed = 0;  // replies that ended early because a file is short or unreadable
  // Over RDMA; bytes and connections count above, too.
  std::atomic<uint64_t> rdma_connections_now = 0;
  std::atomic<uint64_t> rdma_unbound_windows = 0;  // connections whose window the card cannot bind to them
  std::atomic<uint64_t> rdma_reads = 0;            // RDMALOAD.READ that were answered with bytes
  std::atomic<uint64_t> rdma_work_requests = 0;    // sends and writes that were posted
  std::atomic<uint64_t> rdma_direct_bytes = 0;     // of values, from where they are stored
  std::atomic<uint64_t> rdma_copied_bytes = 0;     // of values and files, copied once to be sent
};

// What every session of a server shares.
struct Shared {
  Store& store;
  Counters& counters;
  std::string password;  // empty: nobody is asked
  std::string version;   // of rdmaload
  int port = 0;
  int rdma_port = 0;  // 0: no RDMA
  int threads = 0;
  int max_connections = 0;
  std::chrono::steady_clock::time_point started;
  std::function<void()> shut_down;            // from any thread; returns at once
  std::function<std::string()> client_lines;  // what CLIENT LIST shows
  bool tls = false;
  AuthLimiter auth_limiter = {};
};

// How a client is connected, as far as commands differ.
enum class Road { kTcp, kRdma };

class Session {
 public:
  Session(Shared& shared, uint64_t id, std::string address, Road road = Road::kTcp);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Where the next bytes of the stream belong; empty: give them to consume(). At most that many may be given.
  std::span<std::byte> value_space() noexcept;
  void value_received(size_t bytes);
  void consume(std::string_view bytes);
  void resume();

  ReplyQueue& replies() noexcept { return replies_; }
  const ReplyQueue& replies() const noexcept { return replies_; }
  bool wants_input() const noexcept { return !closing_ && held_input_.empty() && !full(); }
  // Close the connection once replies() is empty.
  bool closing() const noexcept { return closing_; }
  bool authenticated() const noexcept { return authenticated_; }
  // A request has begun, or replies wait: the client has to do something for things to move on.
  bool busy() const noexcept { return parser_.partial() || !replies_.empty() || !held_input_.empty(); }

  uint64_t id() const noexcept { return id_; }
  const std::string& address() const noexcept { return address_; }
  // For CLIENT LIST, which another thread may run.
  std::string list_line() const;

 private:
  using Arguments = std::vector<std::string_view>;
  struct Command;
  static std::span<const Command> commands();
  static const Command* find_command(std::string_view name);

  bool full() const noexcept;
  void charge_buffers();
  void process(std::string_view& bytes);
  void begin_large_argument();
  void execute(const Arguments& arguments);
  void error(std::string_view text);
  void integer(uint64_t value);
  void simple(std::string_view text);
  void bulk(std::string_view text);
  void null();
  void array(size_t count);
  void map(size_t pairs);
  void content_reply(const Content& content, uint64_t offset, uint64_t length);
  bool passed(Outcome outcome);  // else the error has been replied

  void auth(const Arguments& arguments);
  void client(const Arguments& arguments);
  void command(const Arguments& arguments);
  void config(const Arguments& arguments);
  void dbsize(const Arguments& arguments);
  void echo(const Arguments& arguments);
  void exists(const Arguments& arguments);
  void get(const Arguments& arguments);
  void get_range(const Arguments& arguments);
  void hello(const Arguments& arguments);
  void info(const Arguments& arguments);
  void mget(const Arguments& arguments);
  void ping(const Arguments& arguments);
  void quit(const Arguments& arguments);
  void rdma_hello(const Arguments& arguments);
  void rdma_read(const Arguments& arguments);
  void remove(const Arguments& arguments);
  void reset(const Arguments& arguments);
  void sadd(const Arguments& arguments);
  void scan(const Arguments& arguments);
  void select(const Arguments& arguments);
  void set(const Arguments& arguments);
  void shutdown(const Arguments& arguments);
  void sismember(const Arguments& arguments);
  void smembers(const Arguments& arguments);
  void srem(const Arguments& arguments);
  void strlen(const Arguments& arguments);
  void type(const Arguments& arguments);

  bool check_password(std::string_view user, std::string_view password);
  std::string info_text(std::string_view section) const;

  Shared& shared_;
  const uint64_t id_;
  const std::string address_;
  const Road road_;
  RequestParser parser_;
  ReplyQueue replies_;
  std::string held_input_;        // what came behind the request that filled the replies
  std::shared_ptr<Value> value_;  // that is being received
  uint64_t value_filled_ = 0;
  uint64_t charged_ = 0;     // of the store's limit, for requests and replies
  uint64_t discard_ = 0;     // bytes of a large argument that go nowhere
  std::string large_error_;  // what the request whose large argument was refused is answered
  bool authenticated_;
  bool closing_ = false;
  int protocol_ = 2;
  mutable std::mutex name_mutex_;
  std::string name_;  // Guarded by name_mutex_.
};

}  // namespace rdmaload::server
