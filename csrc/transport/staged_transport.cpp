#include "transport/staged_transport.h"

#include <algorithm>
#include <cstring>

#include "core/crc32c.h"
#include "core/thread_name.h"
#include "transport/device_placement.h"
#include "transport/path_name.h"

namespace rdmaload {
namespace {

constexpr uint64_t kSlotAlignment = 4096;  // a page; no disk's blocks or addresses ask for more
constexpr size_t kMinSlots = 2;            // one is read while the other is copied
constexpr uint64_t kTablePart = 8;         // an eighth of a slot holds the table of its pieces

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

Status cancelled_status() { return Status(ErrorCode::kCancelled, "the read was cancelled"); }

}  // namespace

// Stands for one owner at the source, so that its reads can be cancelled there without those of others.
class StagedTransport::OwnerProxy final : public ReadOwner {
 public:
  OwnerProxy(StagedTransport& transport, const ReadOwner& owner) : transport_(transport), owner_(owner) {}
  void complete(Read& read, const Status& status) noexcept override;
  bool cancelled() const noexcept override { return transport_.stopping_ || owner_.cancelled(); }

 private:
  StagedTransport& transport_;
  const ReadOwner& owner_;  // alive while a read of it is outstanding
};

// One buffer of the ring, and the source's read into it. Used by one thread at a time.
struct StagedTransport::Slot : Read {
  Slot(const Device& device, size_t slot_number, std::byte* slot_memory)
      : number(slot_number), memory(slot_memory), event(device) {}
  const size_t number;
  std::byte* const memory;
  const Event event;
  std::byte* data = nullptr;  // the read's first byte, as far from a page's begin as in the object
  Read* outer = nullptr;
  std::shared_ptr<OwnerProxy> proxy;
  Status enqueue_status;
  bool checked_on_device = false;
  bool read_back = false;
  StagingTrace trace{};
  StagingCounters counters;  // of this read
};

void StagedTransport::OwnerProxy::complete(Read& read, const Status& status) noexcept {
  transport_.received(static_cast<Slot&>(read), status);
}

StagedTransport::StagedTransport(std::shared_ptr<Transport> source, Device& device, StagingOptions options)
    : source_(std::move(source)),
      device_(device),
      driver_(device.driver()),
      options_(options),
      stream_(device.copy_stream()),
      begin_(Clock::now()) {
  kernels_ = device_.kernels(&no_kernels_reason_);
  data_bytes_ = round_up(std::max<uint64_t>(options_.read_bytes, 1), kSlotAlignment) + kSlotAlignment;
  const uint64_t table_bytes = round_up(data_bytes_ / kTablePart, kSlotAlignment);
  table_entries_ =
      (table_bytes - sizeof(uint64_t)) / sizeof(ScatterPiece);  // the last word is for a checksum
  stride_ = data_bytes_ + table_bytes;
  may_use_block_ = kernels_ != nullptr && stride_ <= options_.block_bytes;
  if (options_.verify_device && kernels_ != nullptr && !may_use_block_) {
    throw Error(ErrorCode::kDevice, "verify_device needs " + std::to_string(stride_) +
                                        " bytes of device memory for reads of this length, and may use " +
                                        std::to_string(options_.block_bytes) + ": raise device_extra_bytes");
  }
  const uint64_t needed = options_.expected_bytes / options_.read_bytes + 1;
  const auto count =
      std::max<size_t>(kMinSlots, static_cast<size_t>(std::min(options_.staging_bytes / stride_, needed)));
  ring_ = PinnedPool::process().take(device_, count * stride_);
  const std::span<std::byte> ring = ring_->span();
  prepared_ = source_->prepare({&ring, 1});
  counters_.staging_bytes = count * stride_;
  slots_.reserve(count);
  idle_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    slots_.push_back(std::make_unique<Slot>(device_, i, ring_->span().data() + i * stride_));
    idle_.push_back(slots_.back().get());
  }
  reaper_ = std::thread([this] { reap(); });
}

StagedTransport::~StagedTransport() {
  stopping_ = true;
  std::vector<Read*> waiting;
  std::vector<std::shared_ptr<OwnerProxy>> proxies;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [priority, reads] : waiting_) {
      waiting.insert(waiting.end(), reads.begin(), reads.end());
    }
    for (const auto& [when, read] : delayed_) waiting.push_back(read);
    waiting_.clear();
    delayed_.clear();
    for (const auto& [owner, proxy] : proxies_) {
      if (auto alive = proxy.lock()) proxies.push_back(std::move(alive));
    }
  }
  for (Read* read : waiting) {
    read->owner->complete(*read, cancelled_status());
    std::lock_guard lock(mutex_);
    --outstanding_;
  }
  for (const auto& proxy : proxies) source_->cancel(*proxy);
  {
    std::unique_lock lock(mutex_);
    quiet_.wait(lock, [this] { return outstanding_ == 0; });
    reaper_stops_ = true;
    enqueued_.notify_all();
  }
  reaper_.join();
}

