// Memory that a GPU's copy engines reach: page-locked host memory, and device memory of our own.
//
// Page-locked memory is needed for copies that do not block the caller. Model weights go into memory of
// torch's allocator; DeviceBuffer is for staging on the device and for what RDMA registers. All are freed
// when nothing uses them any more: whoever enqueued work on them waits for it first.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "device/device.h"
#include "memory/host_arena.h"

namespace rdmaload {

// Page-locks host memory that exists already, as long as this lives.
class HostRegistration {
 public:
  // Throws kDevice, also when some of the memory is registered already.
  HostRegistration(const Device& device, std::span<std::byte> memory);
  ~HostRegistration();
  HostRegistration(const HostRegistration&) = delete;
  HostRegistration& operator=(const HostRegistration&) = delete;

 private:
  const Device& device_;
  std::byte* data_;
};

// Page-locked host memory that every device of the process may use. It is ours, in huge pages where the
// system gives them, and registered with the driver: a few hundred pages to lock rather than a hundred
// thousand. Where the driver cannot register, it is the driver's own.
class PinnedBuffer {
 public:
  PinnedBuffer(const Device& device, size_t bytes);
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  std::span<std::byte> span() const noexcept { return {data_, size_}; }

 private:
  const Device& device_;
  std::unique_ptr<HostArena> arena_;
  std::optional<HostRegistration> registration_;  // of the arena; else data_ is the driver's
  std::byte* data_ = nullptr;
  size_t size_;
};

// Device memory from the driver itself: at the start of an allocation of its own, as dma-buf exports need it.
class DeviceBuffer {
 public:
  DeviceBuffer(const Device& device, size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  cuda::Pointer data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }

 private:
  const Device& device_;
  cuda::Pointer data_ = 0;
  size_t size_;
};

}  // namespace rdmaload
