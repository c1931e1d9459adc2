// Streams and events: the order in which a GPU does things. Nothing here waits for a whole device.
//
// A stream of somebody else's (torch's current stream) is just its handle. Resources are move-only and must
// not outlive their device.
#pragma once

#include <utility>

#include "device/device.h"

namespace rdmaload {

// A stream of our own that does not wait for the default stream.
class Stream {
 public:
  explicit Stream(const Device& device) : device_(&device) {
    const DeviceGuard guard(device);
    device.driver().check("cuStreamCreate",
                          device.driver().stream_create(&handle_, cuda::kStreamNonBlocking));
  }
  Stream(Stream&& other) noexcept : device_(other.device_), handle_(std::exchange(other.handle_, nullptr)) {}
  Stream& operator=(Stream&&) = delete;
  // What was enqueued is still done.
  ~Stream() {
    if (handle_ == nullptr) return;
    if (const ReleaseGuard guard(*device_); guard) device_->driver().stream_destroy(handle_);
  }
  cuda::Stream handle() const noexcept { return handle_; }

 private:
  const Device* device_;
  cuda::Stream handle_ = nullptr;
};

// A point in a stream's work. Waiting for one puts the thread to sleep.
class Event {
 public:
  explicit Event(const Device& device) : device_(&device) {
    const DeviceGuard guard(device);
    device.driver().check(
        "cuEventCreate",
        device.driver().event_create(&handle_, cuda::kEventDisableTiming | cuda::kEventBlockingSync));
  }
  Event(Event&& other) noexcept : device_(other.device_), handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  ~Event() {
    if (handle_ == nullptr) return;
    if (const ReleaseGuard guard(*device_); guard) device_->driver().event_destroy(handle_);
  }

  // What follows is a part of a guarded scope: the device must be current.
  Status record(cuda::Stream stream) const {
    return device_->driver().status("cuEventRecord", device_->driver().event_record(handle_, stream));
  }
  // Work enqueued on `stream` from now on waits until this event, as last recorded, has fired.
  Status make_wait(cuda::Stream stream) const {
    return device_->driver().status("cuStreamWaitEvent",
                                    device_->driver().stream_wait_event(stream, handle_, 0));
  }
  // Waits on the host.
  Status synchronize() const {
    return device_->driver().status("cuEventSynchronize", device_->driver().event_synchronize(handle_));
  }
  // Whether it has fired; an error counts as not.
  bool fired() const noexcept { return query() == cuda::kSuccess; }
  // kSuccess, kNotReady, or what went wrong: then it never fires.
  cuda::Result query() const noexcept { return device_->driver().event_query(handle_); }

 private:
  const Device* device_;
  cuda::Event handle_ = nullptr;
};

// From now on work on `later` waits for what is on `earlier` now. Throws kDevice, also when a CUDA graph is
// being captured on one of them: it would swallow the wait, and run it when the graph is replayed.
void order_streams(const Device& device, cuda::Stream earlier, cuda::Stream later);

}  // namespace rdmaload
