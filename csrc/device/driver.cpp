#include "device/driver.h"

#include <dlfcn.h>
#include <unistd.h>

#include <mutex>

#include "device/kernel_image.h"

namespace rdmaload {
namespace {

std::mutex process_mutex;
const Driver* process_driver = nullptr;  // Guarded by process_mutex. Never destroyed.

// Errors of kernels and copies that stay with the context.
bool loses_context(cuda::Result result) {
  return result == cuda::kIllegalAddress ||
         (result >= cuda::kHardwareStackError && result <= cuda::kContextLastError);
}

}  // namespace

const Driver& Driver::process() {
  std::lock_guard lock(process_mutex);
  if (process_driver == nullptr) {
    process_driver = new Driver(std::string(kDefaultLibrary), embedded_kernel_image());
  }
  return *process_driver;
}

const Driver& Driver::open_process(const std::string& library, std::span<const std::byte> kernel_image) {
  std::lock_guard lock(process_mutex);
  if (process_driver == nullptr) process_driver = new Driver(library, kernel_image);
  if (process_driver->library() != library) {
    throw Error(ErrorCode::kInvalid, "this process uses the CUDA driver " + process_driver->library() +
                                         " already, not " + library);
  }
  return *process_driver;
}

Driver::Driver(const std::string& library, std::span<const std::byte> kernel_image)
    : library_(library), kernel_image_(kernel_image), opener_(getpid()) {
  // Never closed: the driver starts threads of its own.
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    throw Error(ErrorCode::kNotSupported, "no CUDA driver: " + library + " cannot be opened (" +
                                              (why != nullptr ? why : "unknown reason") +
                                              "); install NVIDIA's driver, or load to the CPU");
  }
#define RDMALOAD_CUDA_FIND(field, symbol, parameters) \
  field = reinterpret_cast<cuda::Result(*) parameters>(dlsym(handle, symbol));
  RDMALOAD_CUDA_OPTIONAL(RDMALOAD_CUDA_FIND)
#undef RDMALOAD_CUDA_FIND
#define RDMALOAD_CUDA_FIND(field, symbol, parameters)                                    \
  field = reinterpret_cast<cuda::Result(*) parameters>(dlsym(handle, symbol));           \
  if (field == nullptr) {                                                                \
    throw Error(ErrorCode::kNotSupported,                                                \
                library + " has no " symbol ": a driver of CUDA 11 or later is needed"); \
  }
  RDMALOAD_CUDA_REQUIRED(RDMALOAD_CUDA_FIND)
#undef RDMALOAD_CUDA_FIND
  check("cuInit", init(0));
}

int Driver::version() const {
  int version = 0;
  check("cuDriverGetVersion", driver_version(&version));
  return version;
}

int Driver::device_count() const {
  int count = 0;
  check("cuDeviceGetCount", device_count_raw(&count));
  return count;
}

std::string Driver::describe(std::string_view call, cuda::Result result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (error_name(result, &name) != cuda::kSuccess || name == nullptr) name = "unknown error";
  if (error_string(result, &text) != cuda::kSuccess || text == nullptr)
    text = "the driver does not know this code";
  std::string message = std::string(call) + ": " + name + " (" + std::to_string(result) + "): " + text;
  if (loses_context(result)) message += "; this process cannot use the device any more: start another one";
  return message;
}

Status Driver::status(std::string_view call, cuda::Result result) const {
  return result == cuda::kSuccess ? Status() : Status(ErrorCode::kDevice, describe(call, result));
}

bool Driver::is_opener() const noexcept { return getpid() == opener_; }

void Driver::check_process() const {
  if (!is_opener()) {
    throw Error(
        ErrorCode::kDevice,
        "this process was forked from one that had used CUDA, which does not survive a fork: start worker "
        "processes with the \"spawn\" method");
  }
}

}  // namespace rdmaload
