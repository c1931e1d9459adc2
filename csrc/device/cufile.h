// GPUDirect Storage: files read into GPU memory by the disk's or the network card's own DMA, through NVIDIA's
// cuFile, opened at run time.
//
// cuFile has a compatibility mode, in which it reads into host memory and copies: worse than what this
// library does itself. NVIDIA documents no way to ask of a read which of the two it was, but does say what
// happens without that mode: opening and registering fail where the direct way is missing. So it is used
// without: where nobody in the process has opened cuFile, the mode is turned off first (and on again if
// cuFile then does not open); where somebody has, with that mode, cuFile is left alone.
//
// One table serves the process, is made at first use and never destroyed. cuFile does not survive a fork; the
// CUDA driver's table says so before anything here is called. Any thread may use it.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "device/cufile_abi.h"
#include "device/device_memory.h"

namespace rdmaload {

class CuFile {
 public:
  static constexpr std::string_view kDefaultLibrary = "libcufile.so.0";

  // The process's. Throws kNotSupported with what is missing, the same again at later calls.
  static const CuFile& process();
  // Another library than the default from now on, and another attempt.
  static void set_process_library(const std::string& library);

  explicit CuFile(const std::string& library);
  CuFile(const CuFile&) = delete;
  CuFile& operator=(const CuFile&) = delete;

  // "cuFileHandleRegister: GPUDirect Storage does not support this file (5008)".
  static std::string describe(std::string_view call, cufile::Error error);

#define RDMALOAD_CUFILE_FIELD(field, symbol, result, parameters) result(*field) parameters = nullptr;
  RDMALOAD_CUFILE_REQUIRED(RDMALOAD_CUFILE_FIELD)
  RDMALOAD_CUFILE_OPTIONAL(RDMALOAD_CUFILE_FIELD)
#undef RDMALOAD_CUFILE_FIELD

 private:
  void open_without_compatibility_mode();
};

// A file that cuFile reads directly, on a descriptor of its own (which stays the caller's to close later).
class CuFileHandle {
 public:
  // Throws kNotSupported when it cannot be read directly.
  CuFileHandle(const CuFile& cufile, const Device& device, int direct_fd);
  ~CuFileHandle();
  CuFileHandle(const CuFileHandle&) = delete;
  CuFileHandle& operator=(const CuFileHandle&) = delete;
  cufile::Handle get() const noexcept { return handle_; }

 private:
  const CuFile& cufile_;
  const Device& device_;
  cufile::Handle handle_ = nullptr;
};

// Device memory that cuFile writes to, registered as a whole; it begins at a page of the GPU's.
class CuFileBuffer {
 public:
  // Throws kDevice without room for it, kNotSupported when it cannot be registered.
  CuFileBuffer(const CuFile& cufile, const Device& device, size_t bytes);
  ~CuFileBuffer();
  CuFileBuffer(const CuFileBuffer&) = delete;
  CuFileBuffer& operator=(const CuFileBuffer&) = delete;
  cuda::Pointer data() const noexcept { return data_; }

 private:
  const CuFile& cufile_;
  const Device& device_;
  DeviceBuffer memory_;
  cuda::Pointer data_ = 0;
};

}  // namespace rdmaload
