// The CUDA driver, opened at run time: a table of its functions, and its errors as ours.
//
// One table serves the process. It is made at first use and never destroyed, because driver calls during and
// after the end of main are undefined. A process that was forked after that first use cannot use CUDA: every
// call through check_process() says so. Any thread may use it.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "core/error.h"
#include "device/cuda_abi.h"

namespace rdmaload {

class Driver {
 public:
  static constexpr std::string_view kDefaultLibrary = "libcuda.so.1";

  // The process's driver. Throws kNotSupported, naming the library, where there is none; then the next call
  // tries again.
  static const Driver& process();
  // Before first use: another library, and another image of kernels, than the built-in ones. Throws kInvalid
  // when the process has opened another library already.
  static const Driver& open_process(const std::string& library, std::span<const std::byte> kernel_image);

  Driver(const std::string& library, std::span<const std::byte> kernel_image);
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  const std::string& library() const noexcept { return library_; }
  // What cuModuleLoadDataEx gets; empty where the build had no nvcc.
  std::span<const std::byte> kernel_image() const noexcept { return kernel_image_; }
  int version() const;  // such as 13000 for CUDA 13.0
  int device_count() const;

  // "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory".
  std::string describe(std::string_view call, cuda::Result result) const;
  Status status(std::string_view call, cuda::Result result) const;  // kDevice unless success
  void check(std::string_view call, cuda::Result result) const {
    if (result != cuda::kSuccess) throw Error(ErrorCode::kDevice, describe(call, result));
  }
  // Throws kDevice in a process that was forked from the one that opened the driver.
  void check_process() const;
  bool is_opener() const noexcept;

#define RDMALOAD_CUDA_FIELD(field, symbol, parameters) cuda::Result(*field) parameters = nullptr;
  RDMALOAD_CUDA_REQUIRED(RDMALOAD_CUDA_FIELD)
  RDMALOAD_CUDA_OPTIONAL(RDMALOAD_CUDA_FIELD)
#undef RDMALOAD_CUDA_FIELD

 private:
  const std::string library_;
  const std::span<const std::byte> kernel_image_;
  const pid_t opener_;
};

}  // namespace rdmaload
