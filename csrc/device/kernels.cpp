#include "device/kernels.h"

#include <algorithm>
#include <string>

namespace rdmaload {
namespace {

// As in kernels.cu.
constexpr unsigned kThreads = 256;
constexpr uint64_t kCrcBytesPerThread = 1024;
constexpr uint64_t kMaxBlocks = 65535;  // further work is taken in strides of the grid

}  // namespace

size_t float_bytes(FloatType type) { return type == FloatType::kF32 ? 4 : 2; }

Kernels::Kernels(const Device& device) : driver_(device.driver()) {
  if (driver_.kernel_image().empty()) {
    throw Error(ErrorCode::kNotSupported,
                "this build has no GPU kernels: nvcc was not found when it was made");
  }
  const DeviceGuard guard(device);
  const cuda::Result loaded =
      driver_.module_load(&module_, driver_.kernel_image().data(), 0, nullptr, nullptr);
  if (loaded == cuda::kNoBinaryForGpu || loaded == cuda::kInvalidPtx ||
      loaded == cuda::kUnsupportedPtxVersion) {
    throw Error(ErrorCode::kNotSupported,
                "the GPU kernels of this build do not run on cuda:" + std::to_string(device.ordinal()) +
                    " (" + device.name() + ", compute capability " +
                    std::to_string(device.attribute(cuda::kAttributeComputeMajor)) + "." +
                    std::to_string(device.attribute(cuda::kAttributeComputeMinor)) + ", driver of CUDA " +
                    std::to_string(driver_.version() / 1000) + "." +
                    std::to_string(driver_.version() % 1000 / 10) +
                    "): " + driver_.describe("cuModuleLoadDataEx", loaded));
  }
  driver_.check("cuModuleLoadDataEx", loaded);
  for (const auto& [function, name] : {std::pair{&scatter_, "rdmaload_scatter"},
                                       {&crc32c_, "rdmaload_crc32c"},
                                       {&convert_, "rdmaload_convert"}}) {
    driver_.check(name, driver_.module_function(function, module_, name));
  }
}

Status Kernels::launch(cuda::Function function, const char* name, uint64_t blocks, cuda::Stream stream,
                       void** parameters) const {
  if (blocks == 0) return Status();
  const auto grid = static_cast<unsigned>(std::min(blocks, kMaxBlocks));
  return driver_.status(name,
                        driver_.launch(function, grid, 1, 1, kThreads, 1, 1, 0, stream, parameters, nullptr));
}

Status Kernels::scatter(cuda::Pointer block, cuda::Pointer pieces, uint32_t count,
                        cuda::Stream stream) const {
  void* parameters[] = {&block, &pieces, &count};
  return launch(scatter_, "rdmaload_scatter", count, stream, parameters);
}

Status Kernels::crc32c(cuda::Pointer data, uint64_t bytes, cuda::Pointer crc, cuda::Stream stream) const {
  void* parameters[] = {&data, &bytes, &crc};
  const uint64_t per_block = kThreads * kCrcBytesPerThread;
  return launch(crc32c_, "rdmaload_crc32c", bytes / per_block + (bytes % per_block != 0), stream, parameters);
}

Status Kernels::convert(cuda::Pointer from, FloatType from_type, cuda::Pointer to, FloatType to_type,
                        uint64_t count, cuda::Stream stream) const {
  auto from_code = static_cast<uint32_t>(from_type);
  auto to_code = static_cast<uint32_t>(to_type);
  void* parameters[] = {&from, &from_code, &to, &to_code, &count};
  return launch(convert_, "rdmaload_convert", (count + kThreads - 1) / kThreads, stream, parameters);
}

}  // namespace rdmaload
