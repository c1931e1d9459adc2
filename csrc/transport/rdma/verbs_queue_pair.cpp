#include "transport/rdma/verbs_queue_pair.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "transport/rdma/devices.h"
#include "transport/rdma/fixed_queue.h"
#include "transport/rdma/libraries.h"
#include "transport/rdma/protection_domain.h"
#include "transport/rdma/send_ledger.h"

namespace rdmaload::rdma {
namespace {

constexpr uint32_t kInlineBytes = 64;  // asked for: every control message, and a short command
constexpr int kListenBacklog = 128;
// An address that nobody answers for is given up by the kernel after as long; the deadline may come first.
constexpr int kResolveMilliseconds = 5000;
// The same over a card that would be the best, where another may do.
constexpr int kPreferredMilliseconds = 1000;
// How long close() waits for a card to hand back what was posted, before it destroys the queue pair
// regardless.
constexpr std::chrono::seconds kDrainTime{5};
constexpr uint64_t kMarker = ~uint64_t{0};  // the id of the request that close() posts last

// Ids carry the kind of their request: a failed completion does not say it.
constexpr int kKindShift = 62;
uint64_t tagged(Completion::Kind kind, uint64_t id) { return static_cast<uint64_t>(kind) << kKindShift | id; }

void make_non_blocking(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

socklen_t length_of(const sockaddr_storage& address) {
  return address.ss_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
}

std::string text_of(const sockaddr_storage& address) {
  char host[NI_MAXHOST] = "?", port[NI_MAXSERV] = "?";
  getnameinfo(reinterpret_cast<const sockaddr*>(&address), length_of(address), host, sizeof(host), port,
              sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV);
  return address.ss_family == AF_INET6 ? "[" + std::string(host) + "]:" + port
                                       : std::string(host) + ":" + port;
}

std::vector<sockaddr_storage> addresses_of(const std::string& host, int port, int flags,
                                           const std::string& endpoint) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* list = nullptr;
  const int failure = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list);
  if (failure != 0) {
    throw Error(ErrorCode::kUnavailable, "resolving " + endpoint + ": " + gai_strerror(failure));
  }
  std::vector<sockaddr_storage> addresses;
  for (const addrinfo* entry = list; entry != nullptr; entry = entry->ai_next) {
    if (entry->ai_family != AF_INET && entry->ai_family != AF_INET6) continue;
    std::memcpy(&addresses.emplace_back(), entry->ai_addr, entry->ai_addrlen);
  }
  freeaddrinfo(list);
  return addresses;
}

// The channel on which the events of one connection, or of one listener, arrive.
class Events {
 public:
  explicit Events(const Libraries& libraries)
      : libraries_(libraries), handle_(libraries.rdma_create_event_channel()) {
    if (handle_ == nullptr) {
      throw Error(ErrorCode::kNotSupported,
                  std::string("no RDMA connections on this machine: ") + std::strerror(errno) +
                      " (is there a card, and /dev/infiniband/rdma_cm? see rdmaload doctor)");
    }
    make_non_blocking(handle_->fd);
  }
  ~Events() {
    if (libraries_.is_opener()) libraries_.rdma_destroy_event_channel(handle_);
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;
  abi::EventChannel* handle() const noexcept { return handle_; }
  int fd() const noexcept { return handle_->fd; }

  struct Event {
    int kind;
    int status;
    abi::ConnectionId* id;
  };
  // The next one; nullopt: none has come.
  std::optional<Event> next() {
    abi::ConnectionEvent* event = nullptr;
    if (libraries_.rdma_get_cm_event(handle_, &event) != 0) return std::nullopt;
    const Event copy{event->event, event->status, event->id};
    libraries_.rdma_ack_cm_event(event);
    return copy;
  }

 private:
  const Libraries& libraries_;
  abi::EventChannel* const handle_;
};

// A connection of librdmacm, not necessarily connected.
class Id {
 public:
  Id(const Libraries& libraries, Events& events) : libraries_(libraries) {
    if (libraries_.rdma_create_id(events.handle(), &handle_, nullptr, abi::kPortSpaceTcp) != 0) {
      throw Error(ErrorCode::kNotSupported,
                  std::string("no RDMA connections on this machine: ") + std::strerror(errno));
    }
  }
  Id(const Libraries& libraries, abi::ConnectionId* handle) : libraries_(libraries), handle_(handle) {}
  ~Id() {
    if (libraries_.is_opener()) libraries_.rdma_destroy_id(handle_);
  }
  Id(const Id&) = delete;
  Id& operator=(const Id&) = delete;
  abi::ConnectionId* get() const noexcept { return handle_; }
  abi::ConnectionId* operator->() const noexcept { return handle_; }

