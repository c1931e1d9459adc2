#include "server/rdma_service.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
#include <unordered_map>

#include "core/error.h"
#include "core/thread_name.h"
#include "server/rdma_connection.h"
#include "transport/rdma/verbs_queue_pair.h"

namespace rdmaload::server {
namespace {

constexpr int kEvents = 64;
constexpr int kTickMilliseconds = 250;      // how often stalled connections and keep-alives are looked for
constexpr size_t kScratchBytes = 64 << 10;  // per thread: small replies are gathered in it
// For a client to be connected, to say where it receives, and who it is.
constexpr std::chrono::seconds kUnknownClientTime{30};
constexpr uint64_t kWakeTag = 0;
constexpr uint64_t kListenerTag = 1;
constexpr uint64_t kFirstTag = 2;  // a session's is its id and this

int checked_descriptor(int fd) {
  if (fd < 0)
    throw Error(ErrorCode::kUnavailable, std::string("the server cannot start: ") + std::strerror(errno));
  return fd;
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(checked_descriptor(fd)) {}
  ~Descriptor() { close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const noexcept { return fd_; }

 private:
  const int fd_;
};

}  // namespace

// ---- one thread --------------------------------------------------------------------------------

class RdmaService::Loop {
 public:
  Loop(RdmaService& service, bool accepts)
      : service_(service),
        epoll_(epoll_create1(EPOLL_CLOEXEC)),
        wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
        scratch_(kScratchBytes) {
    watch(wake_.get(), kWakeTag);
    if (accepts) watch(service.listener_->descriptor(), kListenerTag);
  }
  ~Loop() {
    stop();
    join();
    for (size_t i = 0; i < inbox_.size(); ++i) uncount();
  }

