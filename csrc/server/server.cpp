#include "server/server.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "core/error.h"
#include "core/thread_name.h"

namespace rdmaload::server {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kReceiveBytes = 64 << 10;   // per loop: requests are short, values bypass it
constexpr uint64_t kBytesPerSend = 1 << 20;  // one system call's worth, about a chunk
constexpr uint64_t kBytesPerTurn = 4 << 20;  // then others get their turn
constexpr int kReceivesPerTurn = 16;
constexpr size_t kVectors = 64;
constexpr int kBacklog = 512;
constexpr int kEvents = 64;
constexpr int kTickMilliseconds = 250;  // how often stalled connections are looked for
constexpr std::chrono::seconds kUnknownClientTime{30};
constexpr size_t kMaxLogLines = 100;
constexpr size_t kMaxListedClients = 1000;

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {
    if (fd < 0)
      throw Error(ErrorCode::kUnavailable, std::string("the server cannot start: ") + std::strerror(errno));
  }
  ~Descriptor() { close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const noexcept { return fd_; }

 private:
  int fd_;
};

std::string address_of(const sockaddr_storage& address) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  if (address.ss_family == AF_INET6) {
    const auto& in6 = reinterpret_cast<const sockaddr_in6&>(address);
    inet_ntop(AF_INET6, &in6.sin6_addr, text.data(), text.size());
    return "[" + std::string(text.data()) + "]:" + std::to_string(ntohs(in6.sin6_port));
  }
  const auto& in4 = reinterpret_cast<const sockaddr_in&>(address);
  inet_ntop(AF_INET, &in4.sin_addr, text.data(), text.size());
  return std::string(text.data()) + ":" + std::to_string(ntohs(in4.sin_port));
}

bool is_loopback(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET6) {
    const auto& in6 = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(&in6) || (IN6_IS_ADDR_V4MAPPED(&in6) && in6.s6_addr[12] == 127);
  }
  return (ntohl(reinterpret_cast<const sockaddr_in&>(address).sin_addr.s_addr) >> 24) == 127;
}

void set_up(int fd, const sockaddr_storage& peer) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
  if (!is_loopback(peer)) return;
  // Pacing (BBR) only costs where there is no network. The system may not offer or allow another: as it is,
  // then.
  for (const char* name : {"cubic", "reno"}) {
    if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, static_cast<socklen_t>(std::strlen(name))) == 0)
      return;
  }
}

int listen_on(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const std::string where = (host.empty() ? "every address" : host) + " port " + std::to_string(port);
  const int failure =
      getaddrinfo(host.empty() ? nullptr : host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (failure != 0) {
    throw Error(ErrorCode::kUnavailable, "cannot listen on " + where + ": " + gai_strerror(failure));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
  int error = EADDRNOTAVAIL;
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    const int fd = socket(at->ai_family, at->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, at->ai_protocol);
    if (fd < 0) {
      error = errno;
      continue;
    }
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(fd, at->ai_addr, at->ai_addrlen) == 0 && listen(fd, kBacklog) == 0) return fd;
    error = errno;
    close(fd);
  }
  throw Error(ErrorCode::kUnavailable, "cannot listen on " + where + ": " + std::strerror(error));
}

int port_of(int fd) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                                             : reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

}  // namespace

// ---- one thread --------------------------------------------------------------------------------

class Server::Loop {
 public:
  Loop(Server& server, bool accepts)
      : server_(server),
        epoll_(epoll_create1(EPOLL_CLOEXEC)),
        wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
        buffer_(kReceiveBytes) {
    watch(wake_.get(), EPOLLIN, EPOLL_CTL_ADD);
    if (accepts) watch(server.listener_, EPOLLIN, EPOLL_CTL_ADD);
  }
  ~Loop() {
    stop();
    join();
    for (const int fd : inbox_) {
      close(fd);
      --server_.counters_.connections_now;
    }
  }