 private:
  const Libraries& libraries_;
  abi::ConnectionId* handle_ = nullptr;
};

std::shared_ptr<VerbsDomain> domain_on(abi::Context* context,
                                       const std::shared_ptr<ProtectionDomain>& wanted) {
  if (wanted == nullptr) return std::make_shared<VerbsDomain>(context);
  auto domain = std::dynamic_pointer_cast<VerbsDomain>(wanted);
  if (domain == nullptr || domain->context() != context) {
    throw Error(ErrorCode::kUnavailable, std::string("the route leads to the card ") + context->device->name +
                                             ", but memory is registered with " + wanted->device());
  }
  return domain;
}

class VerbsQueuePair final : public rdma::QueuePair {
 public:
  // Of an id that is bound to a card and whose events come through `events`.
  VerbsQueuePair(const Libraries& libraries, std::unique_ptr<Events> events, std::unique_ptr<Id> id,
                 std::shared_ptr<VerbsDomain> domain, bool client)
      : libraries_(libraries),
        client_(client),
        domain_(std::move(domain)),
        as_base_(domain_),
        events_(std::move(events)),
        id_(std::move(id)),
        completion_channel_(libraries, domain_->context()),
        queue_(libraries, domain_->context(), completion_channel_.handle),
        peer_(text_of((*id_)->route.addr.dst)) {
    make_queue_pair();
  }
  ~VerbsQueuePair() override { close(); }

  const std::shared_ptr<rdma::ProtectionDomain>& domain() const noexcept override { return as_base_; }

  void start() override {
    require_open();
    // As Valkey's. The server's RNR retry count goes to the client: 0, as there. See kMaxUnansweredSends.
    abi::ConnectionParameters parameters{};
    parameters.responder_resources = 1;
    parameters.initiator_depth = 1;
    parameters.retry_count = client_ ? 7 : 5;
    parameters.rnr_retry_count = client_ ? 7 : 0;
    const int failed = client_ ? libraries_.rdma_connect(id_->get(), &parameters)
                               : libraries_.rdma_accept(id_->get(), &parameters);
    if (failed != 0) {
      throw Error(ErrorCode::kUnavailable, std::string(client_ ? "connecting" : "accepting") +
                                               " over RDMA: " + std::strerror(errno) + ": " + description());
    }
    started_ = true;
  }
  bool established() const noexcept override { return established_ && lost_reason_.empty() && !closed_; }

  std::unique_ptr<rdma::MemoryRegion> make_window(const rdma::MemoryRegion& region) override {
    require_open();
    abi::SendRequest bind{};
    bind.wr_id = tagged(Completion::Kind::kSend, kMaxId);
    auto window = domain_->make_window(region, bind);
    if (window == nullptr) return nullptr;
    abi::SendRequest* bad = nullptr;
    abi::QueuePair* queue_pair = (*id_)->qp;
    if (queue_pair->context->ops.post_send(queue_pair, &bind, &bad) != 0) return nullptr;
    ledger_.posted(false);
    return window;
  }

  void post_receive(uint64_t id, std::span<std::byte> memory, uint32_t key) override {
    require_open();
    abi::ScatterGather piece{reinterpret_cast<uintptr_t>(memory.data()), static_cast<uint32_t>(memory.size()),
                             key};
    abi::ReceiveRequest request{};
    request.wr_id = tagged(Completion::Kind::kReceive, id);
    request.sg_list = &piece;
    request.num_sge = 1;
    abi::ReceiveRequest* bad = nullptr;
    abi::QueuePair* queue_pair = (*id_)->qp;
    check_post(queue_pair->context->ops.post_recv(queue_pair, &request, &bad), "a receive");
    ++receives_;
  }

