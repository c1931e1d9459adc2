#include "server/value.h"

#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <iterator>
#include <new>
#include <utility>

#include "core/error.h"

namespace rdmaload::server {
namespace {

constexpr size_t kHeapBytes = 32 << 10;  // below, rounding up to pages would waste too much
constexpr size_t kSlabBytes = size_t{32} << 20;
constexpr size_t kOwnSlabBytes = size_t{8}
                                 << 20;  // from here a value has a slab of its own: nothing to fragment
constexpr size_t kValueOverhead = 128;   // the object, its count of references and the heap's own notes

// How much is registered at a time, so that no reader waits longer for it than for some milliseconds.
constexpr size_t kPartBytes = size_t{32} << 20;

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// What a value costs: pages in a slab, or heap.
uint64_t cost_of(size_t bytes) {
  return (bytes >= kHeapBytes ? round_up(bytes, page_bytes()) : bytes) + kValueOverhead;
}

}  // namespace

Value::~Value() { memory_->give_back(*this); }

bool Value::can_refer() const noexcept { return slab_ != nullptr && memory_->detaches_; }

std::shared_ptr<ValueMemory> ValueMemory::make(uint64_t limit_bytes) {
  return std::shared_ptr<ValueMemory>(new ValueMemory(limit_bytes));
}

std::shared_ptr<Value> ValueMemory::allocate(size_t bytes) {
  const bool paged = bytes >= kHeapBytes;
  const uint64_t held_now = paged ? kValueOverhead : cost_of(bytes);  // pages are held by their slab
  if (!hold(held_now)) return nullptr;
  // From here on the value's destructor gives everything back.
  used_bytes_ += cost_of(bytes);
  ++values_;
  Value* raw = nullptr;
  try {
    raw = new Value(shared_from_this(), bytes);
  } catch (const std::bad_alloc&) {
    used_bytes_ -= cost_of(bytes);
    held_bytes_ -= held_now;
    --values_;
    return nullptr;
  }
  try {
    std::shared_ptr<Value> value(raw);  // deletes it when it throws
    if (paged) {
      if (!take_pages(*value, bytes)) return nullptr;
    } else if (bytes > 0) {
      value->heap_.reset(new std::byte[bytes]);
      value->data_ = value->heap_.get();
    }
    return value;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

bool ValueMemory::charge(uint64_t bytes) noexcept {
  if (!hold(bytes)) return false;
  used_bytes_ += bytes;
  return true;
}

void ValueMemory::release(uint64_t bytes) noexcept {
  used_bytes_ -= bytes;
  held_bytes_ -= bytes;
}

bool ValueMemory::hold(uint64_t bytes) noexcept {
  uint64_t held = held_bytes_.load();
  do {
    if (held > limit_bytes_ || bytes > limit_bytes_ - held) return false;
  } while (!held_bytes_.compare_exchange_weak(held, held + bytes));
  return true;
}

bool ValueMemory::take_pages(Value& value, size_t bytes) {
  Slab* fresh = nullptr;
  if (!take_pages(value, bytes, fresh)) return false;
  // Whoever saves pays for it, not the first reader. The value keeps the slab.
  if (fresh != nullptr) register_slab(*fresh);
  return true;
}

bool ValueMemory::take_pages(Value& value, size_t bytes, Slab*& fresh) {
  const size_t need = round_up(bytes, page_bytes());
  const std::lock_guard lock(mutex_);
  if (need < kOwnSlabBytes) {
    for (Slab& slab : slabs_) {
      if (slab.largest_free_bound >= need && carve(slab, need, value)) return true;
    }
  }
  size_t size = need < kOwnSlabBytes ? kSlabBytes : need;
  if (!hold(size)) {
    // Near the limit: exactly what is needed.
    if (size == need || !hold(need)) return false;
    size = need;
  }
  try {
    slabs_.emplace_back(size);
  } catch (const std::bad_alloc&) {
    held_bytes_ -= size;
    return false;
  }
  fresh = domain_ != nullptr ? &slabs_.back() : nullptr;
  return carve(slabs_.back(), need, value);
}

bool ValueMemory::carve(Slab& slab, size_t bytes, Value& value) {
  size_t largest = 0;
  for (auto run = slab.free.begin(); run != slab.free.end(); ++run) {
    const auto [offset, length] = *run;
    largest = std::max(largest, length);
    if (length < bytes) continue;
    if (length > bytes) slab.free.emplace(offset + bytes, length - bytes);  // throws before anything is lost
    slab.free.erase(run);
    value.data_ = slab.memory.data() + offset;
    value.slab_ = &slab;
    value.offset_ = offset;
    return true;
  }
  slab.largest_free_bound = largest;
  return false;
}

void ValueMemory::give_back(Value& value) noexcept {
  const uint64_t cost = cost_of(value.size_);
  used_bytes_ -= cost;
  --values_;
  if (value.size_ < kHeapBytes) {
    value.heap_.reset();
    held_bytes_ -= cost;
    return;
  }
  held_bytes_ -= kValueOverhead;
  if (value.slab_ == nullptr) return;  // there was no room for its pages
  size_t begin = value.offset_;
  size_t end = begin + round_up(value.size_, page_bytes());
  const bool detached = value.referred_;
  if (detached && !static_cast<Slab*>(value.slab_)->memory.detach(begin, end - begin)) {
    detaches_ = false;  // from now on values are copied to be sent
    return;             // this one's place stays held, and is never used again
  }
  // Deregistering and unmapping take time: after the lock.
  std::list<Slab> emptied;
  StaleRegions stale;
  const std::lock_guard lock(mutex_);
  const auto at = std::find_if(slabs_.begin(), slabs_.end(),
                               [&](const Slab& candidate) { return &candidate == value.slab_; });
  assert(at != slabs_.end());
  Slab& slab = *at;
  // Not before the pages were detached: a registration that was made meanwhile may hold the old ones.
  if (detached) stale = take_stale(slab, begin, end - begin);
  for (Part& part : slab.parts) part.refused = false;  // there may be more to lock now
  // With what is free before, after and in between.
  auto run = slab.free.upper_bound(begin);
  if (run != slab.free.begin() && std::prev(run)->first + std::prev(run)->second >= begin) --run;
  while (run != slab.free.end() && run->first <= end) {
    begin = std::min(begin, run->first);
    end = std::max(end, run->first + run->second);
    run = slab.free.erase(run);
  }
  if (end - begin == slab.memory.size()) {
    held_bytes_ -= slab.memory.size();
    emptied.splice(emptied.end(), slabs_, at);
    return;
  }
  try {
    slab.free.emplace(begin, end - begin);
  } catch (const std::bad_alloc&) {
    return;  // not even for a note of it: stays held, never used again
  }
  slab.largest_free_bound = SIZE_MAX;
}

// ---- registration ------------------------------------------------------------------------------

void ValueMemory::register_with(std::shared_ptr<rdma::ProtectionDomain> domain) {
  std::vector<std::shared_ptr<const rdma::MemoryRegion>> old;  // deregistered after the lock
  const std::lock_guard lock(mutex_);
  if (domain != nullptr && domain_ != nullptr) {
    throw Error(ErrorCode::kInvalid, "a store's memory can be registered for one server over RDMA at a time");
  }
  domain_ = std::move(domain);
  for (Slab& slab : slabs_) {
    for (Part& part : slab.parts) old.push_back(std::move(part.region));
    slab.parts.clear();
  }
}

RegisteredBytes ValueMemory::registered(const ValuePtr& value, size_t offset, size_t length) {
  assert(offset <= value->size_ && length <= value->size_ - offset);
  const std::span<const std::byte> bytes = value->bytes().subspan(offset, length);
  if (value->slab_ == nullptr) return {value, nullptr, bytes};
  Slab& slab = *static_cast<Slab*>(value->slab_);  // is there as long as the value
  const size_t in_slab = value->offset_ + offset;
  const size_t index = in_slab / kPartBytes;
  const size_t left = kPartBytes - in_slab % kPartBytes;
  return {value, register_part(slab, index), bytes.first(std::min(length, left))};
}

void ValueMemory::register_slab(Slab& slab) {
  for (size_t at = 0; at < slab.memory.size(); at += kPartBytes) register_part(slab, at / kPartBytes);
}

std::shared_ptr<const rdma::MemoryRegion> ValueMemory::register_part(Slab& slab, size_t index) {
  std::shared_ptr<rdma::ProtectionDomain> domain;
  uint64_t forgotten = 0;
  {
    const std::lock_guard lock(mutex_);
    if (domain_ == nullptr) return nullptr;
    if (slab.parts.empty()) slab.parts.resize((slab.memory.size() + kPartBytes - 1) / kPartBytes);
    const Part& part = slab.parts[index];
    if (part.region != nullptr || part.refused) return part.region;
    domain = domain_;
    forgotten = part.forgotten;
  }
  const size_t offset = index * kPartBytes;
  const size_t bytes = std::min(kPartBytes, slab.memory.size() - offset);
  std::shared_ptr<const rdma::MemoryRegion> region;
  std::string refusal;
  try {
    std::unique_ptr<rdma::MemoryRegion> made =
        domain->register_memory({slab.memory.data() + offset, bytes}, rdma::Access::kSource);
    region = {made.release(), [counter = &registered_bytes_, bytes](const rdma::MemoryRegion* gone) {
                delete gone;
                *counter -= bytes;
              }};
    registered_bytes_ += bytes;
  } catch (const Error& err) {
    refusal = err.what();
  }
  const std::lock_guard lock(mutex_);
  if (domain != domain_) return region;
  Part& part = slab.parts[index];
  if (region == nullptr) {
    if (part.region != nullptr) return part.region;
    part.refused = true;
    if (!std::exchange(refused_, true)) refusal_ = std::move(refusal);
    return nullptr;
  }
  // Another thread was first, or pages were detached meanwhile: those of the caller's value were not.
  if (part.region == nullptr && part.forgotten == forgotten) part.region = region;
  return region;
}

ValueMemory::StaleRegions ValueMemory::take_stale(Slab& slab, size_t offset, size_t length) {
  StaleRegions stale;
  // Of a slab of many values there is one part, and one of a single value goes as a whole.
  if (slab.parts.empty() || length == slab.memory.size()) return stale;
  size_t count = 0;
  for (size_t index = offset / kPartBytes; index * kPartBytes < offset + length; ++index) {
    Part& part = slab.parts[index];
    stale[count++] = std::exchange(part.region, nullptr);
    ++part.forgotten;
  }
  return stale;
}

std::string ValueMemory::take_refusal() {
  const std::lock_guard lock(mutex_);
  return std::exchange(refusal_, {});
}

}  // namespace rdmaload::server