  void start() {
    thread_ = std::thread([this] {
      name_this_thread("rdmaload-serve");
      // sendfile() knows no MSG_NOSIGNAL: a client that is gone must not end the process.
      sigset_t broken_pipe;
      sigemptyset(&broken_pipe);
      sigaddset(&broken_pipe, SIGPIPE);
      pthread_sigmask(SIG_BLOCK, &broken_pipe, nullptr);
      run();
    });
  }
  void join() {
    if (thread_.joinable()) thread_.join();
  }
  // From any thread, as the next two.
  void add(int fd) {
    {
      const std::lock_guard lock(mutex_);
      inbox_.push_back(fd);
    }
    ++load_;
    wake();
  }
  void stop() {
    stop_ = true;
    wake();
  }
  int load() const { return load_; }

 private:
  struct Connection {
    Connection(int fd, Shared& shared, uint64_t id, std::string address, Clock::time_point now)
        : fd(fd), session(shared, id, std::move(address)), since(now), moved(now) {}
    const int fd;
    Session session;
    uint32_t events = EPOLLIN;
    bool input_ended = false;
    const Clock::time_point since;
    Clock::time_point moved;  // when a byte last went either way
  };
  using Connections = std::unordered_map<int, std::unique_ptr<Connection>>;

  void wake() {
    const uint64_t one = 1;
    // It can only fail when the counter is full, and then the loop wakes anyway.
    [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
  }

  void watch(int fd, uint32_t events, int operation) {
    epoll_event event{};
    event.events = events;
    event.data.fd = fd;
    epoll_ctl(epoll_.get(), operation, fd, &event);
  }

  void run() {
    std::array<epoll_event, kEvents> events;
    auto next_tick = Clock::now();
    while (!stop_) {
      const int count = epoll_wait(epoll_.get(), events.data(), kEvents, kTickMilliseconds);
      now_ = Clock::now();
      for (int i = 0; i < count && !stop_; ++i) {
        const epoll_event& event = events[static_cast<size_t>(i)];
        if (event.data.fd == wake_.get()) {
          take_inbox();
        } else if (event.data.fd == server_.listener_) {
          accept_some();
        } else if (const auto at = connections_.find(event.data.fd); at != connections_.end()) {
          handle(*at->second, event.events);
        }
      }
      if (now_ >= next_tick) {
        tick();
        next_tick = now_ + std::chrono::milliseconds(kTickMilliseconds);
      }
    }
    while (!connections_.empty()) drop(*connections_.begin()->second);
  }

  void take_inbox() {
    uint64_t ignored = 0;
    [[maybe_unused]] const ssize_t taken = read(wake_.get(), &ignored, sizeof(ignored));
    std::vector<int> fresh;
    {
      const std::lock_guard lock(mutex_);
      fresh.swap(inbox_);
    }
    for (const int fd : fresh) begin(fd);
  }

  void begin(int fd) {
    sockaddr_storage peer{};
    socklen_t size = sizeof(peer);
    getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size);
    set_up(fd, peer);
    auto connection = std::make_unique<Connection>(fd, server_.shared_, next_id(), address_of(peer), now_);
    {
      const std::lock_guard lock(server_.mutex_);
      server_.sessions_.emplace(connection->session.id(), &connection->session);
    }
    watch(fd, connection->events, EPOLL_CTL_ADD);
    connections_.emplace(fd, std::move(connection));
  }

  static uint64_t next_id() {
    static std::atomic<uint64_t> last = 0;
    return ++last;
  }

  void accept_some() {
    for (int i = 0; i < kEvents; ++i) {
      const int fd = accept4(server_.listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
          // The listener would stay readable: look again at the next tick, when some may have left.
          server_.log(std::string("no more connections can be accepted: ") + std::strerror(errno));
          watch(server_.listener_, 0, EPOLL_CTL_MOD);
          listener_paused_ = true;
        }
        if (errno == ECONNABORTED || errno == EINTR) continue;
        return;
      }
      if (server_.counters_.connections_now >= static_cast<uint64_t>(server_.options_.max_connections)) {
        ++server_.counters_.connections_refused;
        static constexpr std::string_view kFull = "-ERR max number of clients reached\r\n";
        [[maybe_unused]] const ssize_t sent =
            send(fd, kFull.data(), kFull.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        close(fd);
        continue;
      }
      ++server_.counters_.connections_now;
      ++server_.counters_.connections_accepted;
      server_.least_busy().add(fd);
    }
  }