  void post_send(uint64_t id, std::span<const std::byte> bytes, std::optional<uint32_t> key,
                 bool signaled) override {
    abi::SendRequest request{};
    request.opcode = abi::kOpcodeSend;
    request.wr_id = tagged(Completion::Kind::kSend, id);
    post(request, bytes, key, signaled);
  }

  void post_write(uint64_t id, std::span<const std::byte> bytes, std::optional<uint32_t> key,
                  uint64_t remote_address, uint32_t remote_key, std::optional<uint32_t> immediate,
                  bool signaled) override {
    abi::SendRequest request{};
    request.opcode = immediate ? abi::kOpcodeWriteWithImmediate : abi::kOpcodeWrite;
    request.wr_id = tagged(Completion::Kind::kWrite, id);
    request.imm_data = htonl(immediate.value_or(0));
    request.rdma.remote_addr = remote_address;
    request.rdma.rkey = remote_key;
    post(request, bytes, key, signaled);
  }

  size_t inline_bytes() const noexcept override { return inline_bytes_; }
  size_t send_room() const noexcept override { return ledger_.room(); }

  size_t poll(std::span<Completion> completions) override {
    if (closed_) return 0;
    size_t count = 0;
    while (count < completions.size()) {
      if (ready_.empty() && !fill()) break;
      translate(ready_.front(), completions[count++]);
      ready_.pop();
    }
    return count;
  }

  bool arm() override {
    if (closed_) throw Error(ErrorCode::kUnavailable, "the RDMA connection is closed: " + peer_);
    if (!ready_.empty()) return false;
    if (!armed_) {
      queue_.handle->context->ops.req_notify_cq(queue_.handle, 0);
      armed_ = true;
    }
    // What completed before it was armed raises no event.
    if (fill()) return false;
    if (!lost_reason_.empty()) throw Error(ErrorCode::kUnavailable, lost_reason_);
    return true;
  }

  void handle_events() override {
    if (closed_) return;
    take_completion_events();
    while (const auto event = events_->next()) handle(*event);
    if (!established_ && !lost_reason_.empty()) throw Error(ErrorCode::kUnavailable, lost_reason_);
  }

  std::array<int, 2> descriptors() const noexcept override {
    return {completion_channel_.handle->fd, events_->fd()};
  }

  void close() noexcept override;

  std::string description() const override {
    const sockaddr_storage& from = (*id_)->route.addr.src;
    return domain_->device() + " port " + std::to_string((*id_)->port_num) + ", " + text_of(from) +
           (client_ ? " to " : " from ") + peer_;
  }
  std::string peer_address() const override { return peer_; }

 private:
  struct CompletionChannel {
    CompletionChannel(const Libraries& libraries, abi::Context* context)
        : libraries(libraries), handle(libraries.ibv_create_comp_channel(context)) {
      if (handle == nullptr) {
        throw Error(ErrorCode::kDevice,
                    std::string("making a completion channel: ") + registration_failure(errno));
      }
      make_non_blocking(handle->fd);
      fcntl(handle->fd, F_SETFD, FD_CLOEXEC);
    }
    ~CompletionChannel() {
      if (libraries.is_opener()) libraries.ibv_destroy_comp_channel(handle);
    }
    const Libraries& libraries;
    abi::CompletionChannel* const handle;
  };
  struct CompletionQueue {
    CompletionQueue(const Libraries& libraries, abi::Context* context, abi::CompletionChannel* channel)
        : libraries(libraries),
          handle(libraries.ibv_create_cq(context, static_cast<int>(kReceiveDepth + kSendDepth + 2), nullptr,
                                         channel, 0)) {
      if (handle == nullptr) {
        throw Error(ErrorCode::kDevice,
                    std::string("making a completion queue: ") + registration_failure(errno));
      }
    }
    ~CompletionQueue() {
      if (libraries.is_opener()) libraries.ibv_destroy_cq(handle);
    }
    const Libraries& libraries;
    abi::CompletionQueue* const handle;
  };

