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

}  // namespace

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
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return std::less<>()(a.data(), b.data()); });
  std::vector<std::shared_ptr<Slab>> added;
  std::span<std::byte> allocation;  // that the last slab lies in
  for (std::span<std::byte> block : sorted) {
    while (!block.empty()) {
      const std::byte* end =
          added.empty() ? nullptr : added.back()->memory.data() + added.back()->memory.size();
      if (block.data() == end && end < allocation.data() + allocation.size()) {
        std::span<std::byte>& memory = added.back()->memory;
        const auto room = static_cast<size_t>(allocation.data() + allocation.size() - end);
        const size_t taken = std::min({block.size(), room, static_cast<size_t>(slab_bytes_) - memory.size()});
        memory = {memory.data(), memory.size() + taken};
        block = block.subspan(taken);
        if (taken > 0) continue;
      }
      allocation = allocation_of(device, block);
      auto slab = std::make_shared<Slab>();
      slab->device = &device;
      slab->memory = block.first(
          std::min<uint64_t>({block.size(), slab_bytes_,
                              static_cast<uint64_t>(allocation.data() + allocation.size() - block.data())}));
      block = block.subspan(slab->memory.size());
      added.push_back(std::move(slab));
    }
  }
  return add_slabs(std::move(added));
}

std::shared_ptr<void> Destinations::add_slabs(std::vector<std::shared_ptr<Slab>> added) {
  auto lease = std::make_shared<Lease>(shared_from_this(), added);
  std::lock_guard lock(mutex_);
  if (!revoked_) {
    for (const auto& slab : added) slabs_.emplace(slab->memory.data(), slab);
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
    if (next != slabs_.begin()) {
      const auto& candidate = std::prev(next)->second;
      if (wanted.data() < candidate->memory.data() + candidate->memory.size()) slab = candidate;
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
