#include "loader/load.h"

#include <algorithm>
#include <cstdio>

namespace rdmaload {
namespace {

constexpr std::chrono::milliseconds kFirstBackoff{20};
constexpr std::chrono::milliseconds kLongestBackoff{2000};

// Loads that share a transport are served in the order in which they were made, so that the first is done
// first.
std::atomic<uint64_t> next_sequence{0};

std::string hex(uint32_t value) {
  char text[11];
  std::snprintf(text, sizeof(text), "0x%08x", value);
  return text;
}

}  // namespace

Load::Load(std::shared_ptr<Transport> transport, std::shared_ptr<const StoreLayout> layout,
           std::shared_ptr<const LoadPlan> plan, std::vector<Region> regions, LoadOptions options)
    : transport_(std::move(transport)),
      layout_(std::move(layout)),
      plan_(std::move(plan)),
      regions_(std::move(regions)),
      options_(options),
      working_(static_cast<size_t>(std::max(1, transport_->connections()))),
      sequence_(next_sequence.fetch_add(1)),
      read_done_(plan_->reads.size()),
      started_(Clock::now()),
      last_progress_(started_),
      finished_(started_),
      random_(std::random_device{}()) {
  if (regions_.size() != plan_->region_bytes.size()) {
    throw Error(ErrorCode::kInvalid, "the plan has " + std::to_string(plan_->region_bytes.size()) +
                                         " destination regions, given were " +
                                         std::to_string(regions_.size()));
  }
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (regions_[i].memory.size() < plan_->region_bytes[i]) {
      throw Error(ErrorCode::kInvalid, "destination " + std::to_string(i) + " has " +
                                           std::to_string(regions_[i].memory.size()) + " bytes, needed are " +
                                           std::to_string(plan_->region_bytes[i]));
    }
  }
  std::vector<std::span<std::byte>> destinations;
  destinations.reserve(regions_.size());
  for (const Region& region : regions_) destinations.push_back(region.memory);
  prepared_ = transport_->prepare(destinations);
}

Load::~Load() {
  cancel();
  wait(Deadline::never());
}

void Load::start() {
  {
    std::lock_guard lock(mutex_);
    started_ = last_progress_ = finished_ = Clock::now();
  }
  for (;;) {
    Slot* slot = nullptr;
    {
      std::lock_guard lock(mutex_);
      slot = next_slot_locked();
    }
    if (slot == nullptr) return;
    transport_->submit(*slot);
  }
}

// The next read of the plan, counted as outstanding, when there is one and the bounds allow it.
Load::Slot* Load::next_slot_locked() {
  if (next_read_ == plan_->reads.size() || !first_error_.ok() || cancelled()) return nullptr;
  const PlannedRead& planned = plan_->reads[next_read_];
  // As many reads as the transport works on at once, whatever their size.
  if (outstanding_ >= working_ && (outstanding_ >= options_.queued_reads ||
                                   outstanding_bytes_ + planned.length > options_.queued_bytes)) {
    return nullptr;
  }
  if (idle_slots_.empty()) {
    slots_.push_back(std::make_unique<Slot>());
    idle_slots_.push_back(slots_.back().get());
    idle_slots_.reserve(slots_.capacity());
  }
  Slot* slot = idle_slots_.back();
  idle_slots_.pop_back();
  ++next_read_;
  ++outstanding_;
  outstanding_bytes_ += planned.length;
  prepare(*slot, planned);
  return slot;
}

void Load::prepare(Slot& slot, const PlannedRead& planned) {
  slot.object = plan_->object_name(*layout_, planned);
  slot.offset = planned.offset;
  slot.length = planned.length;
  const StoredFile& stored = layout_->files[planned.file];
  slot.object_bytes = stored.bytes;
  if (layout_->object_per_chunk) {
    slot.object_bytes = std::min(layout_->chunk_bytes, stored.bytes - planned.chunk * layout_->chunk_bytes);
  }
  slot.segments.clear();
  slot.memory_owner = nullptr;
  for (uint32_t i = 0; i < planned.segment_count; ++i) {
    const PlannedSegment& segment = plan_->segments[planned.first_segment + i];
    if (segment.region == kDropped) {
      slot.segments.push_back({nullptr, segment.size});
    } else {
      const Region& region = regions_[segment.region];
      slot.segments.push_back({region.memory.data() + segment.offset, segment.size});
      if (planned.segment_count == 1) slot.memory_owner = region.owner;
    }
  }
  slot.checksum = options_.verify && planned.crc.has_value();
  slot.digest_kind = CrcKind::kNone;
  if (options_.verify && !slot.checksum && !layout_->digests.empty() && transport_->keeps_digests()) {
    slot.digest_kind = layout_->digests[planned.file];
  }
  slot.priority = sequence_;
  slot.owner = this;
  slot.planned = &planned;
  slot.attempts = 0;
  slot.failures_in_a_row = 0;
  slot.integrity_failures = 0;
  slot.received = slot.received_before = 0;
  slot.retry_after = {};
  slot.reissues = 0;
  slot.submitted = Clock::now();
  slot.times = {};
  slot.cached_bytes = 0;
}

