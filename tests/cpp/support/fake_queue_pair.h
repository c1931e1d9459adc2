// A network of RDMA cards in memory: queue pairs for unit tests, without verbs.
//
// It keeps what a card promises and no more. Work requests take effect late: not when they are posted, but
// when either end polls or sleeps, in the order of their posts, and the bytes are read then (a sender that
// reuses its memory early shows as wrong bytes). Keys, rights and ranges are checked; a send without a
// receive at the other end fails a client at once, and waits for a server (as the retry counts of Valkey have
// it). Faults are set on the network. Any thread may use any part; one lock guards it all. The network
// outlives what it made.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "transport/rdma/queue_pair.h"
#include "transport/rdma/send_ledger.h"

namespace rdmaload::rdma::testing {

class FakeNetwork;

// Wakes a poll(2).
class FakeSignal {
 public:
  FakeSignal() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}
  ~FakeSignal() { ::close(fd_); }
  FakeSignal(const FakeSignal&) = delete;
  FakeSignal& operator=(const FakeSignal&) = delete;
  int fd() const noexcept { return fd_; }
  void raise() noexcept {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(fd_, &one, sizeof(one));
  }
  void clear() noexcept {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t got = ::read(fd_, &count, sizeof(count));
  }

 private:
  const int fd_;
};

class FakeDomain;

class FakeRegion final : public MemoryRegion {
 public:
  FakeRegion(std::shared_ptr<FakeDomain> domain, uint64_t address, uint64_t bytes, uint32_t key,
             Access access)
      : MemoryRegion(address, bytes, key, key + 1), access(access), domain_(std::move(domain)) {}
  ~FakeRegion() override;
  bool holds(uint64_t at, uint64_t length) const noexcept {
    return at >= address() && at - address() <= bytes() && length <= bytes() - (at - address());
  }
  const Access access;
  const void* bound_to = nullptr;  // of a window: the queue pair through which alone it may be written

 private:
  const std::shared_ptr<FakeDomain> domain_;
};

class FakeDomain final : public ProtectionDomain {
 public:
  explicit FakeDomain(FakeNetwork& network) : network_(network) {}
  std::unique_ptr<MemoryRegion> register_memory(std::span<std::byte> memory, Access access) override;
  std::unique_ptr<MemoryRegion> register_dmabuf(int fd, uint64_t offset, uint64_t bytes, uint64_t address,
                                                Access access) override;
  const std::string& device() const noexcept override { return device_; }

 private:
  friend class FakeNetwork;
  friend class FakeRegion;
  friend class FakeQueuePair;
  std::unique_ptr<MemoryRegion> add(uint64_t address, uint64_t bytes, Access access);
  const FakeRegion* by_local_key(uint32_t key) const;
  const FakeRegion* by_remote_key(uint32_t key) const;
  FakeNetwork& network_;
  const std::string device_ = "fake0";
  std::set<const FakeRegion*> regions_;  // guarded by the network's lock
};

struct FakeRequest {
  Completion::Kind kind = Completion::Kind::kSend;
  uint64_t id = 0;
  const std::byte* data = nullptr;
  size_t size = 0;
  std::optional<uint32_t> key;
  std::vector<std::byte> inlined;
  uint64_t remote_address = 0;
  uint32_t remote_key = 0;
  std::optional<uint32_t> immediate;
  bool signaled = false;
};

class FakeQueuePair final : public QueuePair {
 public:
  FakeQueuePair(FakeNetwork& network, std::shared_ptr<FakeDomain> domain, bool client, std::string target,
                int port = 0)
      : network_(network),
        domain_(domain),
        as_base_(std::move(domain)),
        client_(client),
        target_(std::move(target)),
        port_(port) {}
  ~FakeQueuePair() override { close(); }

