#include "server/server.h"

#include <unistd.h>

#include <algorithm>

#include "core/error.h"
#include "server/listener.h"
#include "server/loop.h"

namespace rdmaload::server {
namespace {

constexpr size_t kMaxLogLines = 100;
constexpr size_t kMaxListedClients = 1000;

}  // namespace

uint64_t Server::next_id() {
  static std::atomic<uint64_t> last = 0;
  return ++last;
}

Server::Server(std::shared_ptr<Store> store, ServerOptions options)
    : store_(std::move(store)),
      options_(std::move(options)),
      shared_{*store_,
              counters_,
              options_.password,
              options_.version,
              options_.port,
              0,
              options_.threads,
              options_.max_connections,
              std::chrono::steady_clock::now(),
              [this] { ask_to_stop(); },
              [this] { return client_lines(); },
              !options_.tls.cert_file.empty()},
      tls_(shared_.tls ? std::make_unique<const TlsServerContext>(options_.tls) : nullptr) {
  if (options_.threads < 1 || options_.max_connections < 1 || options_.port < 0 || options_.port > 65535) {
    throw Error(ErrorCode::kInvalid,
                "a server needs at least one thread and one connection, and a port of 0 to 65535");
  }
  listener_ = listen_on(options_.host, options_.port);
  shared_.port = port_of(listener_);
  try {
    if (!options_.rdma.host.empty()) rdma_ = make_rdma();
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
  if (rdma_ != nullptr) rdma_->stop();
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

void Server::log(std::initializer_list<std::string_view> parts) noexcept {
  try {
    std::string line;
    for (const std::string_view part : parts) line += part;
    const std::lock_guard lock(mutex_);
    if (log_.size() == kMaxLogLines) log_.pop_front();
    log_.push_back(std::move(line));
  } catch (const std::bad_alloc&) {
    ++counters_.refused_for_memory;
  }
}

std::unique_ptr<RdmaService> Server::make_rdma() {
  return std::make_unique<RdmaService>(
      RdmaService::Owner{.shared = shared_,
                         .threads = options_.threads,
                         .stall_timeout = options_.stall_timeout,
                         .next_id = next_id,
                         .joined = [this](const Session& session) { joined(session); },
                         .left = [this](const Session& session) { left(session); },
                         .log = [this](auto parts) { log(parts); }},
      options_.rdma);
}

void Server::joined(const Session& session) {
  const std::lock_guard lock(mutex_);
  sessions_.emplace(session.id(), &session);
}

void Server::left(const Session& session) {
  const std::lock_guard lock(mutex_);
  sessions_.erase(session.id());
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
