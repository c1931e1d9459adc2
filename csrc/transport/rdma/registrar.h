// Registers destinations, host or GPU memory, with a card: in slabs, as far as the machine allows it.
//
// A slab is at most 1 GiB, so that one registration never pins more in one go, and a refusal is found early.
// What cannot be registered is no error but "stage it, because ...". Any thread may use a registrar.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device/device.h"
#include "transport/rdma/queue_pair.h"

namespace rdmaload::rdma {

constexpr uint64_t kMaxSlabBytes = uint64_t{1} << 30;

enum class MemoryRoad { kHost, kDmaBuf, kPeermem, kStaging };
const char* name_of(MemoryRoad road) noexcept;  // "host", "dma-buf", "peermem", "staging"

// The registered slabs of one destination, or, for kStaging, none and the reason. Move-only; deregisters.
class Registration {
 public:
  Registration(MemoryRoad road, std::vector<std::unique_ptr<MemoryRegion>> slabs)
      : road_(road), slabs_(std::move(slabs)) {}
  explicit Registration(std::string reason) : road_(MemoryRoad::kStaging), reason_(std::move(reason)) {}

  MemoryRoad road() const noexcept { return road_; }
  bool registered() const noexcept { return road_ != MemoryRoad::kStaging; }
  const std::string& reason() const noexcept { return reason_; }  // of kStaging
  // In the order of addresses, without gaps.
  std::span<const std::unique_ptr<MemoryRegion>> slabs() const noexcept { return slabs_; }
  // The slab that holds this address; nullptr outside. A range may go on in the next slab.
  const MemoryRegion* find(uint64_t address) const noexcept;
  uint64_t bytes() const noexcept;

 private:
  MemoryRoad road_;
  std::string reason_;
  std::vector<std::unique_ptr<MemoryRegion>> slabs_;
};

class MemoryRegistrar {
 public:
  // A slab is a multiple of the page size.
  explicit MemoryRegistrar(std::shared_ptr<ProtectionDomain> domain, uint64_t slab_bytes = kMaxSlabBytes);

  // All of it or nothing: kStaging when the limit of locked memory, or the card, does not allow it. Throws
  // kInvalid for an empty range.
  Registration register_host(std::span<std::byte> memory, Access access) const;
  // Memory of cuMemAlloc: as dma-buf, else through peermem, else kStaging. Synchronous memory operations on
  // it are made to wait for what was before them (set_sync_memops). Throws kInvalid.
  Registration register_device(const Device& device, cuda::Pointer pointer, uint64_t bytes,
                               Access access) const;

  const std::shared_ptr<ProtectionDomain>& domain() const noexcept { return domain_; }

 private:
  const std::shared_ptr<ProtectionDomain> domain_;
  const uint64_t slab_bytes_;
};

}  // namespace rdmaload::rdma