  void make_queue_pair() {
    abi::QueuePairInit init{};
    init.send_cq = queue_.handle;
    init.recv_cq = queue_.handle;
    init.qp_type = abi::kQueuePairReliableConnected;
    for (const uint32_t inlined : {kInlineBytes, 0U}) {  // some cards inline nothing
      init.cap = {static_cast<uint32_t>(kSendDepth + 1), static_cast<uint32_t>(kReceiveDepth), 1, 1, inlined};
      if (libraries_.rdma_create_qp(id_->get(), domain_->handle(), &init) == 0) {
        inline_bytes_ = init.cap.max_inline_data;
        return;
      }
    }
    throw Error(ErrorCode::kDevice,
                "making a queue pair on " + domain_->device() + ": " + registration_failure(errno));
  }

  void require_open() const {
    if (closed_) throw Error(ErrorCode::kUnavailable, "the RDMA connection is closed: " + peer_);
  }

  void check_post(int failed, const char* what) const {
    if (failed == 0) return;
    if (failed == ENOMEM) throw Error(ErrorCode::kInvalid, std::string("no room in the queue for ") + what);
    throw Error(ErrorCode::kUnavailable, std::string("posting ") + what + ": " + std::strerror(failed) +
                                             ": " + (lost_reason_.empty() ? description() : lost_reason_));
  }

  void post(abi::SendRequest& request, std::span<const std::byte> bytes, std::optional<uint32_t> key,
            bool signaled) {
    require_open();
    if (!lost_reason_.empty()) throw Error(ErrorCode::kUnavailable, lost_reason_);
    if (ledger_.room() == 0) throw Error(ErrorCode::kInvalid, "the send queue is full");
    if (!key && bytes.size() > inline_bytes_) throw Error(ErrorCode::kInvalid, "too many bytes to inline");
    abi::ScatterGather piece{reinterpret_cast<uintptr_t>(bytes.data()), static_cast<uint32_t>(bytes.size()),
                             key.value_or(0)};
    request.sg_list = &piece;
    request.num_sge = bytes.empty() ? 0 : 1;
    request.send_flags = (signaled ? abi::kSendSignaled : 0) | (key ? 0 : abi::kSendInline);
    abi::SendRequest* bad = nullptr;
    abi::QueuePair* queue_pair = (*id_)->qp;
    check_post(queue_pair->context->ops.post_send(queue_pair, &request, &bad), "a send");
    ledger_.posted(signaled);
  }

  // Takes what has completed into ready_; false when nothing waits.
  bool fill() {
    std::array<abi::WorkCompletion, kBatch> batch;
    const int count =
        queue_.handle->context->ops.poll_cq(queue_.handle, static_cast<int>(kBatch), batch.data());
    if (count < 0) throw Error(ErrorCode::kUnavailable, "the completion queue failed: " + description());
    for (int i = 0; i < count; ++i) ready_.push(batch[static_cast<size_t>(i)]);
    return count > 0;
  }

  void translate(const abi::WorkCompletion& from, Completion& to) {
    to.kind = static_cast<Completion::Kind>(from.wr_id >> kKindShift);
    to.id = from.wr_id & kMaxId;
    to.flushed = from.status == abi::kStatusFlushed;
    to.error.clear();
    to.immediate.reset();
    to.bytes = 0;
    if (from.status != abi::kStatusSuccess) {
      to.error = libraries_.ibv_wc_status_str(from.status);
    } else if (to.kind == Completion::Kind::kReceive) {
      to.bytes = from.byte_len;
      if ((from.wc_flags & abi::kCompletionWithImmediate) != 0) to.immediate = ntohl(from.imm_data);
    }
    if (to.kind == Completion::Kind::kReceive) {
      --receives_;
    } else {
      ledger_.completed();
    }
  }

  void take_completion_events() noexcept {
    abi::CompletionQueue* queue = nullptr;
    void* cookie = nullptr;
    while (libraries_.ibv_get_cq_event(completion_channel_.handle, &queue, &cookie) == 0) {
      libraries_.ibv_ack_cq_events(queue, 1);
      armed_ = false;
    }
  }

