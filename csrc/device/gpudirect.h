// What a network card needs in order to write into GPU memory: a dma-buf of the range, and the flush after
// the last write. Registration with verbs is the RDMA transport's. Written to NVIDIA's contract and tried on
// the fake driver only: no machine with such a card has run it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "device/device.h"

namespace rdmaload {

// A file descriptor for a range of device memory; closed at the end, which a registration survives.
class DmaBuf {
 public:
  DmaBuf(int fd, uint64_t offset, uint64_t bytes) : fd_(fd), offset_(offset), bytes_(bytes) {}
  DmaBuf(DmaBuf&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)), offset_(other.offset_), bytes_(other.bytes_) {}
  DmaBuf& operator=(DmaBuf&&) = delete;
  ~DmaBuf();
  int fd() const noexcept { return fd_; }
  // Where the wanted range begins in the exported one, which is widened to whole pages.
  uint64_t offset() const noexcept { return offset_; }
  uint64_t bytes() const noexcept { return bytes_; }  // of the exported range

 private:
  int fd_;
  uint64_t offset_;
  uint64_t bytes_;
};

// Whether export_dmabuf works here; if not, `why` says what is missing.
bool has_dmabuf(const Device& device, std::string* why = nullptr);
// Exports [pointer, pointer + bytes), widened to host pages. The memory must be of cuMemAlloc (or
// cudaMalloc), whole pages of it. Throws kNotSupported, kInvalid, kDevice.
DmaBuf export_dmabuf(const Device& device, cuda::Pointer pointer, uint64_t bytes);
// Begin and size of the allocation that this address lies in; nullopt where the driver does not say.
std::optional<std::pair<cuda::Pointer, uint64_t>> allocation_range(const Device& device,
                                                                   cuda::Pointer pointer);
// "0000:18:00.0", as sysfs names the device.
std::string pci_address(const Device& device);
// Whether memory can be registered with plain ibv_reg_mr instead: NVIDIA's peermem module is loaded.
bool has_peermem();
// Synchronous memory operations on this allocation wait for everything before them: needed where a card
// writes.
void set_sync_memops(const Device& device, cuda::Pointer pointer);
// After the last completion of a network card's writes: makes them visible to what the device does next. Does
// nothing where the device orders such writes by itself. Throws kNotSupported where it does not and cannot
// flush.
void flush_gpudirect(const Device& device);

}  // namespace rdmaload