// What a finished attempt amounts to: the transport's status, or a checksum that does not fit.
Status Load::verdict(Slot& slot, const Status& status) const {
  if (!status.ok() || !slot.checksum || slot.crc == *slot.planned->crc) return status;
  return Status(ErrorCode::kIntegrity,
                "chunk " + std::to_string(slot.planned->chunk) + " ('" + slot.object + "') has CRC32C " +
                    hex(slot.crc) + ", the index says " + hex(*slot.planned->crc) +
                    ": what the store holds is damaged, or was changed after the save; "
                    "save the model again");
}

void Load::complete(Read& read, const Status& transport_status) noexcept {
  Slot& slot = static_cast<Slot&>(read);
  const Status status = verdict(slot, transport_status);
  Slot* next[2] = {nullptr,
                   nullptr};  // one read done makes room for one; two where a large one was in the way
  Clock::time_point not_before = Clock::time_point::min();
  {
    std::lock_guard lock(mutex_);
    ++slot.attempts;
    counters_.copied_bytes += slot.copied_bytes;
    counters_.checksum_time += slot.checksum_time;
    counters_.retries += slot.reissues;
    if (options_.trace) {
      trace_.push_back({slot.submitted, slot.times, Clock::now(), slot.checksum_time, slot.planned->file,
                        slot.offset, slot.length, slot.attempts, status.ok()});
    }
    if (slot.received > slot.received_before) {
      last_progress_ = Clock::now();
      slot.failures_in_a_row = 0;
    }
    ++slot.failures_in_a_row;
    if (!status.ok() && may_retry_locked(slot, status)) {
      ++counters_.retries;
      not_before = std::max(backoff_locked(slot.failures_in_a_row), Clock::now() + slot.retry_after);
      const bool keep = status.code() == ErrorCode::kUnavailable || status.code() == ErrorCode::kTimeout;
      if (!keep) slot.received = 0;  // some of it is wrong
      slot.received_before = slot.received;
      slot.submitted = not_before;  // it waits on purpose until then
      slot.times = {};
      next[0] = &slot;
    } else {
      if (status.ok()) {
        read_done_[static_cast<size_t>(slot.planned - plan_->reads.data())] = true;
        counters_.done_bytes += slot.length;
        counters_.cached_bytes += slot.cached_bytes;
        if (slot.digest_kind != CrcKind::kNone) {
          digests_.push_back({slot.planned->file, slot.offset, slot.length, slot.digest});
        }
        (slot.checksum ? counters_.verified_bytes : counters_.unverified_bytes) += slot.length;
        last_progress_ = Clock::now();
      } else {
        fail_locked(Status(status.code(), status.message() + " (offset " + std::to_string(slot.offset) +
                                              ", " + std::to_string(slot.length) + " bytes, attempt " +
                                              std::to_string(slot.attempts) + ")"),
                    slot.object);
      }
      --outstanding_;
      outstanding_bytes_ -= slot.length;
      slot.memory_owner = nullptr;
      idle_slots_.push_back(&slot);
      next[0] = next_slot_locked();
      if (next[0] != nullptr) next[1] = next_slot_locked();
      if (outstanding_ == 0) {
        finished_ = Clock::now();
        ended_.notify_all();  // under the lock: the waiter may destroy this object right after
      }
    }
  }
  if (next[0] == nullptr) return;
  transport_->submit(*next[0], not_before);
  if (next[1] != nullptr) transport_->submit(*next[1]);
}

bool Load::may_retry_locked(Slot& slot, const Status& status) {
  if (cancelled() || !first_error_.ok()) return false;
  switch (status.code()) {
    case ErrorCode::kUnavailable:
    case ErrorCode::kTimeout:
      // The time since something last arrived, but not the time that this read waited behind other loads: it
      // is tried again at least once.
      if (slot.attempts == 1) slot.first_failure = Clock::now();
      return Clock::now() - std::max(last_progress_, slot.first_failure) < options_.retry_timeout;
    case ErrorCode::kIntegrity:
    case ErrorCode::kFormat:  // garbage on the wire; a server that means it says so again
      return ++slot.integrity_failures < options_.max_integrity_attempts;
    default:
      return false;
  }
}

