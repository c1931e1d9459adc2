#include "transport/rdma/device_transport.h"

#include <algorithm>
#include <utility>

#include "core/crc32c.h"
#include "core/thread_name.h"
#include "device/gpudirect.h"
#include "transport/path_name.h"

namespace rdmaload::rdma {
namespace {

// Checksums that are computed before the host waits for them.
constexpr size_t kWords = 1024;
// How often a gate is looked at that is not open: events cannot wake a thread that waits for other things
// too. A consumer that is busy for longer is asked less and less often.
constexpr std::chrono::microseconds kFirstLook{50};
constexpr std::chrono::microseconds kLastLook{1000};

Status cancelled_status() { return Status(ErrorCode::kCancelled, "the read was cancelled"); }

}  // namespace

// Stands for one owner at the network's transport, so that its reads can be cancelled there.
class DeviceTransport::OwnerProxy final : public ReadOwner {
 public:
  OwnerProxy(DeviceTransport& transport, const ReadOwner& owner) : transport_(transport), owner_(owner) {}
  void complete(Read& read, const Status& status) noexcept override;
  bool cancelled() const noexcept override { return transport_.stopping_ || owner_.cancelled(); }
  // cancel() came for it. Unlike cancelled(), to be asked when its reads may be done and the owner gone.
  bool was_given_up() const noexcept { return transport_.stopping_ || given_up_; }
  void give_up() noexcept { given_up_ = true; }

