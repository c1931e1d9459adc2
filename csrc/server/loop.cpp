#include "server/loop.h"

#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <new>

#include "core/error.h"
#include "core/thread_name.h"
#include "server/listener.h"

namespace rdmaload::server {
namespace {

constexpr size_t kReceiveBytes = 64 << 10;   // per loop: requests are short, values bypass it
constexpr uint64_t kBytesPerTurn = 4 << 20;  // then others get their turn
constexpr int kReceivesPerTurn = 16;
constexpr int kEvents = 64;
constexpr int kTickMilliseconds = 250;  // how often stalled connections are looked for
constexpr std::chrono::seconds kUnknownClientTime{30};

}  // namespace

Server::Loop::Descriptor::Descriptor(int fd) : fd_(fd) {
  if (fd < 0)
    throw Error(ErrorCode::kUnavailable, std::string("the server cannot start: ") + std::strerror(errno));
}
Server::Loop::Descriptor::~Descriptor() { close(fd_); }

Server::Loop::Loop(Server& server, bool accepts)
    : server_(server),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      buffer_(kReceiveBytes) {
  watch(wake_.get(), EPOLLIN, EPOLL_CTL_ADD);
  if (accepts) watch(server.listener_, EPOLLIN, EPOLL_CTL_ADD);
  if (accepts && !pipe_.refusal().empty()) {  // once for all threads
    server_.log({"values are copied to be sent, which costs twice the CPU time or more: ", pipe_.refusal()});
  }
}

Server::Loop::~Loop() {
  stop();
  join();
  for (const int fd : inbox_) {
    close(fd);
    --server_.counters_.connections_now;
  }
}

void Server::Loop::start() {
  thread_ = std::thread([this] {
    name_this_thread("rdmaload-serve");
    // sendfile() and splice() know no MSG_NOSIGNAL: a client that is gone must not end the process.
    sigset_t broken_pipe;
    sigemptyset(&broken_pipe);
    sigaddset(&broken_pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &broken_pipe, nullptr);
    run();
  });
}

void Server::Loop::join() {
  if (thread_.joinable()) thread_.join();
}

void Server::Loop::add(int fd) {
  {
    const std::lock_guard lock(mutex_);
    inbox_.push_back(fd);
  }
  ++load_;
  wake();
}

void Server::Loop::stop() {
  stop_ = true;
  wake();
}

void Server::Loop::wake() {
  const uint64_t one = 1;
  // It can only fail when the counter is full, and then the loop wakes anyway.
  [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
}

void Server::Loop::watch(int fd, uint32_t events, int operation) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  epoll_ctl(epoll_.get(), operation, fd, &event);
}

void Server::Loop::run() {
  std::array<epoll_event, kEvents> events;
  auto next_tick = Clock::now();
  std::vector<int> again;
  while (!stop_) {
    const int count =
        epoll_wait(epoll_.get(), events.data(), kEvents, again_.empty() ? kTickMilliseconds : 0);
    now_ = Clock::now();
    for (int i = 0; i < count && !stop_; ++i) {
      const epoll_event& event = events[static_cast<size_t>(i)];
      if (event.data.fd == wake_.get()) {
        take_inbox();
      } else if (event.data.fd == server_.listener_) {
        accept_some();
      } else {
        attend(event.data.fd, event.events);
      }
    }
    again.swap(again_);
    for (const int fd : again) attend(fd, 0);
    again.clear();
    if (now_ >= next_tick) {
      tick();
      next_tick = now_ + std::chrono::milliseconds(kTickMilliseconds);
    }
  }
  while (!connections_.empty()) drop(*connections_.begin()->second);
}

void Server::Loop::take_inbox() {
  uint64_t ignored = 0;
  [[maybe_unused]] const ssize_t taken = read(wake_.get(), &ignored, sizeof(ignored));
  std::vector<int> fresh;
  {
    const std::lock_guard lock(mutex_);
    fresh.swap(inbox_);
  }
  for (const int fd : fresh) begin(fd);
}

void Server::Loop::begin(int fd) {
  sockaddr_storage peer{};
  socklen_t size = sizeof(peer);
  getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size);
  set_up(fd, peer);
  bool owned = false;  // by the connection, which closes it
  try {
    auto connection = std::make_unique<Connection>(fd, server_.tls_.get(), pipe_, server_.shared_, next_id(),
                                                   address_of(peer), now_);
    owned = true;
    const auto at = connections_.emplace(fd, std::move(connection)).first;
    server_.joined(at->second->session);
    watch(fd, at->second->events, EPOLL_CTL_ADD);
  } catch (const std::exception& error) {  // the system or OpenSSL has no memory for it
    connections_.erase(fd);
    if (!owned) close(fd);
    --load_;
    --server_.counters_.connections_now;
    server_.log({"a connection failed: ", error.what()});
  }
}