void StagedTransport::submit(Read& read, Clock::time_point not_before) {
  Status refused;
  Slot* slot = nullptr;
  {
    std::lock_guard lock(mutex_);
    if (stopping_) {
      refused = cancelled_status();
    } else if (read.length > options_.read_bytes) {
      refused = Status(ErrorCode::kInvalid, "a read of " + std::to_string(read.length) +
                                                " bytes is longer than a staging buffer (" +
                                                std::to_string(options_.read_bytes) + ")");
    } else {
      ++outstanding_;
      if (not_before > Clock::now()) {
        delayed_.emplace(not_before, &read);
        enqueued_.notify_one();
      } else {
        slot = take_slot_locked(read);
        if (slot == nullptr) waiting_[read.priority].push_back(&read);
      }
    }
  }
  if (!refused.ok()) {
    read.owner->complete(read, refused);
  } else if (slot != nullptr) {
    source_->submit(*slot);
  }
}

// An idle buffer, made ready to be read into for `read`; nullptr when all are in use.
StagedTransport::Slot* StagedTransport::take_slot_locked(Read& read) {
  if (idle_.empty()) return nullptr;
  Slot* slot = idle_.back();
  idle_.pop_back();
  slot->object = read.object;
  slot->offset = read.offset;
  slot->length = read.length;
  slot->object_bytes = read.object_bytes;
  // Dropped bytes are received too: one vector for the socket, one block for the device.
  slot->data = slot->memory + read.offset % kSlotAlignment;
  slot->segments.assign(1, {slot->data, read.length});
  slot->memory_owner = ring_;
  slot->checksum = read.checksum || options_.verify_device;
  slot->digest_kind = read.digest_kind;
  slot->priority = read.priority;
  slot->proxy = proxy_locked(*read.owner);
  slot->owner = slot->proxy.get();
  slot->outer = &read;
  slot->enqueue_status = Status();
  slot->checked_on_device = false;
  slot->read_back = false;
  slot->counters = {};
  slot->trace = {Clock::now() - begin_, {}, {}, read.length};
  return slot;
}

// An idle buffer for the first read that waits for one; nullptr without either.
StagedTransport::Slot* StagedTransport::next_slot_locked() {
  if (waiting_.empty() || idle_.empty()) return nullptr;
  const auto first = waiting_.begin();
  Read* read = first->second.front();
  first->second.pop_front();
  if (first->second.empty()) waiting_.erase(first);
  return take_slot_locked(*read);
}

std::shared_ptr<StagedTransport::OwnerProxy> StagedTransport::proxy_locked(const ReadOwner& owner) {
  std::weak_ptr<OwnerProxy>& known = proxies_[&owner];
  std::shared_ptr<OwnerProxy> proxy = known.lock();
  if (!proxy) {
    std::erase_if(proxies_,
                  [&](const auto& entry) { return entry.first != &owner && entry.second.expired(); });
    proxy = std::make_shared<OwnerProxy>(*this, owner);
    known = proxy;
  }
  return proxy;
}

void StagedTransport::cancel(const ReadOwner& owner) {
  std::vector<Read*> removed;
  std::shared_ptr<OwnerProxy> proxy;
  {
    std::lock_guard lock(mutex_);
    for (auto& [priority, reads] : waiting_) {
      std::erase_if(reads, [&](Read* read) {
        if (read->owner != &owner) return false;
        removed.push_back(read);
        return true;
      });
    }
    std::erase_if(waiting_, [](const auto& entry) { return entry.second.empty(); });
    std::erase_if(delayed_, [&](const auto& entry) {
      if (entry.second->owner != &owner) return false;
      removed.push_back(entry.second);
      return true;
    });
    if (const auto found = proxies_.find(&owner); found != proxies_.end()) proxy = found->second.lock();
  }
  for (Read* read : removed) {
    read->owner->complete(*read, cancelled_status());
    std::lock_guard lock(mutex_);
    --outstanding_;
    quiet_.notify_all();
  }
  if (proxy) source_->cancel(*proxy);
}

