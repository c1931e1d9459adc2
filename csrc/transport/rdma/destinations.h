// The memory that reads go to, registered with the card when the first of them needs it: once per block, in
// slabs, not once per tensor.
//
// The loader says beforehand what blocks there are (Transport::prepare); their registrations end with what it
// got for that, or with revoke(). Blocks of a GPU are known by their addresses, which no host memory has. Any
// thread may use it. Registering takes milliseconds per slab, during which only those wait who need that
// slab.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "transport/rdma/registrar.h"

namespace rdmaload::rdma {

// Below a page, copying is cheaper than registering.
constexpr size_t kLeastRegisteredBytes = 4096;
// Between two blocks of one allocation of a GPU: a gap up to this is registered with them. An allocator as
// torch's cuts its allocations into tensors with a little space between; a gap as large as an allocation for
// small tensors is somebody else's.
constexpr size_t kBridgedBytes = size_t{2} << 20;

class Destinations : public std::enable_shared_from_this<Destinations> {
 public:
  explicit Destinations(uint64_t slab_bytes = kMaxSlabBytes) : slab_bytes_(slab_bytes) {}

  // Deregistered when the result is destroyed. The memory outlives it.
  std::shared_ptr<void> add(std::span<const std::span<std::byte>> blocks);
  // The same of memory of a GPU, which is registered whatever its size: it has no other way to be written
  // directly. Blocks in one allocation that lie near each other are registered as one, with what is between
  // them: thousands of small tensors are one registration.
  std::shared_ptr<void> add(Device& device, std::span<const std::span<std::byte>> blocks);

  // What is known of the bytes at `data`.
  struct Found {
    const MemoryRegion* region = nullptr;  // null: not registered, so they are staged
    std::span<std::byte> memory;           // of the region; empty when there is none
    size_t bytes = 0;                      // of those asked for, from `data` on, for which this holds
    uint64_t remote_address(const std::byte* data) const {
      return region->address() + static_cast<uint64_t>(data - memory.data());
    }
  };
  // Registers what was not yet, in this domain. The region lives as long as the result of add() and no longer
  // than until revoke(). `bytes` is at least 1.
  Found find(std::span<std::byte> wanted, const std::shared_ptr<ProtectionDomain>& domain);

  // Ends all registrations, and there will be no more. Nobody may use a region any longer.
  void revoke() noexcept;
  // Why something was staged that is long enough to be registered; empty when nothing was. Not of GPU memory.
  std::string reason() const;
  // Why some GPU memory could not be registered; empty when all could.
  std::string device_reason() const;
  uint64_t registered_bytes() const;
  uint64_t registrations() const;  // how many were ever made

 private:
  struct Slab {
    // Whether `data`, which is not before it, is of what it was added for: what lies between the blocks of a
    // GPU's may be another's, whose registration is not to end with this one.
    bool holds(std::byte* data) const;
    void grow(std::span<std::byte> block);  // one of the same allocation that begins no earlier

    std::span<std::byte> memory;
    std::vector<std::span<std::byte>> blocks;  // of a GPU: in order, apart from each other
    Device* device = nullptr;                  // whose memory it is; null: the host's
    std::mutex mutex;
    bool tried = false;                        // Guarded by mutex, as the next.
    std::optional<Registration> registration;  // none: staged
  };
  class Lease;
  std::shared_ptr<void> add_slabs(std::vector<std::shared_ptr<Slab>> slabs);
  void remove(const std::vector<std::shared_ptr<Slab>>& slabs) noexcept;

  const uint64_t slab_bytes_;
  mutable std::mutex mutex_;
  std::multimap<std::byte*, std::shared_ptr<Slab>> slabs_;  // Guarded by mutex_, as all below. By address.
  size_t longest_bytes_ = 0;                                // of any slab there ever was
  bool revoked_ = false;
  std::string reason_;
  std::string device_reason_;
  uint64_t registered_bytes_ = 0;
  uint64_t registrations_ = 0;
};

}  // namespace rdmaload::rdma
