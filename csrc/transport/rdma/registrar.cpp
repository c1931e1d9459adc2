#include "transport/rdma/registrar.h"

#include <unistd.h>

#include <algorithm>
#include <functional>

#include "core/checked.h"
#include "device/gpudirect.h"

namespace rdmaload::rdma {
namespace {

// Cuts [address, address + bytes) into slabs, at page boundaries so that no page is in two of them.
std::vector<std::unique_ptr<MemoryRegion>> in_slabs(
    uint64_t address, uint64_t bytes, uint64_t slab_bytes,
    const std::function<std::unique_ptr<MemoryRegion>(uint64_t begin, uint64_t length)>& make) {
  std::vector<std::unique_ptr<MemoryRegion>> slabs;
  const uint64_t before = address % static_cast<uint64_t>(sysconf(_SC_PAGESIZE));  // in the first page
  for (uint64_t begin = address; begin < address + bytes;) {
    const uint64_t length = std::min(slab_bytes - (begin == address ? before : 0), address + bytes - begin);
    slabs.push_back(make(begin, length));
    begin += length;
  }
  return slabs;
}

void check_range(uint64_t address, uint64_t bytes) {
  if (bytes == 0 || !checked_add(address, bytes)) {
    throw Error(ErrorCode::kInvalid, "a range of memory to register must not be empty or wrap");
  }
}

std::span<std::byte> memory_at(uint64_t address, uint64_t bytes) {
  return {reinterpret_cast<std::byte*>(static_cast<uintptr_t>(address)), bytes};
}

}  // namespace

const char* name_of(MemoryRoad road) noexcept {
  switch (road) {
    case MemoryRoad::kHost:
      return "host";
    case MemoryRoad::kDmaBuf:
      return "dma-buf";
    case MemoryRoad::kPeermem:
      return "peermem";
    case MemoryRoad::kStaging:
      return "staging";
  }
  return "";
}

const MemoryRegion* Registration::find(uint64_t address) const noexcept {
  auto after = std::upper_bound(slabs_.begin(), slabs_.end(), address,
                                [](uint64_t at, const auto& slab) { return at < slab->address(); });
  if (after == slabs_.begin()) return nullptr;
  const MemoryRegion& slab = **std::prev(after);
  return address - slab.address() < slab.bytes() ? &slab : nullptr;
}

uint64_t Registration::bytes() const noexcept {
  uint64_t sum = 0;
  for (const auto& slab : slabs_) sum += slab->bytes();
  return sum;
}

MemoryRegistrar::MemoryRegistrar(std::shared_ptr<ProtectionDomain> domain, uint64_t slab_bytes)
    : domain_(std::move(domain)), slab_bytes_(slab_bytes) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (slab_bytes == 0 || slab_bytes > kMaxSlabBytes || slab_bytes % page != 0) {
    throw Error(ErrorCode::kInvalid, "a slab of registered memory is 1 or more pages, at most 1 GiB");
  }
}

Registration MemoryRegistrar::register_host(std::span<std::byte> memory, Access access) const {
  const uint64_t address = reinterpret_cast<uintptr_t>(memory.data());
  check_range(address, memory.size());
  try {
    return Registration(MemoryRoad::kHost,
                        in_slabs(address, memory.size(), slab_bytes_, [&](uint64_t begin, uint64_t length) {
                          return domain_->register_memory(memory_at(begin, length), access);
                        }));
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kDevice) throw;
    return Registration(error.what());
  }
}

Registration MemoryRegistrar::register_device(const Device& device, cuda::Pointer pointer, uint64_t bytes,
                                              Access access) const {
  check_range(pointer, bytes);
  std::string reason;
  if (has_dmabuf(device, &reason)) {
    try {
      set_sync_memops(device, pointer);
      // One slab, one dma-buf: the exported range is widened to pages, the registered one begins in it.
      return Registration(
          MemoryRoad::kDmaBuf, in_slabs(pointer, bytes, slab_bytes_, [&](uint64_t begin, uint64_t length) {
            const DmaBuf exported = export_dmabuf(device, begin, length);
            return domain_->register_dmabuf(exported.fd(), exported.offset(), length, begin, access);
          }));
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kDevice && error.code() != ErrorCode::kNotSupported) throw;
      reason = error.what();
    }
  }
  if (!has_peermem()) return Registration(reason + "; and nvidia_peermem is not loaded");
  try {
    set_sync_memops(device, pointer);
    return Registration(MemoryRoad::kPeermem,
                        in_slabs(pointer, bytes, slab_bytes_, [&](uint64_t begin, uint64_t length) {
                          return domain_->register_memory(memory_at(begin, length), access);
                        }));
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kDevice && error.code() != ErrorCode::kNotSupported) throw;
    return Registration(reason + "; through nvidia_peermem: " + error.what());
  }
}

}  // namespace rdmaload::rdma
