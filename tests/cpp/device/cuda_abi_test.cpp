// csrc/device/cuda_abi.h and cufile_abi.h against NVIDIA's own headers, at compile time, where those are
// installed.
#if __has_include(<cuda.h>)
#include <cuda.h>

#include <string_view>
#include <type_traits>

#include "device/cuda_abi.h"

namespace rdmaload {
namespace {

static_assert(sizeof(CUdeviceptr) == sizeof(cuda::Pointer) && std::is_same_v<CUdeviceptr, cuda::Pointer>);
static_assert(std::is_same_v<CUdevice, cuda::Device>);
static_assert(sizeof(CUresult) == sizeof(cuda::Result));
static_assert(CUDA_ERROR_INVALID_VALUE == cuda::kInvalidValue);
static_assert(CUDA_ERROR_OUT_OF_MEMORY == cuda::kOutOfMemory);
static_assert(CUDA_ERROR_NOT_INITIALIZED == cuda::kNotInitialized);
static_assert(CUDA_ERROR_NO_DEVICE == cuda::kNoDevice);
static_assert(CUDA_ERROR_INVALID_DEVICE == cuda::kInvalidDevice);
static_assert(CUDA_ERROR_INVALID_CONTEXT == cuda::kInvalidContext);
static_assert(CUDA_ERROR_NO_BINARY_FOR_GPU == cuda::kNoBinaryForGpu);
static_assert(CUDA_ERROR_INVALID_PTX == cuda::kInvalidPtx);
static_assert(CUDA_ERROR_UNSUPPORTED_PTX_VERSION == cuda::kUnsupportedPtxVersion);
static_assert(CUDA_ERROR_HARDWARE_STACK_ERROR == cuda::kHardwareStackError);
static_assert(CUDA_ERROR_LAUNCH_FAILED == cuda::kContextLastError);
static_assert(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED == cuda::kStreamCaptureUnsupported);
static_assert(CU_STREAM_CAPTURE_MODE_GLOBAL == cuda::kCaptureModeGlobal);
static_assert(CU_STREAM_CAPTURE_MODE_RELAXED == cuda::kCaptureModeRelaxed);
static_assert(CU_STREAM_CAPTURE_STATUS_NONE == cuda::kCaptureStatusNone);
static_assert(sizeof(CUstreamCaptureMode) == sizeof(int) && sizeof(CUstreamCaptureStatus) == sizeof(int));
static_assert(CUDA_ERROR_INVALID_HANDLE == cuda::kInvalidHandle);
static_assert(CUDA_ERROR_NOT_FOUND == cuda::kNotFound);
static_assert(CUDA_ERROR_NOT_READY == cuda::kNotReady);
static_assert(CUDA_ERROR_ILLEGAL_ADDRESS == cuda::kIllegalAddress);
static_assert(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED == cuda::kHostMemoryAlreadyRegistered);
static_assert(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED == cuda::kHostMemoryNotRegistered);
static_assert(CUDA_ERROR_NOT_SUPPORTED == cuda::kNotSupported);
static_assert(CU_MEMHOSTALLOC_PORTABLE == cuda::kMemHostAllocPortable);
static_assert(CU_MEMHOSTREGISTER_PORTABLE == cuda::kMemHostRegisterPortable);
static_assert(CU_STREAM_NON_BLOCKING == cuda::kStreamNonBlocking);
static_assert(CU_EVENT_BLOCKING_SYNC == cuda::kEventBlockingSync);
static_assert(CU_EVENT_DISABLE_TIMING == cuda::kEventDisableTiming);
static_assert(CU_DEVICE_ATTRIBUTE_PCI_BUS_ID == cuda::kAttributePciBus);
static_assert(CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID == cuda::kAttributePciDevice);
static_assert(CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID == cuda::kAttributePciDomain);
static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == cuda::kAttributeComputeMajor);
static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == cuda::kAttributeComputeMinor);
static_assert(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED == cuda::kAttributeGpuDirectSupported);
static_assert(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS == cuda::kAttributeFlushWritesOptions);
static_assert(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING == cuda::kAttributeWritesOrdering);
static_assert(CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED == cuda::kAttributeDmaBufSupported);
static_assert(CU_POINTER_ATTRIBUTE_SYNC_MEMOPS == cuda::kPointerAttributeSyncMemops);
static_assert(CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD == cuda::kHandleTypeDmaBufFd);
static_assert(CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST == cuda::kFlushOptionHost);
static_assert(CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER == cuda::kOrderingOwner);
static_assert(CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX == cuda::kFlushTargetCurrentContext);
static_assert(CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER == cuda::kFlushToOwner);

