#include "device/device.h"

#include <map>

#include "device/kernels.h"

namespace rdmaload {

Device& Device::get(int ordinal) {
  static auto* mutex = new std::mutex;  // both for ever, as the driver itself
  static auto* devices = new std::map<int, std::unique_ptr<Device>>;
  const Driver& driver = Driver::process();
  driver.check_process();
  std::lock_guard lock(*mutex);
  std::unique_ptr<Device>& device = (*devices)[ordinal];
  if (!device) device = std::make_unique<Device>(driver, ordinal);
  return *device;
}

Device::Device(const Driver& driver, int ordinal) : driver_(driver), ordinal_(ordinal) {
  driver_.check_process();
  const int count = driver_.device_count();
  if (ordinal < 0 || ordinal >= count) {
    throw Error(ErrorCode::kDevice, "there is no CUDA device " + std::to_string(ordinal) +
                                        ": the driver sees " + std::to_string(count));
  }
  const CaptureModeGuard mode(driver_);  // the context may be made now
  driver_.check("cuDeviceGet", driver_.device_get(&handle_, ordinal));
  driver_.check("cuDevicePrimaryCtxRetain", driver_.context_retain(&context_, handle_));
}

Device::~Device() = default;

std::string Device::name() const {
  char name[256] = {};
  driver_.check("cuDeviceGetName", driver_.device_name(name, sizeof(name) - 1, handle_));
  return name;
}

int Device::attribute(int attribute) const {
  int value = 0;
  driver_.check("cuDeviceGetAttribute", driver_.device_attribute(&value, attribute, handle_));
  return value;
}

DeviceMemoryInfo Device::memory_info() const {
  const DeviceGuard guard(*this);
  DeviceMemoryInfo info{};
  driver_.check("cuMemGetInfo", driver_.memory_info(&info.free_bytes, &info.total_bytes));
  return info;
}

cuda::Stream Device::copy_stream() {
  const DeviceGuard guard(*this);
  std::lock_guard lock(mutex_);
  if (copy_stream_ == nullptr) {
    driver_.check("cuStreamCreate", driver_.stream_create(&copy_stream_, cuda::kStreamNonBlocking));
  }
  return copy_stream_;
}

const Kernels* Device::kernels(std::string* why) {
  std::lock_guard lock(mutex_);
  if (!kernels_tried_) {
    try {
      kernels_ = std::make_unique<Kernels>(*this);
      no_kernels_reason_.clear();
      kernels_tried_ = true;
    } catch (const Error& error) {
      no_kernels_reason_ = error.what();
      kernels_tried_ = error.code() == ErrorCode::kNotSupported;  // else it may work another time
    }
  }
  if (why != nullptr) *why = no_kernels_reason_;
  return kernels_.get();
}

}  // namespace rdmaload