  void tick() {
    if (listener_paused_) {
      listener_paused_ = false;
      watch(server_.listener_, EPOLLIN, EPOLL_CTL_MOD);
    }
    std::vector<Connection*> doomed;
    for (const auto& [fd, connection] : connections_) {
      const bool stalled =
          connection->session.busy() && now_ - connection->moved > server_.options_.stall_timeout;
      const auto patience =
          std::min<std::chrono::duration<double>>(server_.options_.stall_timeout, kUnknownClientTime);
      const bool unknown = !connection->session.authenticated() && now_ - connection->since > patience;
      if (stalled || unknown) doomed.push_back(connection.get());
    }
    for (Connection* connection : doomed) {
      ++server_.counters_.connections_stalled;
      drop(*connection);
    }
  }

  void handle(Connection& connection, uint32_t events) {
    if ((events & EPOLLERR) != 0 || !((events & EPOLLIN) == 0 || receive(connection)))
      return drop(connection);
    if ((events & EPOLLHUP) != 0 && (events & EPOLLIN) == 0) return drop(connection);
    if (!send_some(connection)) return drop(connection);
    Session& session = connection.session;
    if (session.replies().empty() && (session.closing() || connection.input_ended)) return drop(connection);
    uint32_t wanted = 0;
    if (session.wants_input() && !connection.input_ended) wanted |= EPOLLIN;
    if (!session.replies().empty()) wanted |= EPOLLOUT;
    if (wanted == connection.events) return;
    connection.events = wanted;
    watch(connection.fd, wanted, EPOLL_CTL_MOD);
  }

  // False: the connection is lost.
  bool receive(Connection& connection) {
    Session& session = connection.session;
    for (int i = 0; i < kReceivesPerTurn && session.wants_input() && !connection.input_ended; ++i) {
      const std::span<std::byte> space = session.value_space();
      const std::span<std::byte> into = space.empty() ? std::span<std::byte>(buffer_) : space;
      const ssize_t got = recv(connection.fd, into.data(), into.size(), 0);
      if (got < 0) return errno == EAGAIN || errno == EINTR;
      if (got == 0) {
        connection.input_ended = true;  // what it has asked for is still answered
        return true;
      }
      connection.moved = now_;
      const auto bytes = static_cast<size_t>(got);
      server_.counters_.bytes_received += bytes;
      if (space.empty()) {
        session.consume({reinterpret_cast<const char*>(buffer_.data()), bytes});
      } else {
        session.value_received(bytes);
      }
      if (bytes < into.size()) break;  // there is no more now
    }
    return true;
  }

  bool send_some(Connection& connection) {
    Session& session = connection.session;
    ReplyQueue& replies = session.replies();
    uint64_t turn = 0;
    std::array<iovec, kVectors> vectors;
    while (!replies.empty() && turn < kBytesPerTurn) {
      ssize_t sent = 0;
      const size_t count = replies.gather(vectors, kBytesPerSend);
      if (count > 0) {
        msghdr message{};
        message.msg_iov = vectors.data();
        message.msg_iovlen = count;
        const bool more = count < replies.pieces();  // a file's bytes follow, or the rest
        sent = sendmsg(connection.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT | (more ? MSG_MORE : 0));
      } else {
        const ReplyQueue::FileSlice slice = replies.front_file();
        auto offset = static_cast<off_t>(slice.offset);
        const auto length = static_cast<size_t>(std::min(slice.length, kBytesPerSend));
        sent = sendfile(connection.fd, slice.descriptor, &offset, length);
        if (sent == 0 || (sent < 0 && (errno == EIO || errno == EINVAL))) {
          ++server_.counters_.files_failed;
          server_.log((slice.exported == nullptr ? "a stored value" : slice.exported->path()) +
                      (sent == 0 ? ": ends before byte " : ": cannot be read at byte ") +
                      std::to_string(slice.offset) + ": it changed while it was served; the connection of " +
                      session.address() + " was closed");
          return false;
        }
      }
      if (sent < 0) {
        if (errno == EINTR) continue;
        return errno == EAGAIN;
      }
      connection.moved = now_;
      turn += static_cast<uint64_t>(sent);
      server_.counters_.bytes_sent += static_cast<uint64_t>(sent);
      replies.sent(static_cast<uint64_t>(sent));
      session.resume();
    }
    return true;
  }