  void handle(const Events::Event& event) {
    switch (event.kind) {
      case abi::kEventEstablished:
        established_ = true;
        return;
      case abi::kEventTimewaitExit:
      case abi::kEventAddressChange:  // of a bond: the connection goes on until it fails
        return;
      case abi::kEventRejected:
        lose("refused: nothing listens for RDMA there (a TCP port does not count), or it takes no more");
        return;
      case abi::kEventDisconnected:
        lose("the peer closed the connection");
        return;
      case abi::kEventDeviceRemoval:
        lose("the card was removed");
        return;
      default:
        lose(std::string(libraries_.rdma_event_str(event.kind)) +
             (event.status != 0 ? " (" + std::string(std::strerror(std::abs(event.status))) + ")" : ""));
    }
  }
  void lose(const std::string& why) {
    if (lost_reason_.empty()) lost_reason_ = "RDMA, " + description() + ": " + why;
  }

  void drain() noexcept;

  static constexpr size_t kBatch = 32;
  const Libraries& libraries_;
  const bool client_;
  const std::shared_ptr<VerbsDomain> domain_;
  const std::shared_ptr<rdma::ProtectionDomain> as_base_;
  const std::unique_ptr<Events> events_;
  const std::unique_ptr<Id> id_;
  const CompletionChannel completion_channel_;
  const CompletionQueue queue_;
  const std::string peer_;
  size_t inline_bytes_ = 0;
  bool started_ = false;
  bool established_ = false;
  bool closed_ = false;
  bool armed_ = false;
  std::string lost_reason_;
  size_t receives_ = 0;  // posted, their completion not seen
  SendLedger ledger_;
  FixedQueue<abi::WorkCompletion> ready_{kBatch};
};

void VerbsQueuePair::close() noexcept {
  if (closed_) return;
  closed_ = true;
  if (!libraries_.is_opener()) return;
  // First the queue pair's end, so that no request and no write of the peer begins any more; then all that
  // was under way is waited for; then the connection is taken down.
  abi::QueuePairAttributes attributes{};
  attributes.qp_state = abi::kStateError;
  if (libraries_.ibv_modify_qp((*id_)->qp, &attributes, abi::kAttributeState) == 0) drain();
  if (started_) libraries_.rdma_disconnect(id_->get());
  libraries_.rdma_destroy_qp(id_->get());  // waits for whatever the card still does with it
  take_completion_events();
}

// Until every receive and every send has come back: unsignaled requests that had succeeded never do, so one
// more, signaled, is posted behind them.
void VerbsQueuePair::drain() noexcept {
  while (!ready_.empty()) {
    if (ready_.front().wr_id >> kKindShift == 0) --receives_;
    ready_.pop();
  }
  bool sends_done = true;
  if (started_) {
    abi::SendRequest marker{};
    marker.wr_id = kMarker;
    marker.opcode = abi::kOpcodeSend;
    marker.send_flags = abi::kSendSignaled;
    abi::SendRequest* bad = nullptr;
    sends_done = (*id_)->qp->context->ops.post_send((*id_)->qp, &marker, &bad) != 0;
  }
  const Deadline deadline = Deadline::after(kDrainTime);
  const abi::ContextOps& ops = queue_.handle->context->ops;
  std::array<abi::WorkCompletion, kBatch> batch;
  while ((receives_ > 0 || !sends_done) && !deadline.passed()) {
    ops.req_notify_cq(queue_.handle, 0);
    int count = 0;
    while ((count = ops.poll_cq(queue_.handle, static_cast<int>(kBatch), batch.data())) > 0) {
      for (int i = 0; i < count; ++i) {
        const uint64_t id = batch[static_cast<size_t>(i)].wr_id;
        if (id == kMarker) {
          sends_done = true;
        } else if (id >> kKindShift == static_cast<uint64_t>(Completion::Kind::kReceive)) {
          --receives_;
        }
      }
    }
    if (count < 0) return;
    if (receives_ == 0 && sends_done) return;
    pollfd entry{completion_channel_.handle->fd, POLLIN, 0};
    ::poll(&entry, 1, deadline.poll_milliseconds(1000));
    take_completion_events();
  }
}

class VerbsListener final : public Listener {
 public:
  VerbsListener(const Libraries& libraries, const std::string& address, int port, bool share_domain)
      : libraries_(libraries), share_domain_(share_domain), events_(libraries), id_(libraries, events_) {
    const std::string endpoint = address + ":" + std::to_string(port);
    const auto addresses = addresses_of(address, port, AI_NUMERICHOST, endpoint);
    sockaddr_storage own = addresses.at(0);
    if (libraries_.rdma_bind_addr(id_.get(), reinterpret_cast<sockaddr*>(&own)) != 0) {
      throw Error(ErrorCode::kUnavailable, "listening for RDMA on " + endpoint + ": " + std::strerror(errno) +
                                               " (the address must be a card's own)");
    }
    if (id_->verbs == nullptr) {
      throw Error(ErrorCode::kInvalid, "listening for RDMA on " + endpoint +
                                           ": memory is registered per card, so name a card's address");
    }
    as_base_ = domain_ = std::make_shared<VerbsDomain>(id_->verbs);
    if (libraries_.rdma_listen(id_.get(), kListenBacklog) != 0) {
      throw Error(ErrorCode::kUnavailable, "listening for RDMA on " + endpoint + ": " + std::strerror(errno));
    }
  }