  const std::shared_ptr<ProtectionDomain>& domain() const noexcept override { return as_base_; }
  void start() override;
  bool established() const noexcept override;
  std::unique_ptr<MemoryRegion> make_window(const MemoryRegion& region) override;
  void post_receive(uint64_t id, std::span<std::byte> memory, uint32_t key) override;
  void post_send(uint64_t id, std::span<const std::byte> bytes, std::optional<uint32_t> key,
                 bool signaled) override;
  void post_write(uint64_t id, std::span<const std::byte> bytes, std::optional<uint32_t> key,
                  uint64_t remote_address, uint32_t remote_key, std::optional<uint32_t> immediate,
                  bool signaled) override;
  size_t inline_bytes() const noexcept override;
  size_t send_room() const noexcept override;
  size_t poll(std::span<Completion> completions) override;
  bool arm() override;
  void handle_events() override;
  std::array<int, 2> descriptors() const noexcept override { return {signal_.fd(), -1}; }
  void close() noexcept override;
  std::string description() const override { return "fake0, to " + target_; }
  std::string peer_address() const override;

 private:
  friend class FakeNetwork;
  friend class FakeListener;
  enum class State { kNew, kConnecting, kEstablished, kLost, kClosed };
  void post(FakeRequest request);
  void fail(const std::string& reason) noexcept;  // the lock is held
  void complete(Completion completion);
  bool deliver_one();  // the lock is held; false: nothing can be delivered now

  struct Receive {
    uint64_t id;
    std::byte* data;
    size_t size;
    uint32_t key;
  };
  FakeNetwork& network_;
  const std::shared_ptr<FakeDomain> domain_;
  const std::shared_ptr<ProtectionDomain> as_base_;
  const bool client_;
  const std::string target_;
  const int port_;  // that a client connects to; 0: its peer is known already
  FakeSignal signal_;
  State state_ = State::kNew;
  std::string lost_reason_;
  FakeQueuePair* peer_ = nullptr;
  std::deque<Receive> receives_;
  std::deque<FakeRequest> requests_;  // posted, not delivered
  std::deque<Completion> completions_;
  SendLedger ledger_;
};

class FakeListener final : public Listener {
 public:
  FakeListener(FakeNetwork& network, int port, bool share_domain);
  ~FakeListener() override;
  std::unique_ptr<QueuePair> accept() override;
  int descriptor() const noexcept override { return signal_.fd(); }
  int port() const noexcept override { return port_; }
  const std::shared_ptr<ProtectionDomain>& domain() const noexcept override { return as_base_; }

 private:
  friend class FakeNetwork;
  friend class FakeQueuePair;
  FakeNetwork& network_;
  const int port_;
  const bool share_domain_;
  const std::shared_ptr<FakeDomain> domain_;
  const std::shared_ptr<ProtectionDomain> as_base_;
  FakeSignal signal_;
  std::deque<FakeQueuePair*> waiting_;  // clients
};

// What tests set; take effect at once.
struct FakeFaults {
  bool no_device = false;               // resolve and listen throw kNotSupported
  bool no_answer = false;               // who connects hears nothing
  bool held = false;                    // nothing is delivered any more (a stall)
  size_t corrupt_writes = 0;            // so many of the next writes have a flipped bit
  uint64_t memlock_bytes = UINT64_MAX;  // more cannot be registered
  bool dmabuf = true;                   // register_dmabuf works; else kNotSupported
  size_t inline_bytes = 64;
  size_t fail_client_post = 0;  // the so-many-th next send or write of a client cannot be posted; 0: none
  bool windows = true;          // make_window works; else null
  size_t accepts_without_memory = 0;    // so many of the next accept() throw bad_alloc; who asked waits on
  size_t addresses_without_memory = 0;  // the same for peer_address() of accepted queue pairs
  // Writes that are some device's matter: true when it has taken one.
  std::function<bool(uint64_t to, const void* from, size_t bytes)> device_write;
};

