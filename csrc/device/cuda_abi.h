// The part of the CUDA driver's binary interface that this library calls, written down here so that it builds
// on a machine without CUDA. tests/cpp/device/cuda_abi_test.cpp compares it with NVIDIA's header where there
// is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rdmaload::cuda {

using Result = int;  // CUresult; 0 is success
using Device = int;
using Pointer = unsigned long long;  // CUdeviceptr
struct ContextHandle;
struct StreamHandle;
struct EventHandle;
struct ModuleHandle;
struct FunctionHandle;
using Context = ContextHandle*;
using Stream = StreamHandle*;  // nullptr: the context's default stream
using Event = EventHandle*;
using Module = ModuleHandle*;
using Function = FunctionHandle*;

constexpr Result kSuccess = 0;
constexpr Result kInvalidValue = 1;
constexpr Result kOutOfMemory = 2;
constexpr Result kNotInitialized = 3;
constexpr Result kNoDevice = 100;
constexpr Result kInvalidDevice = 101;
constexpr Result kInvalidContext = 201;
constexpr Result kNoBinaryForGpu = 209;
constexpr Result kInvalidPtx = 218;
constexpr Result kUnsupportedPtxVersion = 222;
constexpr Result kInvalidHandle = 400;
constexpr Result kNotFound = 500;
constexpr Result kNotReady = 600;
constexpr Result kIllegalAddress = 700;
constexpr Result kHostMemoryAlreadyRegistered = 712;
constexpr Result kHostMemoryNotRegistered = 713;
constexpr Result kHardwareStackError = 714;
constexpr Result kContextLastError = 719;  // with those from kHardwareStackError on: the context is lost
constexpr Result kNotSupported = 801;
constexpr Result kStreamCaptureUnsupported = 900;

constexpr unsigned kMemHostAllocPortable = 1;     // CU_MEMHOSTALLOC_PORTABLE
constexpr unsigned kMemHostRegisterPortable = 1;  // CU_MEMHOSTREGISTER_PORTABLE
constexpr unsigned kStreamNonBlocking = 1;        // CU_STREAM_NON_BLOCKING
constexpr unsigned kEventBlockingSync = 1;        // CU_EVENT_BLOCKING_SYNC
constexpr unsigned kEventDisableTiming = 2;       // CU_EVENT_DISABLE_TIMING

constexpr int kAttributePciBus = 33;
constexpr int kAttributePciDevice = 34;
constexpr int kAttributePciDomain = 50;

constexpr int kCaptureModeGlobal = 0;   // CU_STREAM_CAPTURE_MODE_GLOBAL, what a thread begins with
constexpr int kCaptureModeRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr int kCaptureStatusNone = 0;   // CU_STREAM_CAPTURE_STATUS_NONE

constexpr int kAttributeComputeMajor = 75;
constexpr int kAttributeComputeMinor = 76;
constexpr int kAttributeGpuDirectSupported = 116;
constexpr int kAttributeFlushWritesOptions = 117;
constexpr int kAttributeWritesOrdering = 118;
constexpr int kAttributeDmaBufSupported = 124;

constexpr int kPointerAttributeSyncMemops = 6;
constexpr int kHandleTypeDmaBufFd = 1;
constexpr int kFlushOptionHost = 1;
constexpr int kOrderingOwner = 100;
constexpr int kFlushTargetCurrentContext = 0;
constexpr int kFlushToOwner = 100;

}  // namespace rdmaload::cuda

