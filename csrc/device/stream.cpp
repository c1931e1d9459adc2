#include "device/stream.h"

namespace rdmaload {

void order_streams(const Device& device, cuda::Stream earlier, cuda::Stream later) {
  const Event event(device);
  const DeviceGuard guard(device);
  event.record(earlier).throw_if_failed();
  event.make_wait(later).throw_if_failed();
  // The driver keeps what a wait needs: destroying the event now is allowed.
}

}  // namespace rdmaload
