// The kernels of device/kernels.cu as nvcc made them: cubins for common GPUs, and PTX for all later ones.
#pragma once

#include <cstddef>
#include <span>

namespace rdmaload {

// Empty when the build had no nvcc.
std::span<const std::byte> embedded_kernel_image() noexcept;

}  // namespace rdmaload