// Every entry point: field name, exported symbol, parameters. All return a Result. The symbols carry the
// version suffix of the signature given here; they are exported by every driver from CUDA 11.0 on.
#define RDMALOAD_CUDA_REQUIRED(X)                                                                            \
  X(init, "cuInit", (unsigned flags))                                                                        \
  X(driver_version, "cuDriverGetVersion", (int* version))                                                    \
  X(error_name, "cuGetErrorName", (cuda::Result result, const char** text))                                  \
  X(error_string, "cuGetErrorString", (cuda::Result result, const char** text))                              \
  X(device_count_raw, "cuDeviceGetCount", (int* count))                                                      \
  X(device_get, "cuDeviceGet", (cuda::Device * device, int ordinal))                                         \
  X(device_name, "cuDeviceGetName", (char* name, int size, cuda::Device device))                             \
  X(device_attribute, "cuDeviceGetAttribute", (int* value, int attribute, cuda::Device device))              \
  X(context_retain, "cuDevicePrimaryCtxRetain", (cuda::Context * context, cuda::Device device))              \
  X(context_push, "cuCtxPushCurrent_v2", (cuda::Context context))                                            \
  X(context_pop, "cuCtxPopCurrent_v2", (cuda::Context * context))                                            \
  X(memory_info, "cuMemGetInfo_v2", (size_t* free_bytes, size_t* total_bytes))                               \
  X(memory_alloc, "cuMemAlloc_v2", (cuda::Pointer * pointer, size_t bytes))                                  \
  X(memory_free, "cuMemFree_v2", (cuda::Pointer pointer))                                                    \
  X(host_alloc, "cuMemHostAlloc", (void** pointer, size_t bytes, unsigned flags))                            \
  X(host_free, "cuMemFreeHost", (void* pointer))                                                             \
  X(host_register, "cuMemHostRegister_v2", (void* pointer, size_t bytes, unsigned flags))                    \
  X(host_unregister, "cuMemHostUnregister", (void* pointer))                                                 \
  X(copy_to_device, "cuMemcpyHtoDAsync_v2",                                                                  \
    (cuda::Pointer to, const void* from, size_t bytes, cuda::Stream stream))                                 \
  X(copy_to_host, "cuMemcpyDtoHAsync_v2", (void* to, cuda::Pointer from, size_t bytes, cuda::Stream stream)) \
  X(copy_on_device, "cuMemcpyDtoDAsync_v2",                                                                  \
    (cuda::Pointer to, cuda::Pointer from, size_t bytes, cuda::Stream stream))                               \
  X(fill_words, "cuMemsetD32Async", (cuda::Pointer to, unsigned value, size_t count, cuda::Stream stream))   \
  X(stream_create, "cuStreamCreate", (cuda::Stream * stream, unsigned flags))                                \
  X(stream_destroy, "cuStreamDestroy_v2", (cuda::Stream stream))                                             \
  X(stream_synchronize, "cuStreamSynchronize", (cuda::Stream stream))                                        \
  X(stream_wait_event, "cuStreamWaitEvent", (cuda::Stream stream, cuda::Event event, unsigned flags))        \
  X(event_create, "cuEventCreate", (cuda::Event * event, unsigned flags))                                    \
  X(event_destroy, "cuEventDestroy_v2", (cuda::Event event))                                                 \
  X(event_record, "cuEventRecord", (cuda::Event event, cuda::Stream stream))                                 \
  X(event_query, "cuEventQuery", (cuda::Event event))                                                        \
  X(event_synchronize, "cuEventSynchronize", (cuda::Event event))                                            \
  X(module_load, "cuModuleLoadDataEx",                                                                       \
    (cuda::Module * module, const void* image, unsigned count, int* options, void** values))                 \
  X(module_function, "cuModuleGetFunction",                                                                  \
    (cuda::Function * function, cuda::Module module, const char* name))                                      \
  X(launch, "cuLaunchKernel",                                                                                \
    (cuda::Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,           \
     unsigned block_y, unsigned block_z, unsigned shared_bytes, cuda::Stream stream, void** parameters,      \
     void** extra))                                                                                          \
  X(pointer_set_attribute, "cuPointerSetAttribute", (const void* value, int attribute, cuda::Pointer pointer))

// Newer ones, nullptr where the driver lacks them (CUDA 10.0, 10.1, 11.7 and 11.3), and one that only saves
// work.
#define RDMALOAD_CUDA_OPTIONAL(X)                                                                           \
  X(stream_is_capturing, "cuStreamIsCapturing", (cuda::Stream stream, int* status))                         \
  X(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", (int* mode))                                \
  X(handle_for_range, "cuMemGetHandleForAddressRange",                                                      \
    (void* handle, cuda::Pointer pointer, size_t bytes, int type, unsigned long long flags))                \
  X(address_range, "cuMemGetAddressRange_v2", (cuda::Pointer * base, size_t* bytes, cuda::Pointer pointer)) \
  X(flush_gpudirect, "cuFlushGPUDirectRDMAWrites", (int target, int scope))