// Ours and theirs have the same number of parameters of the same sizes: handles are pointers in both.
template <typename A, typename B>
struct SameShape : std::false_type {};
template <typename... A, typename... B>
struct SameShape<cuda::Result (*)(A...), CUresult (*)(B...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(A) != sizeof...(B)) {
      return false;
    } else {
      return ((sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>) && ...);
    }
  }();
};

// cuda.h maps the plain names to the versioned ones: the text of a symbol must be what the macro gives.
// cuGetProcAddress and its like are macros too, so each name is spelled out once here.
#define TEXT_OF_(name) #name
#define TEXT_OF(name) TEXT_OF_(name)
#define CHECK_ENTRY(field, function)                                                    \
  static_assert(SameShape<decltype(Table::field), decltype(&function)>::value, #field); \
  static_assert(std::string_view(Table::field##_symbol) == TEXT_OF(function), #field)
struct Table {
#define FIELD(field, symbol, parameters) \
  cuda::Result(*field) parameters;       \
  static constexpr std::string_view field##_symbol = symbol;
  RDMALOAD_CUDA_REQUIRED(FIELD)
  RDMALOAD_CUDA_OPTIONAL(FIELD)
#undef FIELD
};

CHECK_ENTRY(init, cuInit);
CHECK_ENTRY(driver_version, cuDriverGetVersion);
CHECK_ENTRY(error_name, cuGetErrorName);
CHECK_ENTRY(error_string, cuGetErrorString);
CHECK_ENTRY(device_count_raw, cuDeviceGetCount);
CHECK_ENTRY(device_get, cuDeviceGet);
CHECK_ENTRY(device_name, cuDeviceGetName);
CHECK_ENTRY(context_retain, cuDevicePrimaryCtxRetain);
CHECK_ENTRY(context_push, cuCtxPushCurrent);
CHECK_ENTRY(context_pop, cuCtxPopCurrent);
CHECK_ENTRY(memory_info, cuMemGetInfo);
CHECK_ENTRY(memory_alloc, cuMemAlloc);
CHECK_ENTRY(memory_free, cuMemFree);
CHECK_ENTRY(host_alloc, cuMemHostAlloc);
CHECK_ENTRY(host_free, cuMemFreeHost);
CHECK_ENTRY(host_register, cuMemHostRegister);
CHECK_ENTRY(host_unregister, cuMemHostUnregister);
CHECK_ENTRY(copy_to_device, cuMemcpyHtoDAsync);
CHECK_ENTRY(copy_to_host, cuMemcpyDtoHAsync);
CHECK_ENTRY(copy_on_device, cuMemcpyDtoDAsync);
CHECK_ENTRY(fill_words, cuMemsetD32Async);
CHECK_ENTRY(stream_create, cuStreamCreate);
CHECK_ENTRY(stream_destroy, cuStreamDestroy);
CHECK_ENTRY(stream_synchronize, cuStreamSynchronize);
CHECK_ENTRY(stream_wait_event, cuStreamWaitEvent);
CHECK_ENTRY(event_create, cuEventCreate);
CHECK_ENTRY(event_destroy, cuEventDestroy);
CHECK_ENTRY(event_record, cuEventRecord);
CHECK_ENTRY(event_query, cuEventQuery);
CHECK_ENTRY(event_synchronize, cuEventSynchronize);
CHECK_ENTRY(module_load, cuModuleLoadDataEx);
CHECK_ENTRY(module_function, cuModuleGetFunction);
CHECK_ENTRY(launch, cuLaunchKernel);
CHECK_ENTRY(pointer_set_attribute, cuPointerSetAttribute);
CHECK_ENTRY(stream_is_capturing, cuStreamIsCapturing);
CHECK_ENTRY(exchange_capture_mode, cuThreadExchangeStreamCaptureMode);
#if CUDA_VERSION >= 11070
CHECK_ENTRY(handle_for_range, cuMemGetHandleForAddressRange);
CHECK_ENTRY(flush_gpudirect, cuFlushGPUDirectRDMAWrites);
CHECK_ENTRY(address_range, cuMemGetAddressRange_v2);
#endif

}  // namespace
}  // namespace rdmaload
#endif

#if __has_include(<cuda.h>) && __has_include(<cufile.h>)
#include <cufile.h>

#include <cstddef>

#include "device/cufile_abi.h"

namespace rdmaload {
namespace {

static_assert(sizeof(CUfileError_t) == sizeof(cufile::Error) &&
              offsetof(CUfileError_t, cu_err) == offsetof(cufile::Error, cuda));
static_assert(sizeof(CUfileDescr_t) == sizeof(cufile::Descriptor) &&
              offsetof(CUfileDescr_t, handle) == offsetof(cufile::Descriptor, fd) &&
              offsetof(CUfileDescr_t, fs_ops) == offsetof(cufile::Descriptor, operations));
static_assert(sizeof(CUfileDrvProps_t) <= sizeof(cufile::Properties) &&
              offsetof(CUfileDrvProps_t, nvfs.dcontrolflags) == offsetof(cufile::Properties, control_flags) &&
              offsetof(CUfileDrvProps_t, fflags) == offsetof(cufile::Properties, feature_flags));
static_assert(CU_FILE_DRIVER_NOT_INITIALIZED == cufile::kDriverNotInitialized);
static_assert(CU_FILE_PLATFORM_NOT_SUPPORTED == cufile::kPlatformNotSupported);
static_assert(CU_FILE_IO_NOT_SUPPORTED == cufile::kIoNotSupported);
static_assert(CU_FILE_DEVICE_NOT_SUPPORTED == cufile::kDeviceNotSupported);
static_assert(CU_FILE_CUDA_DRIVER_ERROR == cufile::kCudaDriverError);
static_assert(CU_FILE_INVALID_FILE_OPEN_FLAG == cufile::kInvalidFileOpenFlag);
static_assert(CU_FILE_DIO_NOT_SET == cufile::kDirectIoNotSet);
static_assert(CU_FILE_INVALID_VALUE == cufile::kInvalidValue);
static_assert(CU_FILE_MEMORY_ALREADY_REGISTERED == cufile::kMemoryAlreadyRegistered);
static_assert(CU_FILE_MEMORY_NOT_REGISTERED == cufile::kMemoryNotRegistered);
static_assert(CU_FILE_HANDLE_ALREADY_REGISTERED == cufile::kHandleAlreadyRegistered);
static_assert(CU_FILE_GPU_MEMORY_PINNING_FAILED == cufile::kGpuMemoryPinningFailed);
static_assert(CU_FILE_IO_ERROR == cufile::kIoError);
static_assert(CU_FILE_HANDLE_TYPE_OPAQUE_FD == cufile::kHandleTypeFd);
static_assert(CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE == cufile::kParameterAllowCompatMode);
static_assert(CU_FILE_ALLOW_COMPAT_MODE == cufile::kControlAllowCompatMode);

}  // namespace
}  // namespace rdmaload
#endif
