#include "transport/rdma/rdma_transport.h"

#include <algorithm>
#include <exception>
#include <limits>

#include "core/thread_name.h"
#include "transport/rdma/run_plan.h"
#include "transport/threaded_transport.h"

namespace rdmaload::rdma {
namespace {

// How long a worker sleeps before it looks whether its reads were cancelled.
constexpr std::chrono::milliseconds kPoll{20};
// An idle connection is closed after this time: the server pins memory for it.
constexpr std::chrono::seconds kIdleClose{30};
constexpr std::chrono::milliseconds kFirstPause{20};
constexpr std::chrono::milliseconds kLongestPause{1000};
// Both sides pin as much per connection. Longer values take TCP.
constexpr uint64_t kLongestWindow = uint64_t{256} << 20;

Status status_of(const std::exception& failure) {
  const auto* error = dynamic_cast<const Error*>(&failure);
  return error != nullptr ? Status::from(*error) : Status(ErrorCode::kUnavailable, failure.what());
}

// Whether a failure says something about the way rather than about what was asked for.
bool is_of_the_way(ErrorCode code) {
  return code == ErrorCode::kUnavailable || code == ErrorCode::kTimeout || code == ErrorCode::kFormat ||
         code == ErrorCode::kDevice || code == ErrorCode::kNotSupported;
}

}  // namespace

RdmaTransport::RdmaTransport(TransportOptions options) : options_(std::move(options)) {
  threads_.reserve(static_cast<size_t>(options_.connections));
  for (int i = 0; i < options_.connections; ++i) threads_.emplace_back([this] { work(); });
}

RdmaTransport::~RdmaTransport() {
  complete_all_cancelled(queue_.stop());
  {
    std::lock_guard lock(mutex_);  // so that nobody is between looking and sleeping
    changed_.notify_all();
  }
  threads_.clear();
  tcp_.reset();
}

void RdmaTransport::submit(Read& read, Clock::time_point not_before) {
  if (Transport* tcp = tcp_ready_.load()) {
    if (read.device_fill != nullptr) {
      read.owner->complete(read, no_device_way());
    } else {
      tcp->submit(read, not_before);
    }
    return;
  }
  uint64_t longest = longest_read_.load();
  while (longest < read.length && !longest_read_.compare_exchange_weak(longest, read.length)) {
  }
  if (!queue_.push(read, not_before)) complete_all_cancelled({&read});
}

void RdmaTransport::cancel(const ReadOwner& owner) {
  complete_all_cancelled(queue_.remove(owner));
  if (Transport* tcp = tcp_ready_.load()) tcp->cancel(owner);
}

std::string_view RdmaTransport::path() const noexcept {
  const Transport* tcp = tcp_ready_.load();
  return tcp != nullptr ? tcp->path() : "resp-rdma";
}

std::string RdmaTransport::fallback_reason() const {
  const std::string staged = destinations_->reason();
  std::lock_guard lock(mutex_);
  std::string reason = reason_;
  if (!staged.empty()) reason += (reason.empty() ? "" : "; ") + ("staged in host memory: " + staged);
  return reason;
}

std::string RdmaTransport::description() const {
  std::lock_guard lock(mutex_);
  return description_;
}

void RdmaTransport::prefer_card_near(const std::string& pci_address) {
  std::lock_guard lock(mutex_);
  if (near_.empty()) near_ = pci_address;
}

Status RdmaTransport::no_device_way() const {
  std::lock_guard lock(mutex_);
  return Status(ErrorCode::kNotSupported, reason_);
}

bool RdmaTransport::leaving() const {
  std::lock_guard lock(mutex_);
  return way_ == Way::kTcp;
}

void RdmaTransport::work() {
  name_this_thread("rdmaload-rdma");
  std::unique_ptr<Lane> lane;
  Deadline idle_until = Deadline::never();
  auto pause = kFirstPause;
  while (!queue_.stopped()) {
    const uint64_t wakes = queue_.wakes();  // before looking: whoever leaves wakes afterwards
    if (leaving()) {
      leave(lane, Status(ErrorCode::kUnavailable, "another connection found RDMA dead"));
      serve_over_tcp();
      break;
    }
    const bool is_idle = !lane || lane->idle();
    if (is_idle && !queue_.wait(lane ? idle_until : Deadline::never(), wakes)) {
      if (lane && idle_until.passed()) drop(lane, Status());
      continue;
    }
    if (is_idle && lane && !lane->suits(longest_read_.load())) drop(lane, Status());
    bool cancelled = false;
    try {
      if (!lane) {
        lane = connect();
        if (!lane) continue;
      }
      lane->take(queue_, static_cast<size_t>(options_.connections));
      if (!lane->idle()) lane->turn(kPoll);
      idle_until = Deadline::after(kIdleClose);
      pause = kFirstPause;
      if (lane->has_cancelled_reads()) {
        cancelled = true;
        throw Error(ErrorCode::kUnavailable, "closed because its reads were cancelled");
      }
    } catch (const std::exception& failure) {
      const Status status = status_of(failure);
      if (status.code() == ErrorCode::kCancelled && !lane) continue;
      const bool had_lane = lane != nullptr;
      const bool worked = had_lane && lane->completed_reads() > 0 && status.code() != ErrorCode::kTimeout;
      if (status.code() == ErrorCode::kDevice && has_other_lanes(had_lane)) {
        // No room for one more connection (locked memory, say): the others do this one's part.
        if (lane) drop(lane, Status(ErrorCode::kUnavailable, status.message()));
        wait_until_left();
        continue;
      }
      const bool is_dead = !cancelled && (had_lane ? is_of_the_way(status.code()) && !worked : true);
      if (is_dead && options_.fall_back) {
        {
          std::lock_guard lock(mutex_);
          if (way_ != Way::kTcp) {
            way_ = Way::kTcp;
            reason_ = (had_lane ? "RDMA was given up: " : "no RDMA: ") + status.message();
          }
        }
        changed_.notify_all();
        queue_.wake();
        leave(lane, status);
        continue;
      }
      if (had_lane) {
        drop(lane, status);
        continue;
      }
      // The error is some read's; the others wait out the pause with the worker.
      Read* next = queue_.try_pop();
      const auto until = Clock::now() + pause;
      while (!queue_.stopped() && (next == nullptr || !next->owner->cancelled()) && Clock::now() < until) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      pause = std::min(pause * 2, kLongestPause);
      if (next != nullptr) next->owner->complete(*next, status);
    }
  }
  if (lane) drop(lane, Status(ErrorCode::kCancelled, "the transport was closed"));
}

// A connection, or null when there is nothing to connect for any more. Until the way is proven only one
// worker tries.
std::unique_ptr<Lane> RdmaTransport::connect() {
  std::shared_ptr<ProtectionDomain> domain;
  {
    std::unique_lock lock(mutex_);
    while (way_ == Way::kUnproven && probing_) {
      changed_.wait_for(lock, kPoll);
      if (queue_.stopped()) return nullptr;
    }
    if (way_ == Way::kTcp) return nullptr;
    if (way_ == Way::kUnproven) probing_ = true;
    domain = domain_;
  }
  std::unique_ptr<Lane> lane;
  try {
    lane = open_lane(domain);
  } catch (...) {
    std::lock_guard lock(mutex_);
    probing_ = false;
    changed_.notify_all();
    throw;
  }
  std::lock_guard lock(mutex_);
  probing_ = false;
  changed_.notify_all();
  if (way_ == Way::kTcp) return nullptr;  // its memory was nobody's yet
  way_ = Way::kProven;
  ++lanes_;
  if (description_.empty()) description_ = lane->description();
  return lane;
}

std::unique_ptr<Lane> RdmaTransport::open_lane(const std::shared_ptr<ProtectionDomain>& domain) {
  if (!options_.fabric) throw Error(ErrorCode::kNotSupported, options_.fabric_reason);
  // Without reads that wait there is nothing to connect for.
  const GiveUp give_up = [this] { return queue_.stopped() || leaving() || queue_.empty(); };
  const uint64_t window = bulk_reply_bytes(longest_read_.load());
  if (window > kLongestWindow) {
    throw Error(ErrorCode::kNotSupported, options_.endpoint.name + ": values of " +
                                              std::to_string(longest_read_.load()) +
                                              " bytes are too long for a window of RDMA");
  }
  Remote remote;
  remote.host = options_.endpoint.host;
  remote.port = options_.endpoint.port;
  remote.device = options_.device;
  remote.domain = domain;
  {
    std::lock_guard lock(mutex_);
    remote.near = near_;
  }
  auto session = std::make_unique<Session>(*options_.fabric, options_.endpoint, remote,
                                           static_cast<uint32_t>(window), give_up);
  {
    std::lock_guard lock(mutex_);
    if (!domain_) domain_ = session->channel().domain();
  }
  const uint64_t share =
      std::max<uint64_t>(1, options_.bytes_in_flight / static_cast<uint64_t>(options_.connections));
  if (session->max_segments() == 0) return make_valkey_lane(std::move(session), destinations_, share);
  Sample sample;
  queue_.look_at_first([&](const Read& read) { sample = {read.object, read.object_bytes}; });
  session->test_direct_reads(sample, give_up);
  return make_direct_lane(std::move(session), destinations_, share);
}

bool RdmaTransport::has_other_lanes(bool has_one) const {
  std::lock_guard lock(mutex_);
  return lanes_ > (has_one ? 1 : 0);
}

// Until the transport is closed, or there is no lane any more that could do the work.
void RdmaTransport::wait_until_left() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return way_ == Way::kTcp || lanes_ == 0 || queue_.stopped(); });
}

