// A key-value server at the other end of a fake network (or a real one), as ours or as a Valkey speaks over
// RDMA.
//
// One thread serves all connections. It takes its time nowhere, and posts everything that it can at once:
// what a card does with it, and when, is the network's part (fake_queue_pair.h).
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "support/bytes.h"
#include "support/fake_queue_pair.h"
#include "support/resp_server.h"
#include "transport/rdma/channel.h"

namespace rdmaload::rdma::testing {

using rdmaload::testing::Command;

class RdmaServer {
 public:
  struct Options {
    bool ours = true;                 // else it knows nothing of RDMALOAD.*
    uint32_t window_bytes = 1 << 14;  // for commands
    size_t max_segments = 4;
    std::string password;  // asked for by AUTH or HELLO when not empty
    bool wrong_echo = false;
  };
  // Answers a command in place of the server: the reply's bytes, or "" to be silent for ever. nullopt: as
  // usual. Called on the server's thread.
  using Hook = std::function<std::optional<std::string>(const Command&)>;

  RdmaServer(Fabric& fabric, Options options, const std::string& address = "fake")
      : options_(std::move(options)), listener_(fabric.listen(address, 0, false)) {
    thread_ = std::jthread([this](const std::stop_token& stop) { serve(stop); });
  }
  ~RdmaServer() { stop(); }
  int port() const { return listener_->port(); }
  void put(const std::string& object, const std::vector<std::byte>& bytes) {
    const std::lock_guard lock(mutex_);
    objects_[object] = std::make_shared<std::vector<std::byte>>(bytes);
  }
  void hook(Hook hook) {
    const std::lock_guard lock(mutex_);
    hook_ = std::move(hook);
  }
  std::vector<Command> commands() const {
    const std::lock_guard lock(mutex_);
    return commands_;
  }
  size_t count(const std::string& name) const {
    const std::lock_guard lock(mutex_);
    size_t found = 0;
    for (const Command& command : commands_) found += command[0] == name ? 1 : 0;
    return found;
  }
  int connections() const { return connections_; }
  void stop() {
    thread_ = {};
    listener_.reset();
  }

 private:
  struct Connection {
    std::vector<std::byte> window;
    std::unique_ptr<MemoryRegion> region;
    std::unique_ptr<Channel> channel;
    uint64_t taken = 0;
    std::string in, out;
    std::deque<std::shared_ptr<std::vector<std::byte>>> held;  // objects that were written from
    std::map<const void*, std::unique_ptr<MemoryRegion>> sources;
    bool silent = false;
    ~Connection() {
      if (channel) channel->close();
    }
  };

