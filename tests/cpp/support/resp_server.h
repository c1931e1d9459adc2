// A RESP server for one test: a script decides, connection by connection, what is answered, byte by byte.
//
// Listens on a loopback port that the system chose, or on a unix socket. Every connection has a thread of its
// own that runs the script; when the script returns, the connection is closed in order. Destroying the server
// ends all connections. Scripts must not assert (they run on other threads): they count, and the test looks
// at the counts.
#pragma once

#include <arpa/inet.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "support/reads.h"

namespace rdmaload::testing {

using Command = std::vector<std::string>;

// What the bytes of a session go through instead of its socket; belongs to the session's thread.
class Wire {
 public:
  virtual ~Wire() = default;
  // As send(2) and recv(2) on a blocking socket.
  virtual ssize_t send(const char* from, size_t size) = 0;
  virtual ssize_t receive(char* to, size_t size) = 0;
  virtual void end() = 0;  // tells the client that nothing more comes
};

class RespSession {
 public:
  explicit RespSession(int fd, std::unique_ptr<Wire> wire = nullptr) : fd_(fd), wire_(std::move(wire)) {
    const int on = 1;
    setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  }
  ~RespSession() {
    if (fd_ >= 0) ::close(fd_);
  }
  RespSession(const RespSession&) = delete;
  RespSession& operator=(const RespSession&) = delete;

  // The client's next command; nullopt once it closed the connection or the server is stopped.
  std::optional<Command> next_command() {
    const auto arguments = number_line('*');
    if (!arguments) return std::nullopt;
    Command command;
    for (size_t i = 0; i < *arguments; ++i) {
      const auto size = number_line('$');
      if (!size || !fill(*size + 2)) return std::nullopt;
      command.push_back(buffer_.substr(0, *size));
      buffer_.erase(0, *size + 2);
    }
    return command;
  }

  // What the client sends up to and with `end` (the empty line after a request's head, say); nullopt once it
  // closed the connection or the server is stopped.
  std::optional<std::string> receive_until(std::string_view end) {
    size_t at;
    while ((at = buffer_.find(end)) == std::string::npos) {
      if (!fill(buffer_.size() + 1)) return std::nullopt;
    }
    std::string text = buffer_.substr(0, at + end.size());
    buffer_.erase(0, text.size());
    return text;
  }

  // Whether a command (or the end of the connection) comes within this time.
  bool readable_within(int milliseconds) {
    if (!buffer_.empty()) return true;
    pollfd entry{fd_, POLLIN, 0};
    return ::poll(&entry, 1, milliseconds) > 0;
  }

  // False when the client is gone.
  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = wire_ ? wire_->send(bytes.data(), bytes.size())
                                 : ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
    return true;
  }

  // Waits until the client, which is in this process, has taken every byte sent so far from its socket, so
  // that what is sent next arrives separately.
  void wait_until_taken() {
    const int client = client_descriptor();
    const auto give_up = Clock::now() + kSoon;
    for (int waiting = 1; client >= 0 && waiting > 0 && Clock::now() < give_up;) {
      if (unsent() == 0 && ioctl(client, FIONREAD, &waiting) != 0) return;
      std::this_thread::yield();
    }
  }

  // Until the client closed the connection or the server is stopped: how a script stalls.
  void wait_for_close() {
    char byte;
    while (receive(&byte, 1) > 0) {
    }
  }

  // Bytes as they come; 0 or less at the end.
  ssize_t receive(char* to, size_t size) {
    return wire_ ? wire_->receive(to, size) : ::recv(fd_, to, size, 0);
  }

  // Ends the connection as the wire does, then the socket.
  void end() {
    if (wire_) wire_->end();
    shut_down();
  }

  Wire* wire() { return wire_.get(); }

  // Ends the connection with a reset instead of an orderly close.
  void reset() {
    std::lock_guard lock(mutex_);
    const linger now{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    ::close(fd_);
    fd_ = -1;
  }

  // Any thread: wakes whatever waits on this connection and ends it.
  void shut_down() {
    std::lock_guard lock(mutex_);
    if (fd_ >= 0) ::shutdown(fd_, SHUT_RDWR);
  }

 private:
  bool fill(size_t bytes) {
    while (buffer_.size() < bytes) {
      char piece[4096];
      const ssize_t got = receive(piece, sizeof(piece));
      if (got <= 0) return false;
      buffer_.append(piece, static_cast<size_t>(got));
    }
    return true;
  }
  std::optional<size_t> number_line(char type) {
    size_t end;
    while ((end = buffer_.find("\r\n")) == std::string::npos) {
      if (!fill(buffer_.size() + 1)) return std::nullopt;
    }
    if (buffer_[0] != type) return std::nullopt;
    const size_t number = std::stoul(buffer_.substr(1, end - 1));
    buffer_.erase(0, end + 2);
    return number;
  }
  int unsent() const {
    int bytes = 0;
    return ioctl(fd_, SIOCOUTQNSD, &bytes) == 0 ? bytes : 0;  // not TIOCOUTQ: acknowledgements may be delayed
  }
  int client_descriptor() const {
    sockaddr_storage peer{};
    socklen_t peer_bytes = sizeof(peer);
    if (getpeername(fd_, reinterpret_cast<sockaddr*>(&peer), &peer_bytes) != 0) return -1;
    for (int fd = 3; fd < 256; ++fd) {
      sockaddr_storage own{};
      socklen_t own_bytes = sizeof(own);
      if (getsockname(fd, reinterpret_cast<sockaddr*>(&own), &own_bytes) == 0 && own_bytes == peer_bytes &&
          std::memcmp(&own, &peer, peer_bytes) == 0) {
        return fd;
      }
    }
    return -1;
  }

  std::mutex mutex_;  // shut_down() against reset()
  int fd_;
  std::unique_ptr<Wire> wire_;
  std::string buffer_;
};

class RespServer {
 public:
  using Script = std::function<void(RespSession& session, int connection)>;  // connections count from 0

