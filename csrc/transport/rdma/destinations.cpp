#include "transport/rdma/destinations.h"

#include <algorithm>
#include <functional>

#include "device/gpudirect.h"

namespace rdmaload::rdma {

class Destinations::Lease {
 public:
  Lease(std::shared_ptr<Destinations> destinations, std::vector<std::shared_ptr<Slab>> slabs)
      : destinations_(std::move(destinations)), slabs_(std::move(slabs)) {}
  ~Lease() { destinations_->remove(slabs_); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

 private:
  const std::shared_ptr<Destinations> destinations_;
  const std::vector<std::shared_ptr<Slab>> slabs_;
};

namespace {

// The allocation of the driver's that these bytes begin in; the bytes themselves where it will not say.
std::span<std::byte> allocation_of(const Device& device, std::span<std::byte> memory) {
  const auto found = allocation_range(device, reinterpret_cast<uintptr_t>(memory.data()));
  if (!found) return memory;
  return {memory.data() - (reinterpret_cast<uintptr_t>(memory.data()) - found->first), found->second};
}

std::byte* end_of(std::span<std::byte> memory) { return memory.data() + memory.size(); }

// From the first byte of one to the end of whichever ends last; `next` begins no earlier.
std::span<std::byte> joined(std::span<std::byte> memory, std::span<std::byte> next) {
  return {memory.data(), static_cast<size_t>(std::max(end_of(memory), end_of(next)) - memory.data())};
}

}  // namespace

void Destinations::Slab::grow(std::span<std::byte> block) {
  memory = joined(memory, block);
  if (block.data() <= end_of(blocks.back())) {
    blocks.back() = joined(blocks.back(), block);
  } else {
    blocks.push_back(block);
  }
}

bool Destinations::Slab::holds(std::byte* data) const {
  if (data >= end_of(memory)) return false;
  if (blocks.empty()) return true;
  const auto after = std::upper_bound(blocks.begin(), blocks.end(), data,
                                      [](std::byte* at, const auto& block) { return at < block.data(); });
  return after != blocks.begin() && data < end_of(*std::prev(after));
}

std::shared_ptr<void> Destinations::add(std::span<const std::span<std::byte>> blocks) {
  std::vector<std::shared_ptr<Slab>> added;
  for (std::span<std::byte> block : blocks) {
    while (block.size() >= kLeastRegisteredBytes) {
      auto slab = std::make_shared<Slab>();
      slab->memory = block.first(std::min<uint64_t>(block.size(), slab_bytes_));
      block = block.subspan(slab->memory.size());
      added.push_back(std::move(slab));
    }
  }
  return add_slabs(std::move(added));
}

std::shared_ptr<void> Destinations::add(Device& device, std::span<const std::span<std::byte>> blocks) {
  std::vector<std::span<std::byte>> sorted(blocks.begin(), blocks.end());
  std::erase_if(sorted, [](const auto& block) { return block.empty(); });
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return std::less<>()(a.data(), b.data()); });
  std::vector<std::shared_ptr<Slab>> added;
  std::span<std::byte> allocation;  // that the last slab lies in
  for (std::span<std::byte> block : sorted) {
    while (!block.empty()) {
      std::span<std::byte> piece;
      if (!added.empty() && block.data() < end_of(allocation)) {
        // Grows the last slab over the block, and over the gap before it.
        Slab& last = *added.back();
        std::byte* const end =
            std::min({end_of(block), end_of(allocation), last.memory.data() + slab_bytes_});
        if (block.data() <= end_of(last.memory) + kBridgedBytes && block.data() < end) {
          piece = block.first(static_cast<size_t>(end - block.data()));
          last.grow(piece);
        }
      }
      if (piece.empty()) {
        allocation = allocation_of(device, block);
        piece = block.first(std::min<uint64_t>(
            {block.size(), slab_bytes_, static_cast<uint64_t>(end_of(allocation) - block.data())}));
        auto slab = std::make_shared<Slab>();
        slab->device = &device;
        slab->memory = piece;
        slab->blocks = {piece};
        added.push_back(std::move(slab));
      }
      block = block.subspan(piece.size());
    }
  }
  return add_slabs(std::move(added));
}

