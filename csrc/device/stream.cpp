#include "device/stream.h"

namespace rdmaload {
namespace {

void refuse_capture(const Driver& driver, cuda::Stream stream) {
  if (driver.stream_is_capturing == nullptr) return;
  int status = cuda::kCaptureStatusNone;
  driver.check("cuStreamIsCapturing", driver.stream_is_capturing(stream, &status));
  if (status == cuda::kCaptureStatusNone) return;
  throw Error(
      ErrorCode::kDevice,
      "the current stream captures a CUDA graph, which a load cannot be a part of: load before or after it");
}

}  // namespace

void order_streams(const Device& device, cuda::Stream earlier, cuda::Stream later) {
  const Event event(device);
  const DeviceGuard guard(device);
  refuse_capture(device.driver(), earlier);
  refuse_capture(device.driver(), later);
  event.record(earlier).throw_if_failed();
  event.make_wait(later).throw_if_failed();
  // The driver keeps what a wait needs: destroying the event now is allowed.
}

}  // namespace rdmaload