 private:
  DeviceTransport& transport_;
  const ReadOwner& owner_;  // alive while a read of it is outstanding
  std::atomic<bool> given_up_{false};
};

// The network's read for one of ours.
struct DeviceTransport::Entry : Read {
  Read* outer = nullptr;
  DeviceFill fill;
  std::shared_ptr<OwnerProxy> proxy;
  uint64_t gate = 0;  // to wait for; 0: none
  Clock::time_point not_before;
};

void DeviceTransport::OwnerProxy::complete(Read& read, const Status& status) noexcept {
  transport_.arrived(static_cast<Entry&>(read), status);
}

DeviceTransport::DeviceTransport(std::shared_ptr<RdmaTransport> network,
                                 std::shared_ptr<StagedTransport> staged, Device& device, bool verify_device)
    : network_(std::move(network)),
      staged_(std::move(staged)),
      device_(device),
      driver_(device.driver()),
      verify_device_(verify_device),
      kernels_(device.kernels(&no_kernels_reason_)),
      stream_(device),
      event_(device),
      words_(device, kWords * sizeof(uint32_t)),
      host_words_(PinnedPool::process().take(device, kWords * sizeof(uint32_t))) {
  flush_gpudirect(device_);  // so that it is known now when it cannot be done
  network_->prefer_card_near(pci_address(device_));
  thread_ = std::thread([this] { work(); });
}

DeviceTransport::~DeviceTransport() {
  stopping_ = true;
  std::deque<std::unique_ptr<Entry>> waiting;
  std::vector<std::shared_ptr<OwnerProxy>> proxies;
  {
    std::lock_guard lock(mutex_);
    waiting.swap(waiting_);
    for (const auto& [owner, proxy] : proxies_) {
      if (auto alive = proxy.lock()) proxies.push_back(std::move(alive));
    }
  }
  for (auto& entry : waiting) complete(std::move(entry), cancelled_status());
  for (const auto& proxy : proxies) network_->cancel(*proxy);
  proxies.clear();
  {
    std::unique_lock lock(mutex_);
    quiet_.wait(lock, [this] { return outstanding_ == 0; });
    changed_.notify_all();
  }
  thread_.join();
}

std::shared_ptr<DeviceTransport::OwnerProxy> DeviceTransport::proxy_locked(const ReadOwner& owner) {
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

void DeviceTransport::submit(Read& read, Clock::time_point not_before) {
  Entry* begin = nullptr;
  bool refused = false;
  const bool blind = verify_device_ && !read.checksum;
  const bool staged = network_->has_left_rdma() || blind || (read.checksum && kernels_ == nullptr);
  {
    std::lock_guard lock(mutex_);
    refused = stopping_;
    if (!refused && !staged) {
      auto entry = std::make_unique<Entry>();
      static_cast<Read&>(*entry) = read;
      entry->outer = &read;
      entry->proxy = proxy_locked(*read.owner);
      entry->owner = entry->proxy.get();
      entry->device_fill = &entry->fill;
      entry->not_before = not_before;
      ++outstanding_;
      if (gates_.empty()) {
        begin = entry.get();
        with_network_.emplace(begin, std::move(entry));
      } else {
        entry->gate = last_gate_;
        waiting_.push_back(std::move(entry));
        changed_.notify_all();
      }
    }
    if (!refused && staged && !network_->has_left_rdma() && refusal_.empty()) {
      refusal_ = "GPU memory was filled through page-locked memory: ";
      refusal_ += blind ? "verify_device has no stored checksum to compare with that of what a card wrote"
                        : "no kernels to verify it there: " + no_kernels_reason_;
    }
  }
  if (refused) {
    read.owner->complete(read, cancelled_status());
  } else if (staged) {
    handed_on_ = true;
    staged_->submit(read, not_before);
  } else if (begin != nullptr) {
    network_->submit(*begin, not_before);
  }
}

void DeviceTransport::cancel(const ReadOwner& owner) {
  std::vector<std::unique_ptr<Entry>> removed;
  std::shared_ptr<OwnerProxy> proxy;
  {
    std::lock_guard lock(mutex_);
    for (auto& entry : waiting_) {
      if (entry->outer->owner == &owner) removed.push_back(std::move(entry));
    }
    std::erase(waiting_, nullptr);
    if (const auto found = proxies_.find(&owner); found != proxies_.end()) {
      proxy = found->second.lock();
      proxies_.erase(found);  // another owner may get its address
    }
    if (proxy) proxy->give_up();
  }
  for (auto& entry : removed) complete(std::move(entry), cancelled_status());
  if (proxy) network_->cancel(*proxy);
  staged_->cancel(owner);
}

std::shared_ptr<void> DeviceTransport::prepare(std::span<const std::span<std::byte>> destinations) {
  return network_->prepare(device_, destinations);
}

std::string_view DeviceTransport::path() const noexcept {
  if (!used_direct_) return staged_->path();
  if (!handed_on_) return "resp-rdma+direct-gpu";
  return kept_path_name("resp-rdma+direct-gpu+" + std::string(staged_->path()));
}

std::string DeviceTransport::fallback_reason() const {
  std::string reason = network_->fallback_reason();
  std::lock_guard lock(mutex_);
  if (!refusal_.empty()) reason += (reason.empty() ? "" : "; ") + refusal_;
  return reason;
}

void DeviceTransport::follow(cuda::Stream consumer) {
  const DeviceGuard guard(device_);
  Event event(device_);
  const Status recorded = event.record(consumer);
  if (!recorded.ok()) throw Error(recorded.code(), recorded.message());
  std::lock_guard lock(mutex_);
  gates_.push_back({std::move(event), ++last_gate_});
  changed_.notify_all();
}

// Forgets the gates that are open. An error is of the device: they never open.
Status DeviceTransport::open_gates_locked() {
  while (!gates_.empty()) {
    const cuda::Result result = gates_.front().event.query();
    if (result == cuda::kNotReady) break;
    if (result != cuda::kSuccess) return driver_.status("cuEventQuery", result);
    gates_.pop_front();
  }
  return Status();
}

// The network has ended its read, on a thread of its own.
void DeviceTransport::arrived(Entry& read, const Status& status) noexcept {
  std::unique_ptr<Entry> entry;
  {
    std::lock_guard lock(mutex_);
    const auto found = with_network_.find(&read);
    entry = std::move(found->second);
    with_network_.erase(found);
    if (status.ok()) {
      arrived_.push_back(std::move(entry));
      changed_.notify_all();
      return;
    }
    if (status.code() == ErrorCode::kNotSupported && !network_->has_left_rdma() && refusal_.empty()) {
      refusal_ = "GPU memory was filled through page-locked memory: " + status.message();
    }
  }
  if (status.code() == ErrorCode::kNotSupported && !entry->proxy->cancelled()) {
    hand_on(std::move(entry));
  } else {
    complete(std::move(entry), status);
  }
}

void DeviceTransport::hand_on(std::unique_ptr<Entry> entry) noexcept {
  handed_on_ = true;
  Read& outer = *entry->outer;
  entry.reset();
  staged_->submit(outer);
  std::lock_guard lock(mutex_);
  --outstanding_;
  quiet_.notify_all();  // under the lock: the destructor goes on right after
}

void DeviceTransport::complete(std::unique_ptr<Entry> entry, const Status& status) noexcept {
  Read& outer = *entry->outer;
  outer.crc = entry->crc;
  outer.copied_bytes = entry->copied_bytes;
  outer.checksum_time = entry->checksum_time;
  outer.times = entry->times;
  entry.reset();
  outer.owner->complete(outer, status);
  std::lock_guard lock(mutex_);
  --outstanding_;
  quiet_.notify_all();
}

void DeviceTransport::work() {
  name_this_thread("rdmaload-gpu");
  // Current for the thread's life. Without a context nothing runs in it.
  std::optional<DeviceGuard> guard;
  Status lost;
  try {
    guard.emplace(device_);
  } catch (const Error& error) {
    lost = Status::from(error);
  }
  auto look = kFirstLook;
  std::unique_lock lock(mutex_);
  for (;;) {
    const Status gates = guard ? open_gates_locked() : lost;
    std::vector<std::unique_ptr<Entry>> begin, failed;
    while (!waiting_.empty() &&
           (!gates.ok() || gates_.empty() || waiting_.front()->gate < gates_.front().number)) {
      (gates.ok() ? begin : failed).push_back(std::move(waiting_.front()));
      waiting_.pop_front();
    }
    std::vector<std::pair<Entry*, std::shared_ptr<OwnerProxy>>> begun;
    for (auto& entry : begin) {
      Entry* const raw = entry.get();
      begun.emplace_back(raw, raw->proxy);
      with_network_.emplace(raw, std::move(entry));
    }
    std::vector<std::unique_ptr<Entry>> arrived;
    arrived.swap(arrived_);
    if (!begun.empty() || !failed.empty() || !arrived.empty()) {
      look = kFirstLook;
      lock.unlock();
      for (const auto& [entry, proxy] : begun) {
        network_->submit(*entry, entry->not_before);
        if (proxy->was_given_up()) network_->cancel(*proxy);  // whoever cancelled may have come before
      }
      begun.clear();
      for (auto& entry : failed) complete(std::move(entry), gates);
      if (guard) {
        verify(std::move(arrived));
      } else {
        for (auto& entry : arrived) complete(std::move(entry), lost);
      }
      lock.lock();
      continue;
    }
    if (stopping_ && outstanding_ == 0) return;
    if (waiting_.empty()) {
      changed_.wait(lock);
      look = kFirstLook;
    } else {
      changed_.wait_for(lock, look);
      look = std::min(2 * look, kLastLook);
    }
  }
}

// Of reads whose last byte the card has written: makes that visible, computes their checksums, completes
// them.
void DeviceTransport::verify(std::vector<std::unique_ptr<Entry>> entries) noexcept {
  if (entries.empty()) return;
  Status status;
  try {
    flush_gpudirect(device_);
    status = compute_checksums(entries);
  } catch (const Error& error) {
    status = Status::from(error);
  } catch (const std::exception& error) {
    status = Status(ErrorCode::kDevice, error.what());
  }
  if (status.ok()) used_direct_ = true;
  for (auto& entry : entries) complete(std::move(entry), status);
}

Status DeviceTransport::compute_checksums(const std::vector<std::unique_ptr<Entry>>& entries) {
  std::vector<Segment> pieces;
  for (const auto& entry : entries) {
    if (!entry->checksum) continue;
    for (const Segment& segment : entry->segments) {
      if (segment.data != nullptr && segment.size > 0) pieces.push_back(segment);
    }
  }
  std::vector<uint32_t> crcs(pieces.size());
  const auto* words = reinterpret_cast<const uint32_t*>(host_words_->span().data());
  for (size_t first = 0; first < pieces.size(); first += kWords) {
    const size_t count = std::min(kWords, pieces.size() - first);
    Status status =
        driver_.status("cuMemsetD32Async", driver_.fill_words(words_.data(), 0, count, stream_.handle()));
    for (size_t i = 0; i < count && status.ok(); ++i) {
      const Segment& piece = pieces[first + i];
      status = kernels_->crc32c(reinterpret_cast<cuda::Pointer>(piece.data), piece.size,
                                words_.data() + i * sizeof(uint32_t), stream_.handle());
    }
    if (status.ok()) {
      status = driver_.status("cuMemcpyDtoHAsync",
                              driver_.copy_to_host(host_words_->span().data(), words_.data(),
                                                   count * sizeof(uint32_t), stream_.handle()));
    }
    if (status.ok()) status = event_.record(stream_.handle());
    if (status.ok()) status = event_.synchronize();
    if (!status.ok()) {
      driver_.stream_synchronize(stream_.handle());  // nothing may read destinations or write words later
      return status;
    }
    std::copy_n(words, count, crcs.begin() + static_cast<ptrdiff_t>(first));
  }
  auto next = crcs.begin();
  for (const auto& entry : entries) {
    if (!entry->checksum) continue;
    auto next_dropped = entry->fill.dropped_crcs.begin();
    entry->crc = 0;
    verified_bytes_ += entry->length;
    for (const Segment& segment : entry->segments) {
      if (segment.size == 0) continue;
      entry->crc =
          crc32c_combine(entry->crc, segment.data == nullptr ? *next_dropped++ : *next++, segment.size);
    }
  }
  return Status();
}

}  // namespace rdmaload::rdma