std::shared_ptr<void> Destinations::add_slabs(std::vector<std::shared_ptr<Slab>> added) {
  auto lease = std::make_shared<Lease>(shared_from_this(), added);
  std::lock_guard lock(mutex_);
  if (!revoked_) {
    for (const auto& slab : added) {
      slabs_.emplace(slab->memory.data(), slab);
      longest_bytes_ = std::max(longest_bytes_, slab->memory.size());
    }
  }
  return lease;
}

void Destinations::remove(const std::vector<std::shared_ptr<Slab>>& slabs) noexcept {
  {
    std::lock_guard lock(mutex_);
    for (const auto& slab : slabs) {
      const auto [first, last] = slabs_.equal_range(slab->memory.data());
      const auto found = std::find_if(first, last, [&](const auto& entry) { return entry.second == slab; });
      if (found != last) slabs_.erase(found);
    }
  }
  uint64_t ended = 0;
  for (const auto& slab : slabs) {
    std::lock_guard lock(slab->mutex);
    if (slab->registration) ended += slab->memory.size();
    slab->registration.reset();
    slab->tried = true;
  }
  std::lock_guard lock(mutex_);
  registered_bytes_ -= ended;
}

Destinations::Found Destinations::find(std::span<std::byte> wanted,
                                       const std::shared_ptr<ProtectionDomain>& domain) {
  std::shared_ptr<Slab> slab;
  {
    std::lock_guard lock(mutex_);
    const auto next = slabs_.upper_bound(wanted.data());
    // Those of two loads may overlap, so the last that begins before need not be the one.
    for (auto at = next; at != slabs_.begin() && slab == nullptr;) {
      const auto& candidate = (--at)->second;
      if (candidate->holds(wanted.data())) slab = candidate;
      if (static_cast<size_t>(wanted.data() - candidate->memory.data()) >= longest_bytes_) break;
    }
    if (slab == nullptr) {
      // Not registered as far as the next slab, if that begins within what is asked for.
      size_t bytes = wanted.size();
      if (next != slabs_.end() && next->first < wanted.data() + wanted.size()) {
        bytes = static_cast<size_t>(next->first - wanted.data());
      }
      return {nullptr, {}, bytes};
    }
  }
  const auto bytes = std::min<size_t>(
      wanted.size(), static_cast<size_t>(slab->memory.data() + slab->memory.size() - wanted.data()));
  std::lock_guard lock(slab->mutex);
  if (!slab->tried) {
    slab->tried = true;
    const MemoryRegistrar registrar(domain, slab_bytes_);
    Registration made =
        slab->device == nullptr
            ? registrar.register_host(slab->memory, Access::kRemoteWrite)
            : registrar.register_device(*slab->device, reinterpret_cast<uintptr_t>(slab->memory.data()),
                                        slab->memory.size(), Access::kRemoteWrite);
    std::lock_guard counters(mutex_);
    if (made.registered()) {
      registered_bytes_ += slab->memory.size();
      ++registrations_;
      slab->registration = std::move(made);
    } else if (std::string& reason = slab->device == nullptr ? reason_ : device_reason_; reason.empty()) {
      reason = made.reason();
    }
  }
  if (!slab->registration) return {nullptr, {}, bytes};
  // A slab that does not begin at a page may be registered in two parts.
  const auto address = reinterpret_cast<uintptr_t>(wanted.data());
  const MemoryRegion* region = slab->registration->find(address);
  const std::span<std::byte> memory(wanted.data() - (address - region->address()), region->bytes());
  return {region, memory,
          std::min<size_t>(bytes, static_cast<size_t>(memory.data() + memory.size() - wanted.data()))};
}

void Destinations::revoke() noexcept {
  std::vector<std::shared_ptr<Slab>> slabs;
  {
    std::lock_guard lock(mutex_);
    revoked_ = true;
    for (const auto& [address, slab] : slabs_) slabs.push_back(slab);
  }
  remove(slabs);
}

std::string Destinations::reason() const {
  std::lock_guard lock(mutex_);
  return reason_;
}

std::string Destinations::device_reason() const {
  std::lock_guard lock(mutex_);
  return device_reason_;
}

uint64_t Destinations::registered_bytes() const {
  std::lock_guard lock(mutex_);
  return registered_bytes_;
}

uint64_t Destinations::registrations() const {
  std::lock_guard lock(mutex_);
  return registrations_;
}

}  // namespace rdmaload::rdma