  void serve(const std::stop_token& stop) {
    std::vector<std::unique_ptr<Connection>> connections;
    while (!stop.stop_requested()) {
      while (auto queue_pair = listener_->accept()) {
        try {
          connections.push_back(welcome(std::move(queue_pair)));
          ++connections_;
        } catch (const Error&) {
          continue;  // the client has given up already
        }
      }
      std::erase_if(connections, [this](const auto& connection) {
        try {
          turn(*connection);
          return false;
        } catch (const Error&) {
          return true;
        }
      });
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }

  std::unique_ptr<Connection> welcome(std::unique_ptr<QueuePair> queue_pair) const {
    auto connection = std::make_unique<Connection>();
    connection->window.resize(options_.window_bytes);
    connection->region = queue_pair->domain()->register_memory(connection->window, Access::kRemoteWrite);
    ChannelOptions channel_options;
    channel_options.side = Side::kServer;
    connection->channel = std::make_unique<Channel>(std::move(queue_pair), channel_options);
    connection->channel->start(*connection->region, 0, options_.window_bytes);
    return connection;
  }

  void turn(Connection& connection) {
    Channel& channel = *connection.channel;
    channel.turn(std::chrono::milliseconds(0));
    connection.in.append(reinterpret_cast<const char*>(connection.window.data()) + connection.taken,
                         channel.received() - connection.taken);
    connection.taken = channel.received();
    if (channel.window_full()) {
      connection.taken = 0;
      channel.announce(*connection.region, 0, options_.window_bytes);
    }
    while (!connection.silent) {
      // As in Valkey, a command waits until the reply before it is on its way.
      flush(connection);
      if (!connection.out.empty()) return;
      const auto command = next_command(connection.in);
      if (!command) return;
      answer(connection, *command);
    }
  }

  static void flush(Connection& connection) {
    while (!connection.out.empty()) {
      const size_t sent = connection.channel->try_send(std::as_bytes(std::span(connection.out)));
      if (sent == 0) return;
      connection.out.erase(0, sent);
    }
  }

  static std::optional<Command> next_command(std::string& in) {
    size_t at = 0;
    const auto number = [&](char type) -> std::optional<size_t> {
      const size_t end = in.find("\r\n", at);
      if (end == std::string::npos) return std::nullopt;
      if (in[at] != type) throw Error(ErrorCode::kFormat, "no command");
      const size_t value = std::stoul(in.substr(at + 1, end - at - 1));
      at = end + 2;
      return value;
    };
    const auto count = number('*');
    if (!count) return std::nullopt;
    Command command;
    for (size_t i = 0; i < *count; ++i) {
      const auto size = number('$');
      if (!size || in.size() < at + *size + 2) return std::nullopt;
      command.push_back(in.substr(at, *size));
      at += *size + 2;
    }
    in.erase(0, at);
    return command;
  }

  void answer(Connection& connection, const Command& command) {
    Hook hook;
    {
      const std::lock_guard lock(mutex_);
      commands_.push_back(command);
      hook = hook_;
    }
    if (hook) {
      if (const auto reply = hook(command)) {
        connection.silent = reply->empty();
        connection.out += *reply;
        return;
      }
    }
    connection.out += reply_to(connection, command);
  }

  std::shared_ptr<std::vector<std::byte>> find(const std::string& object) const {
    const std::lock_guard lock(mutex_);
    const auto found = objects_.find(object);
    return found == objects_.end() ? nullptr : found->second;
  }

  static std::string bulk(std::string_view text) {
    return "$" + std::to_string(text.size()) + "\r\n" + std::string(text) + "\r\n";
  }

  std::string reply_to(Connection& connection, const Command& command) {
    const std::string& name = command[0];
    if (name == "AUTH" || name == "HELLO") {
      if (!options_.password.empty() && command.back() != options_.password) {
        return "-WRONGPASS invalid username-password pair or user is disabled.\r\n";
      }
      return name == "AUTH" ? "+OK\r\n" : "%1\r\n$6\r\nserver\r\n$4\r\nfake\r\n";
    }
    if (name == "SELECT") return "+OK\r\n";
    if (name == "ECHO") return bulk(options_.wrong_echo ? std::string(command[1].size(), 'x') : command[1]);
    if (name == "RDMALOAD.HELLO" && options_.ours) {
      return "*4\r\n$7\r\nversion\r\n:1\r\n$12\r\nmax_segments\r\n:" + std::to_string(options_.max_segments) +
             "\r\n";
    }
    if (name == "GET" || name == "GETRANGE") {
      const auto object = find(command[1]);
      if (name == "GET" && object == nullptr) return "$-1\r\n";
      const std::string text = object == nullptr ? "" : rdmaload::testing::text_of(*object);
      if (name == "GET") return bulk(text);
      const size_t begin = std::stoul(command[2]), end = std::stoul(command[3]);
      return bulk(begin >= text.size() ? "" : std::string_view(text).substr(begin, end - begin + 1));
    }
    if (name == "RDMALOAD.READ" && options_.ours) return read(connection, command);
    return "-ERR unknown command '" + name + "', with args beginning with: \r\n";
  }

  std::string read(Connection& connection, const Command& command) {
    const auto object = find(command[1]);
    if (object == nullptr) return "-NOTFOUND no such key\r\n";
    const uint64_t size = std::stoull(command[2]);
    if (size != 0 && size != object->size()) return "-SIZE " + std::to_string(object->size()) + "\r\n";
    if (command.size() < 7 || (command.size() - 3) % 4 != 0 ||
        (command.size() - 3) / 4 > options_.max_segments) {
      return "-ERR wrong number of segments\r\n";
    }
    auto& source = connection.sources[object.get()];
    if (source == nullptr) {
      source = connection.channel->domain()->register_memory(*object, Access::kSource);
      connection.held.push_back(object);
    }
    for (size_t i = 3; i < command.size(); i += 4) {
      const uint64_t offset = std::stoull(command[i]), length = std::stoull(command[i + 1]);
      if (offset > object->size() || length > object->size() - offset) return "-RANGE\r\n";
      const auto bytes = std::span(*object).subspan(offset, length);
      while (!connection.channel->try_write(bytes, source->local_key(), std::stoull(command[i + 2]),
                                            static_cast<uint32_t>(std::stoul(command[i + 3])), 1)) {
        connection.channel->turn(std::chrono::milliseconds(1));
      }
      uint64_t ids[16];
      connection.channel->take_completed(ids);
    }
    return ":" + std::to_string(object->size()) + "\r\n";
  }

  const Options options_;
  std::unique_ptr<Listener> listener_;
  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<std::vector<std::byte>>> objects_;  // Guarded by mutex_, as below.
  Hook hook_;
  std::vector<Command> commands_;
  std::atomic<int> connections_{0};
  std::jthread thread_;
};

}  // namespace rdmaload::rdma::testing
