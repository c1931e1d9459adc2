#include "transport/rdma/destinations.h"

#include <algorithm>

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
    Registration made =
        MemoryRegistrar(domain, slab_bytes_).register_host(slab->memory, Access::kRemoteWrite);
    std::lock_guard counters(mutex_);
    if (made.registered()) {
      registered_bytes_ += slab->memory.size();
      ++registrations_;
      slab->registration = std::move(made);
    } else if (reason_.empty()) {
      reason_ = made.reason();
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

uint64_t Destinations::registered_bytes() const {
  std::lock_guard lock(mutex_);
  return registered_bytes_;
}

uint64_t Destinations::registrations() const {
  std::lock_guard lock(mutex_);
  return registrations_;
}

}  // namespace rdmaload::rdma
