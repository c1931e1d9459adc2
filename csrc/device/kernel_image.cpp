#include "device/kernel_image.h"

#ifdef RDMALOAD_HAS_KERNELS
// Made by bin2c from the fat binary; of 64-bit words, because the driver wants it aligned.
#include <rdmaload_kernel_fatbin.inc>
#endif

namespace rdmaload {

std::span<const std::byte> embedded_kernel_image() noexcept {
#ifdef RDMALOAD_HAS_KERNELS
  return std::as_bytes(std::span(rdmaload_kernel_fatbin));
#else
  return {};
#endif
}

}  // namespace rdmaload