void StagedTransport::follow(cuda::Stream consumer) { order_streams(device_, consumer, stream_); }

void StagedTransport::lead(cuda::Stream consumer) { order_streams(device_, stream_, consumer); }

StagingCounters StagedTransport::counters() const {
  std::lock_guard lock(mutex_);
  return counters_;
}

std::vector<StagingTrace> StagedTransport::trace() const {
  std::lock_guard lock(mutex_);
  return trace_;
}

// The source has ended its read, on a thread of its own.
void StagedTransport::received(Slot& slot, const Status& status) noexcept {
  slot.times.received = Clock::now();
  slot.trace.received = slot.times.received - begin_;
  if (!status.ok()) return finish(slot, status);
  if (slot.proxy->cancelled()) return finish(slot, cancelled_status());
  std::optional<DeviceGuard> guard;
  try {
    guard.emplace(device_);
  } catch (const Error& error) {  // nothing was enqueued
    return finish(slot, Status::from(error));
  }
  try {
    slot.enqueue_status = enqueue(slot);
  } catch (const std::exception& error) {  // no memory
    slot.enqueue_status = Status(ErrorCode::kDevice, error.what());
  }
  // Also after a failure: some of the copies may be on their way.
  const Status recorded = slot.event.record(stream_);
  if (!recorded.ok()) {
    driver_.stream_synchronize(stream_);
    return finish(slot, slot.enqueue_status.ok() ? recorded : slot.enqueue_status);
  }
  std::lock_guard lock(mutex_);
  copying_.push_back(&slot);
  enqueued_.notify_one();
}

Status StagedTransport::enqueue(Slot& slot) {
  const std::vector<Segment>& pieces = slot.outer->segments;
  const bool check = options_.verify_device;
  const bool many = wanted_pieces(pieces) >= options_.scatter_pieces;
  if (many && kernels_ == nullptr) missed_kernels_ = true;
  if (may_use_block_ && (check || many)) {
    std::lock_guard lock(block_mutex_);
    const Status made = make_block();
    if (made.ok()) return place(slot, check);
    if (check) return made;  // else, without room for a block, piece by piece
  }
  uint64_t at = 0;
  for (const Segment& piece : pieces) {
    if (piece.data != nullptr && piece.size > 0) {
      const cuda::Result result = driver_.copy_to_device(reinterpret_cast<cuda::Pointer>(piece.data),
                                                         slot.data + at, piece.size, stream_);
      if (result != cuda::kSuccess) return driver_.status("cuMemcpyHtoDAsync", result);
      ++slot.counters.copies;
      slot.counters.copied_bytes += piece.size;
    }
    at += piece.size;
  }
  return check ? read_back(slot) : Status();
}

// Without kernels: what lies at the destinations, back over what was sent there, for its checksum to be
// compared.
Status StagedTransport::read_back(Slot& slot) {
  uint64_t at = 0;
  for (const Segment& piece : slot.outer->segments) {
    if (piece.data != nullptr && piece.size > 0) {
      const cuda::Result result = driver_.copy_to_host(
          slot.data + at, reinterpret_cast<cuda::Pointer>(piece.data), piece.size, stream_);
      if (result != cuda::kSuccess) return driver_.status("cuMemcpyDtoHAsync", result);
    }
    at += piece.size;
  }
  slot.checked_on_device = slot.read_back = true;
  return Status();
}

// The whole read as one block; kernels do the rest on the device.
Status StagedTransport::place(Slot& slot, bool check) {
  const uint64_t crc_offset = stride_ - sizeof(uint64_t);
  const cuda::Pointer block = block_->data();
  ++slot.counters.copies;
  slot.counters.copied_bytes += slot.length;
  Status status =
      driver_.status("cuMemcpyHtoDAsync", driver_.copy_to_device(block, slot.data, slot.length, stream_));
  if (!status.ok()) return status;
  PlacementCounters placed;
  status = place_pieces(driver_, kernels_, *slot.outer,
                        {block, block + data_bytes_, slot.memory + data_bytes_, table_entries_,
                         block + crc_offset, slot.memory + crc_offset},
                        check, 1, stream_, placed);
  slot.counters.copies += placed.copies;
  slot.counters.scattered_pieces += placed.scattered_pieces;
  slot.checked_on_device = check && status.ok();
  return status;
}