class FakeNetwork final : public Fabric {
 public:
  std::unique_ptr<QueuePair> resolve(const Remote& remote, Deadline, const GiveUp&) override {
    const std::lock_guard lock(mutex_);
    if (faults_.no_device) throw Error(ErrorCode::kNotSupported, "this machine has no RDMA device");
    near_ = remote.near;
    auto domain = remote.domain != nullptr ? std::dynamic_pointer_cast<FakeDomain>(remote.domain)
                                           : std::make_shared<FakeDomain>(*this);
    return std::make_unique<FakeQueuePair>(*this, std::move(domain), true,
                                           remote.host + ":" + std::to_string(remote.port), remote.port);
  }
  std::unique_ptr<Listener> listen(const std::string&, int port, bool share_domain) override {
    {
      const std::lock_guard lock(mutex_);
      if (faults_.no_device) throw Error(ErrorCode::kNotSupported, "this machine has no RDMA device");
      if (port == 0) port = next_port_++;
      if (listeners_.count(port) != 0) throw Error(ErrorCode::kUnavailable, "the port is taken");
    }
    return std::make_unique<FakeListener>(*this, port, share_domain);
  }
  // Two connected ends that share no domain: the client's and the server's.
  std::pair<std::unique_ptr<FakeQueuePair>, std::unique_ptr<FakeQueuePair>> pair() {
    auto client = std::make_unique<FakeQueuePair>(*this, std::make_shared<FakeDomain>(*this), true, "fake:1");
    auto server =
        std::make_unique<FakeQueuePair>(*this, std::make_shared<FakeDomain>(*this), false, "fake:2");
    const std::lock_guard lock(mutex_);
    client->peer_ = server.get();
    server->peer_ = client.get();
    return {std::move(client), std::move(server)};
  }

  // Changes the faults under the lock; then wakes everybody.
  template <typename Change>
  void set(Change change) {
    const std::lock_guard lock(mutex_);
    change(faults_);
    for (FakeQueuePair* end : ends_) end->signal_.raise();
  }
  // Delivers so many requests of everything that was posted, although held; returns how many there were.
  size_t deliver(size_t count) {
    const std::lock_guard lock(mutex_);
    size_t done = 0;
    for (bool moved = true; moved && done < count;) {
      moved = false;
      for (FakeQueuePair* end : ends_) {
        if (done < count && end->deliver_one()) {
          moved = true;
          ++done;
        }
      }
    }
    return done;
  }
  // Every connection is lost, as when a cable is pulled.
  void cut() {
    const std::lock_guard lock(mutex_);
    for (FakeQueuePair* end : ends_) end->fail("transport retry counter exceeded");
  }

  uint64_t registered_bytes() const {
    const std::lock_guard lock(mutex_);
    return registered_bytes_;
  }
  uint64_t registrations() const {  // that there are
    const std::lock_guard lock(mutex_);
    return registrations_;
  }
  std::string near() const {  // what the last connection was to be near to
    const std::lock_guard lock(mutex_);
    return near_;
  }
  uint64_t refused_writes() const {  // by keys, rights or ranges
    const std::lock_guard lock(mutex_);
    return refused_writes_;
  }
  uint64_t delivered_writes() const {
    const std::lock_guard lock(mutex_);
    return delivered_writes_;
  }

 private:
  friend class FakeDomain;
  friend class FakeRegion;
  friend class FakeQueuePair;
  friend class FakeListener;
  void progress() {
    if (faults_.held) return;
    for (bool moved = true; moved;) {
      moved = false;
      for (FakeQueuePair* end : ends_) moved = end->deliver_one() || moved;
    }
  }

  mutable std::mutex mutex_;
  FakeFaults faults_;
  int next_port_ = 20000;
  uint32_t next_key_ = 0x100;
  uint64_t registered_bytes_ = 0;
  uint64_t registrations_ = 0;
  std::string near_;
  uint64_t refused_writes_ = 0;
  uint64_t delivered_writes_ = 0;
  std::map<int, FakeListener*> listeners_;
  std::set<FakeQueuePair*> ends_;  // started and not closed
};

inline FakeRegion::~FakeRegion() {
  FakeNetwork& network = domain_->network_;
  const std::lock_guard lock(network.mutex_);
  domain_->regions_.erase(this);
  network.registered_bytes_ -= bytes();
  --network.registrations_;
}

inline std::unique_ptr<MemoryRegion> FakeDomain::add(uint64_t address, uint64_t bytes, Access access) {
  const std::lock_guard lock(network_.mutex_);
  if (bytes == 0) throw Error(ErrorCode::kInvalid, "an empty range cannot be registered");
  if (bytes >
      network_.faults_.memlock_bytes - std::min(network_.faults_.memlock_bytes, network_.registered_bytes_)) {
    throw Error(ErrorCode::kDevice, "registering " + std::to_string(bytes) +
                                        " bytes: Cannot allocate memory: the limit of locked memory");
  }
  auto region = std::make_unique<FakeRegion>(std::static_pointer_cast<FakeDomain>(shared_from_this()),
                                             address, bytes, network_.next_key_, access);
  network_.next_key_ += 2;
  network_.registered_bytes_ += bytes;
  ++network_.registrations_;
  regions_.insert(region.get());
  return region;
}

