// The part of cuFile's binary interface (GPUDirect Storage) that this library calls, written down here so
// that it builds without CUDA's toolkit. tests/cpp/device/cuda_abi_test.cpp compares it with NVIDIA's header
// where there is one.
#pragma once

#include <sys/types.h>

#include <cstddef>

namespace rdmaload::cufile {

// Returned by value: two words.
struct Error {
  int code;  // CUfileOpError; 0 is success
  int cuda;  // CUresult where the code says so
};

using Handle = void*;

constexpr int kSuccess = 0;
constexpr int kFirstError = 5000;  // codes are above it; other failures of reads are of the file system
constexpr int kDriverNotInitialized = 5001;
constexpr int kPlatformNotSupported = 5007;
constexpr int kIoNotSupported = 5008;
constexpr int kDeviceNotSupported = 5009;
constexpr int kCudaDriverError = 5011;
constexpr int kInvalidFileOpenFlag = 5019;
constexpr int kDirectIoNotSet = 5020;
constexpr int kInvalidValue = 5022;
constexpr int kMemoryAlreadyRegistered = 5023;
constexpr int kMemoryNotRegistered = 5024;
constexpr int kHandleAlreadyRegistered = 5028;
constexpr int kGpuMemoryPinningFailed = 5036;
constexpr int kIoError = 5044;

constexpr int kHandleTypeFd = 1;              // CU_FILE_HANDLE_TYPE_OPAQUE_FD
constexpr int kParameterAllowCompatMode = 1;  // CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE
constexpr int kControlAllowCompatMode = 1;    // CU_FILE_ALLOW_COMPAT_MODE, a bit of Properties::control_flags

struct Descriptor {
  int type;
  union {
    int fd;
    void* handle;
  };
  const void* operations;
};

struct Properties {
  unsigned major_version;  // of nvidia-fs, as all that follows up to control_flags
  unsigned minor_version;
  size_t poll_threshold;
  size_t max_direct_io;
  unsigned status_flags;
  unsigned control_flags;
  unsigned feature_flags;
  unsigned rest[32];  // later versions add fields: room for them
};

}  // namespace rdmaload::cufile

// Every entry point: field name, exported symbol, result, parameters.
#define RDMALOAD_CUFILE_REQUIRED(X)                                                                     \
  X(driver_open, "cuFileDriverOpen", cufile::Error, ())                                                 \
  X(use_count, "cuFileUseCount", long, ())                                                              \
  X(driver_properties, "cuFileDriverGetProperties", cufile::Error, (cufile::Properties * properties))   \
  X(handle_register, "cuFileHandleRegister", cufile::Error,                                             \
    (cufile::Handle * handle, cufile::Descriptor * descriptor))                                         \
  X(handle_deregister, "cuFileHandleDeregister", void, (cufile::Handle handle))                         \
  X(buffer_register, "cuFileBufRegister", cufile::Error, (const void* buffer, size_t bytes, int flags)) \
  X(buffer_deregister, "cuFileBufDeregister", cufile::Error, (const void* buffer))                      \
  X(read, "cuFileRead", ssize_t,                                                                        \
    (cufile::Handle handle, void* buffer, size_t bytes, off_t file_offset, off_t buffer_offset))
// CUDA 12.8; nullptr in older ones.
#define RDMALOAD_CUFILE_OPTIONAL(X) \
  X(set_bool, "cuFileSetParameterBool", cufile::Error, (int parameter, bool value))