// Ends a connection of a way that stays. Nothing can land through it before its reads are completed.
void RdmaTransport::drop(std::unique_ptr<Lane>& lane, const Status& status) {
  lane->close();
  lane->fail_all(status);
  lane.reset();
  std::lock_guard lock(mutex_);
  --lanes_;
  end_way_locked();
}

// The last one to leave a dead way takes back the server's rights, and only then is there another way.
void RdmaTransport::end_way_locked() {
  if (way_ == Way::kTcp && lanes_ == 0 && !revoked_) {
    destinations_->revoke();
    domain_.reset();
    tcp_ = options_.fall_back();
    tcp_ready_ = tcp_.get();
    revoked_ = true;
  }
  changed_.notify_all();
}

// Ends this worker's part of a way that is dead, and waits until everybody's is ended and all memory is
// deregistered. Only then are its reads completed: whoever gets them next may fill their memory.
void RdmaTransport::leave(std::unique_ptr<Lane>& lane, const Status& status) {
  if (lane) lane->close();
  {
    std::unique_lock lock(mutex_);
    if (lane) --lanes_;
    end_way_locked();
    changed_.wait(lock, [this] { return revoked_; });
  }
  // To be tried again, over TCP, whatever ended it here.
  if (lane) lane->fail_all(Status(ErrorCode::kUnavailable, status.message()));
  lane.reset();
}

// Reads that were queued for RDMA, some of them for later.
void RdmaTransport::serve_over_tcp() {
  while (Read* read = queue_.pop(Deadline::never())) {
    if (read->device_fill != nullptr) {
      read->owner->complete(*read, no_device_way());
    } else {
      tcp_->submit(*read);
    }
  }
}

}  // namespace rdmaload::rdma