  std::unique_ptr<rdma::QueuePair> accept() override {
    while (const auto event = events_.next()) {
      if (event->kind == abi::kEventDeviceRemoval) {
        throw Error(ErrorCode::kUnavailable, "the card " + domain_->device() + " was removed");
      }
      if (event->kind != abi::kEventConnectRequest) continue;
      std::unique_ptr<Events> events;  // ends after the id that it serves
      auto id = std::make_unique<Id>(libraries_, event->id);
      try {
        events = std::make_unique<Events>(libraries_);
        if (libraries_.rdma_migrate_id(id->get(), events->handle()) != 0) {
          throw Error(ErrorCode::kDevice, std::string("taking over a connection: ") + std::strerror(errno));
        }
        abi::ConnectionId* raw = id->get();
        auto domain = domain_on(raw->verbs, share_domain_ ? as_base_ : nullptr);
        return std::make_unique<VerbsQueuePair>(libraries_, std::move(events), std::move(id),
                                                std::move(domain), false);
      } catch (const Error& error) {
        if (id != nullptr) libraries_.rdma_reject(id->get(), nullptr, 0);
        throw Error(ErrorCode::kDevice, std::string("refusing an RDMA connection: ") + error.what());
      }
    }
    return nullptr;
  }
  int descriptor() const noexcept override { return events_.fd(); }
  int port() const noexcept override { return ntohs(libraries_.rdma_get_src_port(id_.get())); }
  const std::shared_ptr<rdma::ProtectionDomain>& domain() const noexcept override { return as_base_; }

