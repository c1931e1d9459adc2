#include "device/cufile.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <optional>

namespace rdmaload {
namespace {

// What cuFile pins; a buffer that begins elsewhere is read into through its own bounce buffers.
constexpr size_t kGpuPageBytes = 64 << 10;

std::mutex process_mutex;
std::string* process_library = nullptr;  // Guarded by process_mutex, as all here; never destroyed.
const CuFile* process_cufile = nullptr;
std::optional<Status>& process_failure() {
  static auto* failure = new std::optional<Status>;
  return *failure;
}

const char* text_of(int code) {
  switch (code) {
    case cufile::kDriverNotInitialized:
      return "the nvidia-fs driver is not loaded";
    case cufile::kPlatformNotSupported:
      return "GPUDirect Storage does not support this machine";
    case cufile::kIoNotSupported:
      return "GPUDirect Storage does not support this file's file system or disk";
    case cufile::kDeviceNotSupported:
      return "GPUDirect Storage does not support this GPU";
    case cufile::kCudaDriverError:
      return "an error of the CUDA driver";
    case cufile::kInvalidFileOpenFlag:
    case cufile::kDirectIoNotSet:
      return "the file is not open for direct reads";
    case cufile::kGpuMemoryPinningFailed:
      return "no GPU memory could be pinned";
    default:
      return "an error of cuFile";
  }
}

}  // namespace

const CuFile& CuFile::process() {
  std::lock_guard lock(process_mutex);
  if (process_cufile != nullptr) return *process_cufile;
  std::optional<Status>& failure = process_failure();
  if (failure) throw Error(failure->code(), failure->message());
  try {
    process_cufile = new CuFile(process_library != nullptr ? *process_library : std::string(kDefaultLibrary));
  } catch (const Error& error) {
    failure = Status::from(error);
    throw;
  }
  return *process_cufile;
}

void CuFile::set_process_library(const std::string& library) {
  std::lock_guard lock(process_mutex);
  delete process_library;
  process_library = new std::string(library);
  process_cufile = nullptr;  // never destroyed: transports may still use it
  process_failure().reset();
}

CuFile::CuFile(const std::string& library) {
  // Never closed: it may have threads of its own.
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    throw Error(ErrorCode::kNotSupported, "no GPUDirect Storage: " + library + " cannot be opened (" +
                                              (why != nullptr ? why : "unknown reason") + ")");
  }
#define RDMALOAD_CUFILE_FIND(field, symbol, result, parameters) \
  field = reinterpret_cast<result(*) parameters>(dlsym(handle, symbol));
  RDMALOAD_CUFILE_OPTIONAL(RDMALOAD_CUFILE_FIND)
#undef RDMALOAD_CUFILE_FIND
#define RDMALOAD_CUFILE_FIND(field, symbol, result, parameters)                                    \
  field = reinterpret_cast<result(*) parameters>(dlsym(handle, symbol));                           \
  if (field == nullptr) {                                                                          \
    throw Error(ErrorCode::kNotSupported, "no GPUDirect Storage: " + library + " has no " symbol); \
  }
  RDMALOAD_CUFILE_REQUIRED(RDMALOAD_CUFILE_FIND)
#undef RDMALOAD_CUFILE_FIND
  open_without_compatibility_mode();
}

void CuFile::open_without_compatibility_mode() {
  bool turned_off = false;
  if (use_count() == 0) {
    turned_off =
        set_bool != nullptr && set_bool(cufile::kParameterAllowCompatMode, false).code == cufile::kSuccess;
    if (const cufile::Error opened = driver_open(); opened.code != cufile::kSuccess) {
      if (turned_off) set_bool(cufile::kParameterAllowCompatMode, true);  // for others in this process
      throw Error(ErrorCode::kNotSupported, "no GPUDirect Storage: " + describe("cuFileDriverOpen", opened));
    }
  }
  cufile::Properties properties{};
  const cufile::Error asked = driver_properties(&properties);
  if (asked.code != cufile::kSuccess) {
    throw Error(ErrorCode::kNotSupported,
                "no GPUDirect Storage: " + describe("cuFileDriverGetProperties", asked));
  }
  if ((properties.control_flags >> cufile::kControlAllowCompatMode & 1) != 0) {
    throw Error(
        ErrorCode::kNotSupported,
        "no GPUDirect Storage: cuFile runs with its compatibility mode here, which reads through host "
        "memory unseen: set CUFILE_ALLOW_COMPAT_MODE=false");
  }
}

std::string CuFile::describe(std::string_view call, cufile::Error error) {
  std::string text = std::string(call) + ": " + text_of(error.code) + " (" + std::to_string(error.code);
  if (error.code == cufile::kCudaDriverError) text += ", CUDA " + std::to_string(error.cuda);
  return text + ")";
}

CuFileHandle::CuFileHandle(const CuFile& cufile, const Device& device, int direct_fd)
    : cufile_(cufile), device_(device) {
  cufile::Descriptor descriptor{};
  descriptor.type = cufile::kHandleTypeFd;
  descriptor.fd = direct_fd;
  const DeviceGuard guard(device);  // cuFile makes driver calls of its own
  const cufile::Error error = cufile.handle_register(&handle_, &descriptor);
  if (error.code != cufile::kSuccess) {
    throw Error(ErrorCode::kNotSupported, CuFile::describe("cuFileHandleRegister", error));
  }
}

CuFileHandle::~CuFileHandle() {
  if (const ReleaseGuard guard(device_); guard) cufile_.handle_deregister(handle_);
}

CuFileBuffer::CuFileBuffer(const CuFile& cufile, const Device& device, size_t bytes)
    : cufile_(cufile),
      device_(device),
      memory_(device, bytes + kGpuPageBytes),
      data_((memory_.data() + kGpuPageBytes - 1) / kGpuPageBytes * kGpuPageBytes) {
  const DeviceGuard guard(device);
  const cufile::Error error = cufile.buffer_register(reinterpret_cast<void*>(data_), bytes, 0);
  if (error.code != cufile::kSuccess) {
    throw Error(ErrorCode::kNotSupported, CuFile::describe("cuFileBufRegister", error));
  }
}

CuFileBuffer::~CuFileBuffer() {
  if (const ReleaseGuard guard(device_); guard) cufile_.buffer_deregister(reinterpret_cast<void*>(data_));
}

}  // namespace rdmaload