  void start() {
    thread_ = std::thread([this] {
      name_this_thread("rdmaload-serve");
      run();
    });
  }
  void join() {
    if (thread_.joinable()) thread_.join();
  }
  // From any thread, as the next two.
  void add(std::unique_ptr<rdma::QueuePair> queue_pair) {
    {
      const std::lock_guard lock(mutex_);
      inbox_.push_back(std::move(queue_pair));
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
  using Connections = std::unordered_map<uint64_t, std::unique_ptr<RdmaConnection>>;

  Shared& shared() const { return service_.owner_.shared; }

  void wake() {
    const uint64_t one = 1;
    // It can only fail when the counter is full, and then the loop wakes anyway.
    [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
  }

  // Descriptors of a connection leave the set when they are closed.
  void watch(int fd, uint64_t tag) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = tag;
    epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event);
  }

  void run() {
    std::array<epoll_event, kEvents> events;
    auto next_tick = Clock::now();
    while (!stop_) {
      const int count =
          epoll_wait(epoll_.get(), events.data(), kEvents, runnable_.empty() ? kTickMilliseconds : 0);
      for (int i = 0; i < count && !stop_; ++i) {
        const uint64_t tag = events[static_cast<size_t>(i)].data.u64;
        if (tag == kWakeTag) {
          take_inbox();
        } else if (tag == kListenerTag) {
          accept_some();
        } else {
          try {
            make_runnable(tag - kFirstTag);
          } catch (const std::bad_alloc&) {  // its descriptor stays readable
            ++shared().counters.refused_for_memory;
          }
        }
      }
      // Each has its turn; who has more to do comes again behind the others.
      for (const uint64_t id : std::exchange(runnable_, {})) step(id);
      if (Clock::now() >= next_tick) {
        tick();
        next_tick = Clock::now() + std::chrono::milliseconds(kTickMilliseconds);
      }
    }
    while (!connections_.empty()) drop(connections_.begin()->first);
  }

  void make_runnable(uint64_t id) {
    if (std::find(runnable_.begin(), runnable_.end(), id) == runnable_.end()) runnable_.push_back(id);
  }

  void take_inbox() {
    uint64_t ignored = 0;
    [[maybe_unused]] const ssize_t taken = read(wake_.get(), &ignored, sizeof(ignored));
    std::vector<std::unique_ptr<rdma::QueuePair>> fresh;
    {
      const std::lock_guard lock(mutex_);
      fresh.swap(inbox_);
    }
    for (auto& queue_pair : fresh) begin(std::move(queue_pair));
  }

  void begin(std::unique_ptr<rdma::QueuePair> queue_pair) {
    std::string address;
    const uint64_t id = service_.owner_.next_id();
    try {
      address = queue_pair->peer_address();
      auto made = std::make_unique<RdmaConnection>(std::move(queue_pair), shared(), id, scratch_);
      const RdmaConnection& connection = *connections_.emplace(id, std::move(made)).first->second;
      service_.owner_.joined(connection.session());
      for (const int fd : connection.descriptors()) {
        if (fd >= 0) watch(fd, id + kFirstTag);
      }
      make_runnable(id);
    } catch (const std::exception& err) {
      service_.owner_.log({"a connection of ", address, " over RDMA failed: ", err.what()});
      if (connections_.contains(id)) {
        drop(id);
      } else {
        uncount();
      }
    }
  }

  void accept_some() {
    while (!stop_) {
      std::unique_ptr<rdma::QueuePair> queue_pair;
      try {
        queue_pair = service_.listener_->accept();
      } catch (const std::exception& err) {  // no memory for it, too
        service_.owner_.log({"a connection over RDMA cannot be accepted: ", err.what()});
        return;
      }
      if (queue_pair == nullptr) return;
      Counters& counters = shared().counters;
      const auto limit = static_cast<uint64_t>(service_.options_.max_connections);
      if (counters.rdma_connections_now >= limit ||
          counters.connections_now >= static_cast<uint64_t>(shared().max_connections)) {
        ++counters.connections_refused;
        continue;  // which rejects it
      }
      ++counters.connections_now;
      ++counters.rdma_connections_now;
      ++counters.connections_accepted;
      try {
        service_.least_busy().add(std::move(queue_pair));
      } catch (const std::bad_alloc&) {
        --counters.connections_now;
        --counters.rdma_connections_now;
        ++counters.connections_refused;
      }
    }
  }

  void step(uint64_t id) {
    const auto at = connections_.find(id);
    if (at == connections_.end()) return;
    RdmaConnection& connection = *at->second;
    try {
      const bool more = connection.step();
      if (connection.finished()) {
        drop(id);
      } else if (more) {
        make_runnable(id);
      }
    } catch (const Error& err) {
      // That a client goes is its right.
      if (err.code() != ErrorCode::kUnavailable) service_.owner_.log({err.what()});
      drop(id);
    } catch (const std::bad_alloc&) {
      ++shared().counters.refused_for_memory;  // there is none for a line of the log either
      drop(id);
    }
  }

  void tick() {
    const auto now = Clock::now();
    const auto stall = service_.owner_.stall_timeout;
    const auto patience = std::min<std::chrono::duration<double>>(stall, kUnknownClientTime);
    for (auto at = connections_.begin(); at != connections_.end();) {
      const uint64_t id = at->first;
      const RdmaConnection& connection = *at->second;
      ++at;  // before it may be dropped
      const bool stalled = connection.busy() && now - connection.moved() > stall;
      const bool known = connection.ready() && connection.session().authenticated();
      if (stalled || (!known && now - connection.since() > patience)) {
        ++shared().counters.connections_stalled;
        drop(id);
      } else if (connection.next_due() <= now) {
        try {
          make_runnable(id);
        } catch (const std::bad_alloc&) {
          break;  // the next tick may find memory
        }
      }
    }
    if (const std::string refusal = shared().store.memory()->take_refusal(); !refusal.empty()) {
      service_.owner_.log({"values are copied before they are sent over RDMA: ", refusal});
    }
  }

  void drop(uint64_t id) {
    const auto at = connections_.find(id);
    service_.owner_.left(at->second->session());
    connections_.erase(at);  // what it still held of the store is given back before it counts as gone
    uncount();
  }

  void uncount() {
    --load_;
    --shared().counters.rdma_connections_now;
    --shared().counters.connections_now;
  }

  RdmaService& service_;
  const Descriptor epoll_;
  const Descriptor wake_;
  std::vector<std::byte> scratch_;
  Connections connections_;  // by the session's id; only the loop's thread, as what follows
  std::vector<uint64_t> runnable_;
  std::atomic<bool> stop_ = false;
  std::atomic<int> load_ = 0;
  std::mutex mutex_;
  std::vector<std::unique_ptr<rdma::QueuePair>> inbox_;  // Guarded by mutex_.
  std::thread thread_;
};

// ---- the whole ---------------------------------------------------------------------------------

RdmaService::RdmaService(Owner owner, RdmaOptions options)
    : owner_(std::move(owner)), options_(std::move(options)) {
  const int port = options_.port.value_or(owner_.shared.port);
  if (port < 0 || port > 65535) {
    throw Error(ErrorCode::kInvalid, "a server over RDMA needs a port of 0 to 65535");
  }
  if (options_.max_connections < 1) {
    throw Error(ErrorCode::kInvalid, "a server over RDMA needs at least one connection");
  }
  const std::shared_ptr<rdma::Fabric> fabric =
      options_.fabric != nullptr ? options_.fabric : std::make_shared<rdma::VerbsFabric>();
  // One domain for all, or the store would have to be registered for each.
  listener_ = fabric->listen(options_.host, port, true);
  port_ = listener_->port();
  owner_.shared.rdma_port = port_;
  owner_.shared.store.memory()->register_with(listener_->domain());
  try {
    for (int i = 0; i < owner_.threads; ++i) loops_.push_back(std::make_unique<Loop>(*this, i == 0));
    // When all are there to be handed connections.
    for (const auto& loop : loops_) loop->start();
  } catch (...) {
    stop();
    throw;
  }
}

RdmaService::~RdmaService() { stop(); }

void RdmaService::stop() {
  const std::lock_guard joining(join_mutex_);
  for (const auto& loop : loops_) loop->stop();
  // All have ended before the first is destroyed: one of them hands connections to the others.
  for (const auto& loop : loops_) loop->join();
  loops_.clear();
  if (listener_ != nullptr) owner_.shared.store.memory()->register_with(nullptr);
  listener_.reset();
}

RdmaService::Loop& RdmaService::least_busy() {
  return **std::min_element(loops_.begin(), loops_.end(),
                            [](const auto& a, const auto& b) { return a->load() < b->load(); });
}

}  // namespace rdmaload::server
