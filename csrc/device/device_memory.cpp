#include "device/device_memory.h"

#include <string>

namespace rdmaload {

PinnedBuffer::PinnedBuffer(const Device& device, size_t bytes) : device_(device), size_(bytes) {
  if (bytes == 0) return;
  const DeviceGuard guard(device);
  try {
    arena_ = std::make_unique<HostArena>(bytes);
    registration_.emplace(device, arena_->span());
    data_ = arena_->data();
    return;
  } catch (const std::exception&) {  // no memory, or a system that cannot register what exists
    arena_.reset();
  }
  void* data = nullptr;
  const cuda::Result result = device.driver().host_alloc(&data, bytes, cuda::kMemHostAllocPortable);
  if (result != cuda::kSuccess) {
    throw Error(ErrorCode::kDevice,
                device.driver().describe("cuMemHostAlloc", result) + "; " + std::to_string(bytes) +
                    " bytes of page-locked host memory were asked for: lower staging_bytes");
  }
  data_ = static_cast<std::byte*>(data);
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ == nullptr || arena_) return;
  if (const ReleaseGuard guard(device_); guard) device_.driver().host_free(data_);
}

HostRegistration::HostRegistration(const Device& device, std::span<std::byte> memory)
    : device_(device), data_(memory.data()) {
  const DeviceGuard guard(device);
  device.driver().check("cuMemHostRegister", device.driver().host_register(memory.data(), memory.size(),
                                                                           cuda::kMemHostRegisterPortable));
}

HostRegistration::~HostRegistration() {
  if (const ReleaseGuard guard(device_); guard) device_.driver().host_unregister(data_);
}

DeviceBuffer::DeviceBuffer(const Device& device, size_t bytes) : device_(device), size_(bytes) {
  if (bytes == 0) return;
  const DeviceGuard guard(device);
  const cuda::Result result = device.driver().memory_alloc(&data_, bytes);
  if (result != cuda::kSuccess) {
    const DeviceMemoryInfo info = device.memory_info();
    throw Error(ErrorCode::kDevice, device.driver().describe("cuMemAlloc", result) + "; " +
                                        std::to_string(bytes) +
                                        " bytes were asked for on cuda:" + std::to_string(device.ordinal()) +
                                        ", which has " + std::to_string(info.free_bytes) + " free");
  }
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ == 0) return;
  if (const ReleaseGuard guard(device_); guard) device_.driver().memory_free(data_);
}

}  // namespace rdmaload