inline std::unique_ptr<MemoryRegion> FakeDomain::register_memory(std::span<std::byte> memory, Access access) {
  return add(reinterpret_cast<uintptr_t>(memory.data()), memory.size(), access);
}

// The memory is taken to lie at `address`, as that of the fake GPU does.
inline std::unique_ptr<MemoryRegion> FakeDomain::register_dmabuf(int fd, uint64_t, uint64_t bytes,
                                                                 uint64_t address, Access access) {
  {
    const std::lock_guard lock(network_.mutex_);
    if (!network_.faults_.dmabuf) throw Error(ErrorCode::kNotSupported, "the card takes no dma-buf");
  }
  if (fcntl(fd, F_GETFD) < 0) throw Error(ErrorCode::kDevice, "registering a dma-buf: Bad file descriptor");
  return add(address, bytes, access);
}

inline const FakeRegion* FakeDomain::by_local_key(uint32_t key) const {
  for (const FakeRegion* region : regions_) {
    if (region->local_key() == key) return region;
  }
  return nullptr;
}

inline const FakeRegion* FakeDomain::by_remote_key(uint32_t key) const {
  for (const FakeRegion* region : regions_) {
    if (region->remote_key() == key) return region;
  }
  return nullptr;
}

inline void FakeQueuePair::start() {
  const std::lock_guard lock(network_.mutex_);
  if (state_ != State::kNew) throw Error(ErrorCode::kUnavailable, "started already, lost or closed");
  network_.ends_.insert(this);
  if (peer_ != nullptr) {  // the second of the two to start establishes both
    state_ = State::kConnecting;
    if (peer_->state_ != State::kConnecting) return;
    for (FakeQueuePair* end : {this, peer_}) {
      end->state_ = State::kEstablished;
      end->signal_.raise();
    }
    return;
  }
  state_ = State::kConnecting;
  if (network_.faults_.no_answer) return;
  const auto listener = network_.listeners_.find(port_);
  if (listener == network_.listeners_.end()) {
    fail("the connection was refused");
    return;
  }
  listener->second->waiting_.push_back(this);
  listener->second->signal_.raise();
}

inline std::unique_ptr<MemoryRegion> FakeQueuePair::make_window(const MemoryRegion& region) {
  {
    const std::lock_guard lock(network_.mutex_);
    if (!network_.faults_.windows) return nullptr;
  }
  auto window = domain_->add(region.address(), region.bytes(), Access::kRemoteWrite);
  static_cast<FakeRegion&>(*window).bound_to = this;
  return window;
}

inline bool FakeQueuePair::established() const noexcept {
  const std::lock_guard lock(network_.mutex_);
  return state_ == State::kEstablished;
}

inline void FakeQueuePair::post_receive(uint64_t id, std::span<std::byte> memory, uint32_t key) {
  const std::lock_guard lock(network_.mutex_);
  if (state_ == State::kClosed) throw Error(ErrorCode::kUnavailable, lost_reason_);
  if (receives_.size() == kReceiveDepth) throw Error(ErrorCode::kInvalid, "the receive queue is full");
  receives_.push_back({id, memory.data(), memory.size(), key});
}

inline void FakeQueuePair::post(FakeRequest request) {
  const std::lock_guard lock(network_.mutex_);
  if (state_ != State::kEstablished) throw Error(ErrorCode::kUnavailable, "not connected: " + lost_reason_);
  if (ledger_.room() == 0) throw Error(ErrorCode::kInvalid, "the send queue is full");
  if (size_t& nth = network_.faults_.fail_client_post; client_ && nth > 0 && --nth == 0) {
    throw Error(ErrorCode::kUnavailable, "posting a send: Input/output error");
  }
  if (!request.key) {
    if (request.size > network_.faults_.inline_bytes)
      throw Error(ErrorCode::kInvalid, "too long to be inlined");
    request.inlined.assign(request.data, request.data + request.size);
  }
  ledger_.posted(request.signaled);
  requests_.push_back(std::move(request));
  if (!network_.faults_.held) peer_->signal_.raise();
}