// With block_mutex_ held.
Status StagedTransport::make_block() {
  if (!block_tried_) {
    block_tried_ = true;
    try {
      block_.emplace(device_, stride_);
      std::lock_guard lock(mutex_);
      counters_.device_bytes = block_->size();
    } catch (const Error& error) {
      block_status_ = Status::from(error);
    }
  }
  return block_status_;
}

std::string_view StagedTransport::path() const noexcept {
  return kept_path_name(std::string(source_->path()) + "+staged-gpu");
}

std::string StagedTransport::fallback_reason() const {
  std::string reason = source_->fallback_reason();
  if (reason.empty() && options_.verify_device && kernels_ == nullptr) {
    reason = "verify_device reads back what it copied to the GPU: " + no_kernels_reason_;
  } else if (reason.empty() && missed_kernels_) {
    reason = "small tensors were copied to the GPU one by one: " + no_kernels_reason_;
  }
  return reason;
}

// Waits for the slot's copies, and says what became of them.
Status StagedTransport::quiet(Slot& slot) const {
  Status status = slot.event.synchronize();
  // An error of the wait says nothing about the copies. When this fails too, the context is lost and nothing
  // runs.
  if (!status.ok()) driver_.stream_synchronize(stream_);
  if (!slot.enqueue_status.ok()) return slot.enqueue_status;
  if (!status.ok() || !slot.checked_on_device) return status;
  uint32_t seen = 0;
  if (slot.read_back) {
    seen = crc32c(0, {slot.data, slot.length});
  } else {
    std::memcpy(&seen, slot.memory + stride_ - sizeof(uint64_t), sizeof(seen));
  }
  if (seen == slot.crc) return status;
  return Status(ErrorCode::kIntegrity, "'" + slot.object +
                                           "' arrived on cuda:" + std::to_string(device_.ordinal()) +
                                           " with other bytes than it had in host memory");
}

void StagedTransport::finish(Slot& slot, Status status) noexcept {
  Read& outer = *slot.outer;
  outer.crc = slot.crc;
  outer.digest = slot.digest;
  outer.copied_bytes = slot.copied_bytes;
  outer.cached_bytes = slot.cached_bytes;
  outer.checksum_time = slot.checksum_time;
  outer.times = slot.times;
  slot.trace.copied = Clock::now() - begin_;
  Slot* next = nullptr;
  {
    std::lock_guard lock(mutex_);
    counters_.copied_bytes += slot.counters.copied_bytes;
    counters_.copies += slot.counters.copies;
    counters_.scattered_pieces += slot.counters.scattered_pieces;
    if (slot.checked_on_device && status.ok()) counters_.verified_bytes += slot.length;
    if (options_.trace && status.ok()) trace_.push_back(slot.trace);
    slot.proxy.reset();
    if (const auto known = proxies_.find(outer.owner); known != proxies_.end() && known->second.expired()) {
      proxies_.erase(known);
    }
    idle_.push_back(&slot);
    next = next_slot_locked();
  }
  if (next != nullptr) source_->submit(*next);  // first, so that the source never pauses
  outer.owner->complete(outer, status);
  std::lock_guard lock(mutex_);
  --outstanding_;
  quiet_.notify_all();  // under the lock: the destructor goes on right after
}

// Gives buffers back in the order in which their copies were enqueued, and lets reads begin whose time has
// come.
void StagedTransport::reap() {
  name_this_thread("rdmaload-copy");
  // Current for the thread's life. Without a context nothing runs in it, so there is nothing to wait for
  // either.
  std::optional<DeviceGuard> guard;
  Status lost;
  try {
    guard.emplace(device_);
  } catch (const Error& error) {
    lost = Status::from(error);
  }
  std::unique_lock lock(mutex_);
  for (;;) {
    while (!delayed_.empty() && delayed_.begin()->first <= Clock::now()) {
      Read* read = delayed_.begin()->second;
      delayed_.erase(delayed_.begin());
      waiting_[read->priority].push_back(read);
    }
    if (Slot* next = next_slot_locked(); next != nullptr) {
      lock.unlock();
      source_->submit(*next);
      lock.lock();
      continue;
    }
    if (copying_.empty()) {
      if (reaper_stops_) return;
      if (delayed_.empty()) {
        enqueued_.wait(lock);
      } else {
        enqueued_.wait_until(lock, Clock::time_point(delayed_.begin()->first));  // a copy: the entry may go
      }
      continue;
    }
    Slot* slot = copying_.front();
    copying_.pop_front();
    lock.unlock();
    finish(*slot, guard ? quiet(*slot) : lost);
    lock.lock();
  }
}

}  // namespace rdmaload
