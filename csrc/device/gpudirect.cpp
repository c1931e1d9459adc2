#include "device/gpudirect.h"

#include <unistd.h>

#include <cstdio>

#include "core/checked.h"

namespace rdmaload {

DmaBuf::~DmaBuf() {
  if (fd_ >= 0) close(fd_);
}

bool has_dmabuf(const Device& device, std::string* why) {
  const char* missing = nullptr;
  if (device.driver().handle_for_range == nullptr) {
    missing = "the driver has no cuMemGetHandleForAddressRange (CUDA 11.7)";
  } else if (device.attribute(cuda::kAttributeDmaBufSupported) == 0) {
    missing = "the device, its driver or the kernel cannot export dma-bufs";
  }
  if (missing != nullptr && why != nullptr) *why = missing;
  return missing == nullptr;
}

DmaBuf export_dmabuf(const Device& device, cuda::Pointer pointer, uint64_t bytes) {
  std::string why;
  if (!has_dmabuf(device, &why)) throw Error(ErrorCode::kNotSupported, "no dma-buf of GPU memory: " + why);
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t begin = pointer / page * page;
  const auto end = checked_add(pointer, bytes);
  if (bytes == 0 || !end || !checked_add(*end, page - 1)) {
    throw Error(ErrorCode::kInvalid, "a range of device memory to export must not be empty or wrap");
  }
  const uint64_t length = (*end + page - 1) / page * page - begin;
  const DeviceGuard guard(device);
  int fd = -1;
  device.driver().check("cuMemGetHandleForAddressRange",
                        device.driver().handle_for_range(&fd, begin, length, cuda::kHandleTypeDmaBufFd, 0));
  return DmaBuf(fd, pointer - begin, length);
}

std::optional<std::pair<cuda::Pointer, uint64_t>> allocation_range(const Device& device,
                                                                   cuda::Pointer pointer) {
  if (device.driver().address_range == nullptr) return std::nullopt;
  const DeviceGuard guard(device);
  cuda::Pointer base = 0;
  size_t bytes = 0;
  if (device.driver().address_range(&base, &bytes, pointer) != cuda::kSuccess) return std::nullopt;
  if (pointer < base || pointer - base >= bytes) return std::nullopt;
  return std::pair{base, uint64_t{bytes}};
}

std::string pci_address(const Device& device) {
  char text[32];
  std::snprintf(text, sizeof(text), "%04x:%02x:%02x.0",
                static_cast<unsigned>(device.attribute(cuda::kAttributePciDomain)),
                static_cast<unsigned>(device.attribute(cuda::kAttributePciBus)),
                static_cast<unsigned>(device.attribute(cuda::kAttributePciDevice)));
  return text;
}

bool has_peermem() { return access("/sys/module/nvidia_peermem/version", F_OK) == 0; }

void set_sync_memops(const Device& device, cuda::Pointer pointer) {
  const DeviceGuard guard(device);
  const unsigned on = 1;
  device.driver().check("cuPointerSetAttribute", device.driver().pointer_set_attribute(
                                                     &on, cuda::kPointerAttributeSyncMemops, pointer));
}

void flush_gpudirect(const Device& device) {
  if (device.attribute(cuda::kAttributeWritesOrdering) >= cuda::kOrderingOwner) return;
  const bool can_flush = device.driver().flush_gpudirect != nullptr &&
                         (device.attribute(cuda::kAttributeFlushWritesOptions) & cuda::kFlushOptionHost) != 0;
  if (!can_flush) {
    throw Error(ErrorCode::kNotSupported,
                "cuda:" + std::to_string(device.ordinal()) +
                    " does not order a network card's writes and its driver cannot flush them");
  }
  const DeviceGuard guard(device);
  device.driver().check(
      "cuFlushGPUDirectRDMAWrites",
      device.driver().flush_gpudirect(cuda::kFlushTargetCurrentContext, cuda::kFlushToOwner));
}

}  // namespace rdmaload