inline void FakeQueuePair::post_send(uint64_t id, std::span<const std::byte> bytes,
                                     std::optional<uint32_t> key, bool signaled) {
  FakeRequest request;
  request.id = id;
  request.data = bytes.data();
  request.size = bytes.size();
  request.key = key;
  request.signaled = signaled;
  post(std::move(request));
}

inline void FakeQueuePair::post_write(uint64_t id, std::span<const std::byte> bytes,
                                      std::optional<uint32_t> key, uint64_t remote_address,
                                      uint32_t remote_key, std::optional<uint32_t> immediate, bool signaled) {
  FakeRequest request;
  request.kind = Completion::Kind::kWrite;
  request.id = id;
  request.data = bytes.data();
  request.size = bytes.size();
  request.key = key;
  request.remote_address = remote_address;
  request.remote_key = remote_key;
  request.immediate = immediate;
  request.signaled = signaled;
  post(std::move(request));
}

inline size_t FakeQueuePair::inline_bytes() const noexcept {
  const std::lock_guard lock(network_.mutex_);
  return network_.faults_.inline_bytes;
}

inline size_t FakeQueuePair::send_room() const noexcept {
  const std::lock_guard lock(network_.mutex_);
  return ledger_.room();
}

inline size_t FakeQueuePair::poll(std::span<Completion> completions) {
  const std::lock_guard lock(network_.mutex_);
  network_.progress();
  size_t count = 0;
  while (count < completions.size() && !completions_.empty()) {
    completions[count] = std::move(completions_.front());
    completions_.pop_front();
    if (completions[count].kind != Completion::Kind::kReceive) ledger_.completed();
    ++count;
  }
  return count;
}

inline bool FakeQueuePair::arm() {
  const std::lock_guard lock(network_.mutex_);
  network_.progress();
  if (!completions_.empty()) return false;
  if (state_ == State::kLost || state_ == State::kClosed) throw Error(ErrorCode::kUnavailable, lost_reason_);
  return true;
}

inline void FakeQueuePair::handle_events() {
  signal_.clear();
  const std::lock_guard lock(network_.mutex_);
  if (state_ == State::kLost && completions_.empty()) throw Error(ErrorCode::kUnavailable, lost_reason_);
}

inline void FakeQueuePair::close() noexcept {
  const std::lock_guard lock(network_.mutex_);
  if (state_ == State::kClosed) return;
  for (auto& [port, listener] : network_.listeners_) std::erase(listener->waiting_, this);
  if (peer_ != nullptr) {
    // Requests of ours that had been posted are not delivered: a card drops them when its queue pair ends.
    peer_->peer_ = nullptr;
    peer_->fail("the peer closed the connection");
    peer_ = nullptr;
  }
  network_.ends_.erase(this);
  state_ = State::kClosed;
  if (lost_reason_.empty()) lost_reason_ = "closed";
  requests_.clear();
  receives_.clear();
  completions_.clear();
}

inline void FakeQueuePair::fail(const std::string& reason) noexcept {
  if (state_ == State::kLost || state_ == State::kClosed) return;
  state_ = State::kLost;
  lost_reason_ = "the connection to " + target_ + " is lost: " + reason;
  for (const FakeRequest& request : requests_) {
    completions_.push_back({request.kind, true, request.id, "Work Request Flushed Error", std::nullopt, 0});
  }
  requests_.clear();
  signal_.raise();
}

inline void FakeQueuePair::complete(Completion completion) {
  completions_.push_back(std::move(completion));
  signal_.raise();
}