void Server::Loop::accept_some() {
  for (int i = 0; i < kEvents; ++i) {
    const int fd = accept4(server_.listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        // The listener would stay readable: look again at the next tick, when some may have left.
        server_.log({"no more connections can be accepted: ", std::strerror(errno)});
        watch(server_.listener_, 0, EPOLL_CTL_MOD);
        listener_paused_ = true;
      }
      if (errno == ECONNABORTED || errno == EINTR) continue;
      return;
    }
    if (server_.counters_.connections_now >= static_cast<uint64_t>(server_.options_.max_connections)) {
      ++server_.counters_.connections_refused;
      static constexpr std::string_view kFull = "-ERR max number of clients reached\r\n";
      // Under TLS it would be noise: closed without a word.
      if (server_.tls_ == nullptr) {
        [[maybe_unused]] const ssize_t sent =
            send(fd, kFull.data(), kFull.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      }
      close(fd);
      continue;
    }
    ++server_.counters_.connections_now;
    ++server_.counters_.connections_accepted;
    try {
      server_.least_busy().add(fd);
    } catch (const std::bad_alloc&) {
      close(fd);
      --server_.counters_.connections_now;
      ++server_.counters_.connections_refused;
    }
  }
}

void Server::Loop::tick() {
  if (listener_paused_) {
    listener_paused_ = false;
    watch(server_.listener_, EPOLLIN, EPOLL_CTL_MOD);
  }
  for (auto at = connections_.begin(); at != connections_.end();) {
    Connection& connection = *at->second;
    ++at;  // before it may be dropped
    const Session& session = connection.session;
    const bool busy = session.busy() || connection.channel.holds_output();
    const bool stalled = busy && now_ - connection.moved > server_.options_.stall_timeout;
    const auto patience =
        std::min<std::chrono::duration<double>>(server_.options_.stall_timeout, kUnknownClientTime);
    const bool known = session.authenticated() && connection.channel.established();
    if (!stalled && (known || now_ - connection.since <= patience)) continue;
    ++server_.counters_.connections_stalled;
    drop(connection);
  }
}

// What a client asks for may be more than the system has: it loses its connection, the others nothing.
void Server::Loop::attend(int fd, uint32_t events) {
  const auto at = connections_.find(fd);
  if (at == connections_.end()) return;
  try {
    handle(*at->second, events);
  } catch (const std::bad_alloc&) {
    ++server_.counters_.refused_for_memory;
    drop(*at->second);
  }
}

void Server::Loop::handle(Connection& connection, uint32_t events) {
  Channel& channel = connection.channel;
  const bool readable = (events & EPOLLIN) != 0 || channel.holds_input();
  if ((events & EPOLLERR) != 0 || (readable && !receive(connection))) return drop(connection);
  if ((events & EPOLLHUP) != 0 && !readable) return drop(connection);
  if (!send_some(connection) || !channel.flush()) return drop(connection);
  Session& session = connection.session;
  const bool sends = !session.replies().empty() || channel.holds_output();
  if (!sends && (session.closing() || connection.input_ended)) return drop(connection);
  const bool receives = session.wants_input() && !connection.input_ended;
  if (receives && channel.holds_input()) again_.push_back(channel.descriptor());
  const uint32_t wanted = (receives ? uint32_t{EPOLLIN} : 0) | (sends ? uint32_t{EPOLLOUT} : 0);
  if (wanted == connection.events) return;
  connection.events = wanted;
  watch(channel.descriptor(), wanted, EPOLL_CTL_MOD);
}

bool Server::Loop::receive(Connection& connection) {
  Session& session = connection.session;
  for (int i = 0; i < kReceivesPerTurn && session.wants_input() && !connection.input_ended; ++i) {
    const std::span<std::byte> space = session.value_space();
    const std::span<std::byte> into = space.empty() ? std::span<std::byte>(buffer_) : space;
    const ssize_t got = connection.channel.receive(into);
    if (got < 0) {
      if (errno == EAGAIN || errno == EINTR) return true;
      if (!connection.channel.established()) ++server_.counters_.tls_failures;
      return false;
    }
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

bool Server::Loop::send_some(Connection& connection) {
  Session& session = connection.session;
  ReplyQueue& replies = session.replies();
  uint64_t turn = 0;
  while (!replies.empty() && turn < kBytesPerTurn) {
    const uint64_t referred = connection.channel.bytes_by_reference();
    const ssize_t sent = connection.channel.send(replies);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno != ENODATA && errno != EIO) return errno == EAGAIN;
      const bool ended = errno == ENODATA;
      const ReplyQueue::Front front = replies.front();
      ++server_.counters_.files_failed;
      server_.log({front.file == nullptr ? "a stored value" : front.file->path(),
                   ended ? ": ends before byte " : ": cannot be read at byte ", std::to_string(front.offset),
                   ": it changed while it was served; the connection of ", session.address(), " was closed"});
      return false;
    }
    connection.moved = now_;
    turn += static_cast<uint64_t>(sent);
    server_.counters_.bytes_sent += static_cast<uint64_t>(sent);
    server_.counters_.bytes_by_reference += connection.channel.bytes_by_reference() - referred;
    replies.sent(static_cast<uint64_t>(sent));
    session.resume();
  }
  return true;
}

void Server::Loop::drop(Connection& connection) {
  server_.left(connection.session);
  // What it still held of the store is given back before it counts as gone.
  watch(connection.channel.descriptor(), 0, EPOLL_CTL_DEL);  // a forked child may hold the socket open
  connections_.erase(connection.channel.descriptor());
  --load_;
  --server_.counters_.connections_now;
}

}  // namespace rdmaload::server
