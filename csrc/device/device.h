// One GPU: its primary context (the one that torch uses), and the guard that makes it current on a thread.
//
// Devices live as long as the process, and so do their contexts and copy streams: tensors that were written
// by a copy stream may be freed, and waited for on it, at any time. Any thread may use a Device.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "device/driver.h"

namespace rdmaload {

class Kernels;

struct DeviceMemoryInfo {
  size_t free_bytes;
  size_t total_bytes;
};

class Device {
 public:
  // Of the process's driver. Throws kNotSupported without a driver, kDevice when there is no such device.
  static Device& get(int ordinal);

  Device(const Driver& driver, int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const Driver& driver() const noexcept { return driver_; }
  int ordinal() const noexcept { return ordinal_; }
  cuda::Context context() const noexcept { return context_; }
  std::string name() const;
  int attribute(int attribute) const;
  DeviceMemoryInfo memory_info() const;

  // A non-blocking stream for copies and kernels of loads.
  cuda::Stream copy_stream();
  // The kernels, loaded at first use; nullptr when this build, driver or GPU cannot run them, and then why.
  const Kernels* kernels(std::string* why = nullptr);

 private:
  const Driver& driver_;
  const int ordinal_;
  cuda::Device handle_ = 0;
  cuda::Context context_ = nullptr;
  std::mutex mutex_;
  cuda::Stream copy_stream_ = nullptr;  // Guarded by mutex_.
  bool kernels_tried_ = false;          // Guarded by mutex_.
  std::unique_ptr<Kernels> kernels_;    // Guarded by mutex_ until made, then constant.
  std::string no_kernels_reason_;       // Guarded by mutex_.
};

// Keeps what this thread calls apart from a CUDA graph that anybody in the process is capturing.
//
// A capture in CUDA's default mode forbids every thread what might disturb it (to allocate, to page-lock, to
// wait for an event), and such a call both fails and spoils the capture. Nothing that this library calls has
// to do with the captured streams, so its threads step out of that check while they call. Without effect on
// older drivers.
class CaptureModeGuard {
 public:
  explicit CaptureModeGuard(const Driver& driver) noexcept : driver_(driver) { exchange(); }
  ~CaptureModeGuard() { exchange(); }
  CaptureModeGuard(const CaptureModeGuard&) = delete;
  CaptureModeGuard& operator=(const CaptureModeGuard&) = delete;

 private:
  void exchange() noexcept {
    if (driver_.exchange_capture_mode != nullptr) driver_.exchange_capture_mode(&mode_);
  }
  const Driver& driver_;
  int mode_ = cuda::kCaptureModeRelaxed;  // and then the thread's own, to be put back
};

// Makes the device current on this thread until the end of the scope, with a CaptureModeGuard around it.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Device& device) : driver_(opened(device.driver())), mode_(driver_) {
    driver_.check("cuCtxPushCurrent", driver_.context_push(device.context()));
  }
  ~DeviceGuard() {
    cuda::Context popped = nullptr;
    driver_.context_pop(&popped);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static const Driver& opened(const Driver& driver) {
    driver.check_process();
    return driver;
  }
  const Driver& driver_;
  const CaptureModeGuard mode_;
};

// The same for destructors, which must not throw: false when the driver is gone or belongs to a parent
// process.
class ReleaseGuard {
 public:
  explicit ReleaseGuard(const Device& device) noexcept : driver_(device.driver()) {
    if (!driver_.is_opener()) return;
    mode_.emplace(driver_);
    active_ = driver_.context_push(device.context()) == cuda::kSuccess;
  }
  ~ReleaseGuard() {
    cuda::Context popped = nullptr;
    if (active_) driver_.context_pop(&popped);
  }
  ReleaseGuard(const ReleaseGuard&) = delete;
  ReleaseGuard& operator=(const ReleaseGuard&) = delete;
  explicit operator bool() const noexcept { return active_; }

 private:
  const Driver& driver_;
  std::optional<CaptureModeGuard> mode_;
  bool active_ = false;
};

}  // namespace rdmaload