inline bool FakeQueuePair::deliver_one() {
  if (requests_.empty() || state_ != State::kEstablished || peer_ == nullptr) return false;
  const FakeRequest request = requests_.front();
  const auto refuse = [&](const std::string& here, const std::string& there) {
    requests_.pop_front();
    completions_.push_back({request.kind, false, request.id, here, std::nullopt, 0});
    peer_->fail(there);
    fail(here);
    return true;
  };
  const std::byte* from = request.data;
  if (request.key) {
    const FakeRegion* region = domain_->by_local_key(*request.key);
    if (region == nullptr || !region->holds(reinterpret_cast<uintptr_t>(from), request.size)) {
      return refuse("Local Protection Error", "the peer failed");
    }
  } else {
    from = request.inlined.data();
  }
  const bool consumes = request.kind == Completion::Kind::kSend || request.immediate.has_value();
  if (consumes && peer_->receives_.empty()) {
    if (!client_) return false;  // tried again for ever
    return refuse("RNR Retry Counter Exceeded", "the peer failed");
  }
  if (request.kind == Completion::Kind::kWrite && request.size > 0) {
    const FakeRegion* region = peer_->domain_->by_remote_key(request.remote_key);
    if (region == nullptr || region->access != Access::kRemoteWrite ||
        (region->bound_to != nullptr && region->bound_to != peer_) ||
        !region->holds(request.remote_address, request.size)) {
      ++network_.refused_writes_;
      return refuse("Remote Access Error", "the peer wrote where it may not");
    }
    std::vector<std::byte> corrupted;
    if (network_.faults_.corrupt_writes > 0) {
      --network_.faults_.corrupt_writes;
      corrupted.assign(from, from + request.size);
      corrupted[request.size / 2] ^= std::byte{1};
      from = corrupted.data();
    }
    const auto& device_write = network_.faults_.device_write;
    if (!device_write || !device_write(request.remote_address, from, request.size)) {
      std::memcpy(reinterpret_cast<std::byte*>(static_cast<uintptr_t>(request.remote_address)), from,
                  request.size);
    }
    ++network_.delivered_writes_;
  }
  if (consumes) {
    const Receive receive = peer_->receives_.front();
    peer_->receives_.pop_front();
    Completion arrived;
    arrived.id = receive.id;
    arrived.bytes = static_cast<uint32_t>(request.size);
    arrived.immediate = request.immediate;
    if (request.kind == Completion::Kind::kSend) {
      const FakeRegion* region = peer_->domain_->by_local_key(receive.key);
      if (region == nullptr || region->access == Access::kSource || request.size > receive.size ||
          !region->holds(reinterpret_cast<uintptr_t>(receive.data), receive.size)) {
        return refuse("Remote Invalid Request Error", "Local Length Error");
      }
      std::memcpy(receive.data, from, request.size);
    }
    peer_->complete(std::move(arrived));
  }
  requests_.pop_front();
  if (request.signaled) complete({request.kind, false, request.id, {}, std::nullopt, 0});
  return true;
}

inline FakeListener::FakeListener(FakeNetwork& network, int port, bool share_domain)
    : network_(network),
      port_(port),
      share_domain_(share_domain),
      domain_(std::make_shared<FakeDomain>(network)),
      as_base_(domain_) {
  const std::lock_guard lock(network_.mutex_);
  network_.listeners_[port] = this;
}

inline FakeListener::~FakeListener() {
  const std::lock_guard lock(network_.mutex_);
  network_.listeners_.erase(port_);
  for (FakeQueuePair* client : waiting_) client->fail("the connection was refused");
}

inline std::string FakeQueuePair::peer_address() const {
  const std::lock_guard lock(network_.mutex_);
  if (size_t& left = network_.faults_.addresses_without_memory; !client_ && left > 0) {
    --left;
    throw std::bad_alloc();
  }
  return client_ ? target_ : "fake:client";
}

inline std::unique_ptr<QueuePair> FakeListener::accept() {
  {
    const std::lock_guard lock(network_.mutex_);
    if (size_t& left = network_.faults_.accepts_without_memory; left > 0) {
      --left;
      throw std::bad_alloc();
    }
  }
  signal_.clear();
  auto accepted = std::make_unique<FakeQueuePair>(
      network_, share_domain_ ? domain_ : std::make_shared<FakeDomain>(network_), false, "fake:client");
  const std::lock_guard lock(network_.mutex_);
  if (waiting_.empty()) return nullptr;
  FakeQueuePair* client = waiting_.front();
  waiting_.pop_front();
  if (!waiting_.empty()) signal_.raise();
  client->peer_ = accepted.get();
  accepted->peer_ = client;
  return accepted;
}

}  // namespace rdmaload::rdma::testing