// Doubles from attempt to attempt that brought nothing; a random half of it keeps the readers of many ranks
// from coming back in step.
Clock::time_point Load::backoff_locked(int failures) {
  const auto full = std::min(kLongestBackoff, kFirstBackoff * (1 << std::min(failures - 1, 10)));
  const auto half = std::chrono::duration_cast<std::chrono::microseconds>(full) / 2;
  return Clock::now() + half + std::chrono::microseconds(random_() % (half.count() + 1));
}

void Load::fail_locked(const Status& status, const std::string& object) {
  if (!first_error_.ok()) return;  // the first error wins
  first_error_ = status;
  failed_object_ = object;
  cancelled_.store(true, std::memory_order_relaxed);  // the others give up at their next piece
}

bool Load::wait(Deadline until) {
  const auto done = [this] {
    return outstanding_ == 0 && (next_read_ == plan_->reads.size() || !first_error_.ok() || cancelled());
  };
  std::unique_lock lock(mutex_);
  const auto total_when = Deadline::after(options_.timeout).when() == Clock::time_point::max()
                              ? Clock::time_point::max()
                              : started_ + std::chrono::duration_cast<Clock::duration>(options_.timeout);
  while (!done()) {
    if (!cancelled() && Clock::now() >= total_when) {
      fail_locked(Status(ErrorCode::kTimeout, "the load did not finish within its timeout of " +
                                                  std::to_string(options_.timeout.count()) +
                                                  " s: " + std::to_string(counters_.done_bytes) + " of " +
                                                  std::to_string(plan_->read_bytes) + " bytes had arrived"));
    }
    if (!first_error_.ok()) {
      lock.unlock();
      transport_->cancel(*this);  // what has not started; the rest sees cancelled()
      lock.lock();
      if (done()) break;
      ended_.wait_until(lock, std::min(until.when(), Clock::now() + std::chrono::milliseconds(50)));
    } else {
      // In steps: an error may come at any time and has to cancel what waits in the queue.
      ended_.wait_until(lock,
                        std::min({until.when(), total_when, Clock::now() + std::chrono::milliseconds(50)}));
    }
    if (until.passed() && !done()) return false;
  }
  prepared_.reset();  // the memory is the caller's again
  return true;
}

void Load::cancel() {
  {
    std::lock_guard lock(mutex_);
    cancelled_.store(true, std::memory_order_relaxed);
    if (first_error_.ok() && (outstanding_ > 0 || next_read_ < plan_->reads.size())) {
      first_error_ = Status(ErrorCode::kCancelled, "the load was cancelled");
    }
  }
  transport_->cancel(*this);
}

void Load::throw_if_failed() const {
  std::lock_guard lock(mutex_);
  first_error_.throw_if_failed();
}

std::string Load::failed_object() const {
  std::lock_guard lock(mutex_);
  return failed_object_;
}

std::vector<uint32_t> Load::unfinished_regions() const {
  std::vector<bool> unfinished(plan_->region_bytes.size());
  {
    std::lock_guard lock(mutex_);
    for (size_t i = 0; i < plan_->reads.size(); ++i) {
      if (read_done_[i]) continue;
      const PlannedRead& read = plan_->reads[i];
      for (uint32_t j = 0; j < read.segment_count; ++j) {
        const PlannedSegment& segment = plan_->segments[read.first_segment + j];
        if (segment.region != kDropped) unfinished[segment.region] = true;
      }
    }
  }
  std::vector<uint32_t> regions;
  for (uint32_t i = 0; i < unfinished.size(); ++i) {
    if (unfinished[i]) regions.push_back(i);
  }
  return regions;
}

std::vector<uint32_t> Load::finished_files() const {
  std::vector<uint32_t> files;
  std::vector<bool> unfinished;  // by file
  {
    std::lock_guard lock(mutex_);
    for (size_t i = 0; i < plan_->reads.size(); ++i) {
      const uint32_t file = plan_->reads[i].file;
      if (file >= unfinished.size()) unfinished.resize(file + 1);
      if (!read_done_[i]) unfinished[file] = true;
    }
  }
  for (const uint32_t file : plan_->files()) {
    if (file < unfinished.size() && !unfinished[file]) files.push_back(file);
  }
  return files;
}

std::vector<ReadTrace> Load::trace() const {
  std::lock_guard lock(mutex_);
  return trace_;
}

std::vector<PieceDigest> Load::digests() const {
  std::lock_guard lock(mutex_);
  return digests_;
}

LoadCounters Load::counters() const {
  std::lock_guard lock(mutex_);
  LoadCounters counters = counters_;
  counters.elapsed = (outstanding_ > 0 ? Clock::now() : finished_) - started_;
  return counters;
}

}  // namespace rdmaload
