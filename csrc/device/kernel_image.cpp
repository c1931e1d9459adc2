#include "device/kernel_image.h"

#ifdef RDMALOAD_HAS_KERNELS
#include <cstdint>
// Made by bin2c from the fat binary; it must be aligned for the driver.
extern "C" const uint64_t rdmaload_kernel_fatbin[];
extern "C" const unsigned long long rdmaload_kernel_fatbin_bytes;
#endif

namespace rdmaload {

std::span<const std::byte> embedded_kernel_image() noexcept {
#ifdef RDMALOAD_HAS_KERNELS
  return {reinterpret_cast<const std::byte*>(rdmaload_kernel_fatbin),
          static_cast<size_t>(rdmaload_kernel_fatbin_bytes)};
#else
  return {};
#endif
}

}  // namespace rdmaload