  void drop(Connection& connection) {
    {
      const std::lock_guard lock(server_.mutex_);
      server_.sessions_.erase(connection.session.id());
    }
    const int fd = connection.fd;
    connections_.erase(fd);  // what it still held of the store is given back before it counts as gone
    close(fd);
    --load_;
    --server_.counters_.connections_now;
  }

  Server& server_;
  const Descriptor epoll_;
  const Descriptor wake_;
  std::vector<std::byte> buffer_;
  Connections connections_;  // by descriptor; only the loop's thread
  bool listener_paused_ = false;
  Clock::time_point now_ = Clock::now();
  std::atomic<bool> stop_ = false;
  std::atomic<int> load_ = 0;
  std::mutex mutex_;
  std::vector<int> inbox_;  // Guarded by mutex_.
  std::thread thread_;
};

// ---- the whole ---------------------------------------------------------------------------------

Server::Server(std::shared_ptr<Store> store, ServerOptions options)
    : store_(std::move(store)),
      options_(std::move(options)),
      shared_{*store_,
              counters_,
              options_.password,
              options_.version,
              options_.port,
              options_.threads,
              options_.max_connections,
              Clock::now(),
              [this] { ask_to_stop(); },
              [this] { return client_lines(); }} {
  if (options_.threads < 1 || options_.max_connections < 1 || options_.port < 0 || options_.port > 65535) {
    throw Error(ErrorCode::kInvalid,
                "a server needs at least one thread and one connection, and a port of 0 to 65535");
  }
  listener_ = listen_on(options_.host, options_.port);
  shared_.port = port_of(listener_);
  try {
    for (int i = 0; i < options_.threads; ++i) loops_.push_back(std::make_unique<Loop>(*this, i == 0));
    // When all are there to be handed connections.
    for (const auto& loop : loops_) loop->start();
  } catch (...) {
    stop();
    throw;
  }
}

Server::~Server() { stop(); }

void Server::stop() {
  ask_to_stop();
  const std::lock_guard joining(join_mutex_);
  if (listener_ < 0) return;
  for (const auto& loop : loops_) loop->stop();
  // All have ended before the first is destroyed: one of them hands connections to the others.
  for (const auto& loop : loops_) loop->join();
  loops_.clear();
  close(listener_);
  listener_ = -1;
}

void Server::ask_to_stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stopped_.notify_all();
}

bool Server::wait(std::chrono::duration<double> seconds) {
  std::unique_lock lock(mutex_);
  return stopped_.wait_for(lock, seconds, [this] { return stopping_; });
}

std::vector<std::string> Server::take_log() {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> lines(log_.begin(), log_.end());
  log_.clear();
  return lines;
}

void Server::log(std::string line) {
  const std::lock_guard lock(mutex_);
  if (log_.size() == kMaxLogLines) log_.pop_front();
  log_.push_back(std::move(line));
}

std::string Server::client_lines() {
  const std::lock_guard lock(mutex_);
  std::string lines;
  size_t count = 0;
  for (const auto& [id, session] : sessions_) {
    if (++count > kMaxListedClients) break;
    lines += session->list_line();
  }
  return lines;
}

Server::Loop& Server::least_busy() {
  return **std::min_element(loops_.begin(), loops_.end(),
                            [](const auto& a, const auto& b) { return a->load() < b->load(); });
}

}  // namespace rdmaload::server