 private:
  const Libraries& libraries_;
  const bool share_domain_;
  Events events_;
  Id id_;
  std::shared_ptr<VerbsDomain> domain_;
  std::shared_ptr<rdma::ProtectionDomain> as_base_;
};

// Waits for the event that ends a step of resolving.
void await(Events& events, int wanted, const std::string& step, Deadline deadline, const GiveUp& give_up) {
  for (;;) {
    if (const auto event = events.next()) {
      if (event->kind == wanted) return;
      throw Error(ErrorCode::kUnavailable,
                  step + ": " + (event->status == 0 ? "it failed" : std::strerror(std::abs(event->status))));
    }
    if (give_up && give_up()) throw Error(ErrorCode::kCancelled, step + " was cancelled");
    if (deadline.passed()) throw Error(ErrorCode::kTimeout, step + " took too long");
    pollfd entry{events.fd(), POLLIN, 0};
    ::poll(&entry, 1, deadline.poll_milliseconds(kGiveUpPollMilliseconds));
  }
}

std::unique_ptr<rdma::QueuePair> resolve_one(const Libraries& libraries, const Remote& remote,
                                             sockaddr_storage to, Deadline deadline, int step_milliseconds,
                                             const GiveUp& give_up) {
  const std::string target = text_of(to);
  std::optional<sockaddr_storage> from;
  if (!remote.device.empty()) {
    const std::vector<Card> cards = list_cards();
    const Card* card = card_named(cards, remote.device);
    if (card == nullptr) throw Error(ErrorCode::kUnavailable, "there is no RDMA card " + remote.device);
    const auto own = address_of_card(*card, target);
    if (!own) {
      throw Error(ErrorCode::kUnavailable, "the card " + remote.device +
                                               " has no address of its own from which " + target +
                                               " could be reached");
    }
    from = addresses_of(*own, 0, AI_NUMERICHOST, *own).at(0);
  }
  auto events = std::make_unique<Events>(libraries);
  auto id = std::make_unique<Id>(libraries, *events);
  const int limit = std::max(1, deadline.poll_milliseconds(step_milliseconds));
  const std::string addressing = "finding an RDMA card for " + target;
  if (libraries.rdma_resolve_addr(id->get(), from ? reinterpret_cast<sockaddr*>(&*from) : nullptr,
                                  reinterpret_cast<sockaddr*>(&to), limit) != 0) {
    throw Error(ErrorCode::kUnavailable, addressing + ": " + std::strerror(errno));
  }
  await(*events, abi::kEventAddressResolved, addressing, deadline, give_up);
  if ((*id)->verbs == nullptr) throw Error(ErrorCode::kUnavailable, addressing + ": the route has none");
  if (!remote.device.empty() && remote.device != (*id)->verbs->device->name) {
    throw Error(ErrorCode::kUnavailable,
                addressing + ": the route has " + (*id)->verbs->device->name + ", not " + remote.device);
  }
  const std::string routing = "finding an RDMA route to " + target;
  if (libraries.rdma_resolve_route(id->get(), std::max(1, deadline.poll_milliseconds(step_milliseconds))) !=
      0) {
    throw Error(ErrorCode::kUnavailable, routing + ": " + std::strerror(errno));
  }
  await(*events, abi::kEventRouteResolved, routing, deadline, give_up);
  auto domain = domain_on((*id)->verbs, remote.domain);
  return std::make_unique<VerbsQueuePair>(libraries, std::move(events), std::move(id), std::move(domain),
                                          true);
}

const Libraries& usable_libraries() {
  const Libraries& libraries = Libraries::process();
  if (!libraries.is_opener()) {
    throw Error(ErrorCode::kNotSupported,
                "this process was forked from one that had used RDMA, which does not survive a fork: start "
                "worker processes with the \"spawn\" method");
  }
  return libraries;
}

}  // namespace

std::unique_ptr<rdma::QueuePair> VerbsFabric::resolve(const Remote& remote, Deadline deadline,
                                                      const GiveUp& give_up) {
  const Libraries& libraries = usable_libraries();
  const auto addresses =
      addresses_of(remote.host, remote.port, 0, remote.host + ":" + std::to_string(remote.port));
  std::vector<std::string> names{remote.device};
  if (remote.device.empty()) names = cards_to_try(list_cards(), remote.near);
  // Memory is registered with the card of the first connection, so the others go over it too.
  if (remote.domain != nullptr && names.size() > 1) names = {remote.domain->device(), ""};
  std::vector<std::pair<std::string, sockaddr_storage>> tries;
  for (const std::string& name : names) {
    for (const sockaddr_storage& address : addresses) tries.emplace_back(name, address);
  }
  for (size_t i = 0;; ++i) {
    Remote over = remote;
    over.device = tries.at(i).first;
    const bool last = i + 1 == tries.size();
    const bool preferred = !over.device.empty() && remote.device.empty();
    try {
      return resolve_one(libraries, over, tries[i].second, deadline,
                         preferred ? kPreferredMilliseconds : kResolveMilliseconds, give_up);
    } catch (const Error& error) {
      // Else the next address, or the next card.
      if (last || error.code() != ErrorCode::kUnavailable) throw;
    }
  }
}

std::unique_ptr<Listener> VerbsFabric::listen(const std::string& address, int port, bool share_domain) {
  return std::make_unique<VerbsListener>(usable_libraries(), address, port, share_domain);
}

}  // namespace rdmaload::rdma