  using Wrap = std::function<std::unique_ptr<Wire>(int fd)>;

  // An address with a slash is the path of a unix socket.
  explicit RespServer(Script script, const std::string& address = "127.0.0.1", Wrap wrap = nullptr)
      : script_(std::move(script)), wrap_(std::move(wrap)), address_(address) {
    if (address.find('/') != std::string::npos) {
      listener_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
      sockaddr_un name{};
      name.sun_family = AF_UNIX;
      address.copy(name.sun_path, sizeof(name.sun_path) - 1);
      if (listener_ < 0 || ::bind(listener_, reinterpret_cast<sockaddr*>(&name), sizeof(name)) != 0 ||
          ::listen(listener_, 64) != 0) {
        if (listener_ >= 0) ::close(listener_);
        throw std::runtime_error("cannot listen on " + address);
      }
      acceptor_ = std::thread([this] { accept_all(); });
      return;
    }
    const bool six = address.find(':') != std::string::npos;
    listener_ = ::socket(six ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in v4{};
    v4.sin_family = AF_INET;
    sockaddr_in6 v6{};
    v6.sin6_family = AF_INET6;
    inet_pton(six ? AF_INET6 : AF_INET, address.c_str(),
              six ? static_cast<void*>(&v6.sin6_addr) : static_cast<void*>(&v4.sin_addr));
    auto* own = six ? reinterpret_cast<sockaddr*>(&v6) : reinterpret_cast<sockaddr*>(&v4);
    socklen_t size = six ? sizeof(v6) : sizeof(v4);
    if (listener_ < 0 || ::bind(listener_, own, size) != 0 || ::listen(listener_, 64) != 0 ||
        getsockname(listener_, own, &size) != 0) {
      if (listener_ >= 0) ::close(listener_);
      throw std::runtime_error("cannot listen on " + address);
    }
    port_ = ntohs(six ? v6.sin6_port : v4.sin_port);
    acceptor_ = std::thread([this] { accept_all(); });
  }
  ~RespServer() {
    stopping_ = true;
    ::shutdown(listener_, SHUT_RDWR);
    acceptor_.join();
    for (auto& session : sessions_) session->shut_down();
    for (auto& thread : threads_) thread.join();
    ::close(listener_);
  }
  RespServer(const RespServer&) = delete;
  RespServer& operator=(const RespServer&) = delete;

  const std::string& address() const { return address_; }
  int port() const { return port_; }
  int connections() const { return accepted_; }

 private:
  void accept_all() {
    while (!stopping_) {
      const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) continue;
      auto& session = *sessions_.emplace_back(std::make_unique<RespSession>(fd, wrap_ ? wrap_(fd) : nullptr));
      threads_.emplace_back([this, &session, number = accepted_++] {
        script_(session, number);
        session.end();
      });
    }
  }

  const Script script_;
  const Wrap wrap_;
  const std::string address_;
  int listener_;
  int port_ = 0;
  std::atomic<bool> stopping_{false};
  std::atomic<int> accepted_{0};
  // Of the acceptor until it has been joined.
  std::vector<std::unique_ptr<RespSession>> sessions_;
  std::vector<std::thread> threads_;
  std::thread acceptor_;
};

inline std::string bulk(std::string_view value) {
  return "$" + std::to_string(value.size()) + "\r\n" + std::string(value) + "\r\n";
}

// What an honest store answers.
class RespStore {
 public:
  void put(const std::string& key, std::string value) {
    std::lock_guard lock(mutex_);
    values_[key] = std::move(value);
  }
  std::string answer(const Command& command, bool resp3 = false) const {
    if (command[0] == "HELLO") return "%2\r\n+server\r\n+redis\r\n+proto\r\n:3\r\n";
    if (command[0] == "AUTH" || command[0] == "SELECT") return "+OK\r\n";
    if (command[0] != "GET" && command[0] != "GETRANGE") return "-ERR unknown command\r\n";
    std::lock_guard lock(mutex_);
    const auto found = values_.find(command[1]);
    if (command[0] == "GET") {
      if (found == values_.end()) return resp3 ? "_\r\n" : "$-1\r\n";
      return bulk(found->second);
    }
    if (found == values_.end()) return bulk("");
    const size_t first = std::stoul(command[2]), last = std::stoul(command[3]);
    if (first >= found->second.size()) return bulk("");
    return bulk(std::string_view(found->second).substr(first, last - first + 1));
  }
  // A script that serves until the client leaves.
  void serve(RespSession& session) const {
    bool resp3 = false;
    while (const auto command = session.next_command()) {
      resp3 = resp3 || (*command)[0] == "HELLO";
      if (!session.send(answer(*command, resp3))) return;
    }
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, std::string> values_;  // Guarded by mutex_.
};

}  // namespace rdmaload::testing
