// A CUDA driver without a GPU: the entry points that this library uses, over host memory.
//
// It is late on purpose. Each stream is a thread that does its copies and kernels one by one after random
// pauses, so that what nobody waited for is not there yet; events fire when their turn comes; freed memory is
// poisoned and kept aside, and touching it breaks the context as a bad address does on a GPU. Page-locked
// memory is read when the copy runs, other host memory when it is enqueued, as the real driver does it. It
// shows missing waits and wrong lifetimes; it says nothing about the kernels themselves, whose place host
// references take (kernels.cpp).
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "device/cuda_abi.h"
#include "support/fake_cuda/control.h"
#include "support/fake_cuda/internal.h"
#include "support/fake_cuda/kernels.h"

namespace cuda = rdmaload::cuda;

namespace {

constexpr int kDevices = 2;
constexpr int kPoisonAlloc = 0xa7, kPoisonFree = 0xdd;

struct Range {
  size_t size;
  bool freed = false;
  int device = -1;    // -1: page-locked host memory
  bool owned = true;  // false: registered memory of the caller
};

struct EventState {
  uint64_t recorded = 0;
  uint64_t fired = 0;
};

struct StreamState {
  int device = 0;
  std::deque<std::function<void()>> work;  // Guarded by the driver's mutex, as all here.
  bool busy = false;
  bool stop = false;
  std::thread thread;
};

struct ContextState {
  int device;
};

thread_local std::vector<cuda::Context> context_stack;
thread_local int capture_mode = cuda::kCaptureModeGlobal;

// One mutex guards everything but the copying itself.
struct Driver {
  std::mutex mutex;
  std::condition_variable changed;
  bool initialized = false;
  pid_t process = getpid();
  std::map<uintptr_t, Range> ranges;
  std::map<cuda::Stream, std::shared_ptr<StreamState>> streams;
  std::map<cuda::Event, std::shared_ptr<EventState>> events;
  std::shared_ptr<StreamState> default_streams[kDevices];
  ContextState contexts[kDevices] = {{0}, {1}};
  int broken[kDevices] = {};                            // sticky error of each context
  std::map<std::string, std::pair<int, int>> failures;  // symbol: calls to go, result
  int fail_work_in = 0, fail_work_result = 0;
  int corrupt_in = 0;
  std::mt19937_64 random{1};
  std::atomic<unsigned> delay{200};
  bool held = false;
  bool lenient = false;
  bool capturing = false, capture_spoilt = false;
  cuda::Stream captured = nullptr;
  int module_result = 0;
  FakeCudaState state{};
  std::map<int, int> attributes;
  std::vector<std::pair<uintptr_t, std::vector<char>>> unseen;  // a card's writes that were not flushed
  uint64_t memory_bytes = uint64_t{1} << 30;
  uint64_t used[kDevices] = {};
  uintptr_t next_handle = 0x1000;

  void* handle() { return reinterpret_cast<void*>(next_handle += 16); }
};

Driver& driver() {
  static auto* instance = new Driver;  // its threads outlive main
  return *instance;
}

int current_device() {
  if (context_stack.empty()) return -1;
  return reinterpret_cast<ContextState*>(context_stack.back())->device;
}

// What every entry point asks first; the mutex is held.
cuda::Result enter_locked(const char* symbol, bool needs_context = true) {
  Driver& d = driver();
  if (getpid() != d.process) return 3;  // as a real driver after fork: not initialised
  const auto found = d.failures.find(symbol);
  if (found != d.failures.end() && --found->second.first == 0) {
    const int result = found->second.second;
    d.failures.erase(found);
    return result;
  }
  if (!d.initialized && std::string(symbol) != "cuInit") return cuda::kNotInitialized;
  if (!needs_context) return cuda::kSuccess;
  const int device = current_device();
  if (device < 0) return cuda::kInvalidContext;
  // A real driver lets some calls pass. None of ours is made without stepping out of the mode, so none passes
  // here.
  if (d.capturing && capture_mode != cuda::kCaptureModeRelaxed) {
    d.capture_spoilt = true;
    return cuda::kStreamCaptureUnsupported;
  }
  return d.broken[device];
}

// The live range that holds [pointer, pointer + bytes), or nullptr.
Range* find_locked(uintptr_t pointer, size_t bytes) {
  auto& ranges = driver().ranges;
  auto after = ranges.upper_bound(pointer);
  if (after == ranges.begin()) return nullptr;
  --after;
  Range& range = after->second;
  if (range.freed || pointer - after->first > range.size) return nullptr;
  if (bytes > range.size - (pointer - after->first)) return nullptr;
  return &range;
}

bool is_device_memory_locked(cuda::Pointer pointer, size_t bytes, int device) {
  const Range* range = find_locked(pointer, bytes);
  return range != nullptr && range->device == device;
}

void break_context_locked(int device, int result) {
  if (driver().broken[device] == 0) driver().broken[device] = result;
}

void run_stream(const std::shared_ptr<StreamState>& stream, uint64_t seed) {
  pthread_setname_np(pthread_self(), "fake-cuda");
  Driver& d = driver();
  std::mt19937_64 random(seed);
  std::unique_lock lock(d.mutex);
  for (;;) {
    d.changed.wait(
        lock, [&] { return (!stream->work.empty() && !d.held) || (stream->stop && stream->work.empty()); });
    if (stream->work.empty()) return;
    if (const unsigned delay = d.delay; delay > 0) {
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::microseconds(random() % delay));
      lock.lock();
      if (d.held) continue;
    }
    auto work = std::move(stream->work.front());
    stream->work.pop_front();
    stream->busy = true;
    lock.unlock();
    work();
    work = nullptr;
    lock.lock();
    stream->busy = false;
    d.changed.notify_all();
  }
}

std::shared_ptr<StreamState> make_stream_locked(int device) {
  auto stream = std::make_shared<StreamState>();
  stream->device = device;
  stream->thread = std::thread(run_stream, stream, driver().random());
  return stream;
}

std::shared_ptr<StreamState> stream_locked(cuda::Stream handle) {
  Driver& d = driver();
  if (handle == nullptr) {
    auto& stream = d.default_streams[current_device()];
    if (!stream) stream = make_stream_locked(current_device());
    return stream;
  }
  const auto found = d.streams.find(handle);
  return found == d.streams.end() ? nullptr : found->second;
}

cuda::Result enqueue_locked(cuda::Stream handle, std::function<void()> work) {
  const auto stream = stream_locked(handle);
  if (!stream || stream->device != current_device()) return cuda::kInvalidHandle;
  if (driver().capturing && handle == driver().captured) {  // it would be a part of the graph
    driver().capture_spoilt = true;
    return cuda::kStreamCaptureUnsupported;
  }
  stream->work.push_back(std::move(work));
  driver().changed.notify_all();
  return cuda::kSuccess;
}

// True when the work may run: the context is sound and no failure is due.
bool may_run(int device, uint64_t FakeCudaState::* counter) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  if (d.broken[device] != 0) return false;
  if (d.fail_work_in > 0 && --d.fail_work_in == 0) {
    break_context_locked(device, d.fail_work_result);
    return false;
  }
  ++(d.state.*counter);
  return true;
}

// Whether the device reaches this memory; else its context breaks.
bool reaches(int device, cuda::Pointer pointer, size_t bytes) {
  std::lock_guard lock(driver().mutex);
  if (driver().lenient || is_device_memory_locked(pointer, bytes, device)) return true;
  break_context_locked(device, cuda::kIllegalAddress);
  return false;
}

void* address(cuda::Pointer pointer) { return reinterpret_cast<void*>(static_cast<uintptr_t>(pointer)); }

cuda::Result allocate_locked(size_t bytes, int device, void** result) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return cuda::kOutOfMemory;
  std::memset(memory, kPoisonAlloc, bytes);
  driver().ranges[reinterpret_cast<uintptr_t>(memory)] = Range{bytes, false, device, true};
  *result = memory;
  return cuda::kSuccess;
}

// Poisoned, and its addresses never used again, so that late work is noticed.
bool free_locked(uintptr_t pointer, bool device) {
  auto found = driver().ranges.find(pointer);
  if (found == driver().ranges.end() || found->second.freed || (found->second.device >= 0) != device)
    return false;
  std::memset(reinterpret_cast<void*>(pointer), kPoisonFree, found->second.size);
  found->second.freed = true;
  return true;
}

const std::map<int, std::pair<const char*, const char*>>& error_texts() {
  static const auto* texts = new std::map<int, std::pair<const char*, const char*>>{
      {0, {"CUDA_SUCCESS", "no error"}},
      {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
      {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
      {3, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
      {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
      {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
      {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
      {209, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
      {222,
       {"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        "the provided PTX was compiled with an unsupported toolchain."}},
      {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
      {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
      {600, {"CUDA_ERROR_NOT_READY", "device not ready"}},
      {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
      {712,
       {"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        "part or all of the requested memory range is already mapped"}},
      {713,
       {"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        "pointer does not correspond to a registered memory region"}},
      {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
      {900, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
  };
  return *texts;
}

}  // namespace

bool fake_cuda::reached_by_current_device(uintptr_t pointer, size_t bytes) {
  const int device = current_device();
  return device >= 0 && reaches(device, pointer, bytes);
}

void fake_cuda::call_driver() {
  std::lock_guard lock(driver().mutex);
  if (driver().capturing && capture_mode != cuda::kCaptureModeRelaxed) driver().capture_spoilt = true;
}

void fake_cuda::pause() {
  Driver& d = driver();
  unsigned delay = d.delay;
  if (delay == 0) return;
  {
    std::lock_guard lock(d.mutex);
    delay = static_cast<unsigned>(d.random() % delay);
  }
  std::this_thread::sleep_for(std::chrono::microseconds(delay));
}

#define ENTER(symbol, ...)        \
  Driver& d = driver();           \
  std::unique_lock lock(d.mutex); \
  if (const int entered = enter_locked(symbol __VA_OPT__(, ) __VA_ARGS__); entered != 0) return entered
#define EXPORT extern "C" __attribute__((visibility("default"))) cuda::Result
#define CONTROL extern "C" __attribute__((visibility("default"))) void

EXPORT cuInit(unsigned) {
  ENTER("cuInit", false);
  d.initialized = true;
  return 0;
}
EXPORT cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
EXPORT cuGetErrorName(cuda::Result result, const char** text) {
  const auto found = error_texts().find(result);
  if (found == error_texts().end()) return cuda::kInvalidValue;
  *text = found->second.first;
  return 0;
}
EXPORT cuGetErrorString(cuda::Result result, const char** text) {
  const auto found = error_texts().find(result);
  if (found == error_texts().end()) return cuda::kInvalidValue;
  *text = found->second.second;
  return 0;
}
EXPORT cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount", false);
  *count = kDevices;
  return 0;
}
EXPORT cuDeviceGet(cuda::Device* device, int ordinal) {
  ENTER("cuDeviceGet", false);
  if (ordinal < 0 || ordinal >= kDevices) return cuda::kInvalidDevice;
  *device = ordinal;
  return 0;
}
EXPORT cuDeviceGetName(char* name, int size, cuda::Device device) {
  ENTER("cuDeviceGetName", false);
  const std::string text = "Fake GPU " + std::to_string(device);
  std::strncpy(name, text.c_str(), static_cast<size_t>(size));
  return 0;
}
EXPORT cuDeviceGetAttribute(int* value, int attribute, cuda::Device) {
  ENTER("cuDeviceGetAttribute", false);
  const auto found = d.attributes.find(attribute);
  *value = found == d.attributes.end() ? 0 : found->second;
  return 0;
}
EXPORT cuDevicePrimaryCtxRetain(cuda::Context* context, cuda::Device device) {
  ENTER("cuDevicePrimaryCtxRetain", false);
  *context = reinterpret_cast<cuda::Context>(&d.contexts[device]);
  return 0;
}
EXPORT cuCtxPushCurrent_v2(cuda::Context context) {
  ENTER("cuCtxPushCurrent_v2", false);
  context_stack.push_back(context);
  return 0;
}
EXPORT cuCtxPopCurrent_v2(cuda::Context* context) {
  ENTER("cuCtxPopCurrent_v2", false);
  if (context_stack.empty()) return cuda::kInvalidContext;
  *context = context_stack.back();
  context_stack.pop_back();
  return 0;
}
EXPORT cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  ENTER("cuMemGetInfo_v2");
  *total_bytes = d.memory_bytes;
  *free_bytes = d.memory_bytes - d.used[current_device()];
  return 0;
}
EXPORT cuMemAlloc_v2(cuda::Pointer* pointer, size_t bytes) {
  ENTER("cuMemAlloc_v2");
  const int device = current_device();
  if (bytes == 0) return cuda::kInvalidValue;
  if (bytes > d.memory_bytes - d.used[device]) return cuda::kOutOfMemory;
  void* memory = nullptr;
  if (const int result = allocate_locked(bytes, device, &memory); result != 0) return result;
  *pointer = reinterpret_cast<uintptr_t>(memory);
  d.used[device] += bytes;
  ++d.state.device_allocations;
  d.state.device_bytes += bytes;
  d.state.peak_device_bytes = std::max(d.state.peak_device_bytes, d.state.device_bytes);
  return 0;
}
EXPORT cuMemFree_v2(cuda::Pointer pointer) {
  ENTER("cuMemFree_v2");
  const auto found = d.ranges.find(pointer);
  if (found == d.ranges.end() || !free_locked(pointer, true)) return cuda::kInvalidValue;
  d.used[found->second.device] -= found->second.size;
  --d.state.device_allocations;
  d.state.device_bytes -= found->second.size;
  return 0;
}
EXPORT cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  ENTER("cuMemHostAlloc");
  if (bytes == 0) return cuda::kInvalidValue;
  if (const int result = allocate_locked(bytes, -1, pointer); result != 0) return result;
  ++d.state.host_allocations;
  d.state.host_bytes += bytes;
  return 0;
}
EXPORT cuMemFreeHost(void* pointer) {
  ENTER("cuMemFreeHost");
  if (!free_locked(reinterpret_cast<uintptr_t>(pointer), false)) return cuda::kInvalidValue;
  --d.state.host_allocations;
  d.state.host_bytes -= d.ranges[reinterpret_cast<uintptr_t>(pointer)].size;
  return 0;
}
EXPORT cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned) {
  ENTER("cuMemHostRegister_v2");
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  const auto after = d.ranges.lower_bound(begin);
  const bool taken = find_locked(begin, 0) != nullptr ||
                     (after != d.ranges.end() && !after->second.freed && after->first - begin < bytes);
  if (taken) return cuda::kHostMemoryAlreadyRegistered;
  d.ranges[begin] = Range{bytes, false, -1, false};
  ++d.state.registrations;
  d.state.host_bytes += bytes;
  return 0;
}
EXPORT cuMemHostUnregister(void* pointer) {
  ENTER("cuMemHostUnregister");
  const auto found = d.ranges.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == d.ranges.end() || found->second.owned) return cuda::kHostMemoryNotRegistered;
  d.state.host_bytes -= found->second.size;
  d.ranges.erase(found);
  --d.state.registrations;
  return 0;
}
EXPORT cuMemcpyHtoDAsync_v2(cuda::Pointer to, const void* from, size_t bytes, cuda::Stream stream) {
  ENTER("cuMemcpyHtoDAsync_v2");
  const int device = current_device();
  const Range* pinned = find_locked(reinterpret_cast<uintptr_t>(from), bytes);
  std::shared_ptr<std::vector<char>> kept;
  if (pinned == nullptr) {
    kept = std::make_shared<std::vector<char>>(static_cast<const char*>(from),
                                               static_cast<const char*>(from) + bytes);
  }
  return enqueue_locked(stream, [=] {
    if (!may_run(device, &FakeCudaState::copies) || !reaches(device, to, bytes)) return;
    std::memcpy(address(to), kept ? kept->data() : from, bytes);
    std::lock_guard inner(driver().mutex);
    if (driver().corrupt_in > 0 && --driver().corrupt_in == 0)
      static_cast<char*>(address(to))[bytes / 2] ^= 4;
  });
}
EXPORT cuMemcpyDtoHAsync_v2(void* to, cuda::Pointer from, size_t bytes, cuda::Stream stream) {
  ENTER("cuMemcpyDtoHAsync_v2");
  const int device = current_device();
  return enqueue_locked(stream, [=] {
    if (!may_run(device, &FakeCudaState::copies) || !reaches(device, from, bytes)) return;
    std::memcpy(to, address(from), bytes);
  });
}
EXPORT cuMemcpyDtoDAsync_v2(cuda::Pointer to, cuda::Pointer from, size_t bytes, cuda::Stream stream) {
  ENTER("cuMemcpyDtoDAsync_v2");
  const int device = current_device();
  return enqueue_locked(stream, [=] {
    if (!may_run(device, &FakeCudaState::copies) || !reaches(device, from, bytes) ||
        !reaches(device, to, bytes))
      return;
    std::memmove(address(to), address(from), bytes);
  });
}
EXPORT cuMemsetD32Async(cuda::Pointer to, unsigned value, size_t count, cuda::Stream stream) {
  ENTER("cuMemsetD32Async");
  const int device = current_device();
  return enqueue_locked(stream, [=] {
    if (!may_run(device, &FakeCudaState::copies) || !reaches(device, to, count * 4)) return;
    for (size_t i = 0; i < count; ++i) std::memcpy(static_cast<char*>(address(to)) + 4 * i, &value, 4);
  });
}
EXPORT cuStreamCreate(cuda::Stream* handle, unsigned) {
  ENTER("cuStreamCreate");
  *handle = static_cast<cuda::Stream>(d.handle());
  d.streams[*handle] = make_stream_locked(current_device());
  ++d.state.streams;
  return 0;
}
EXPORT cuStreamDestroy_v2(cuda::Stream handle) {
  std::shared_ptr<StreamState> stream;
  {
    ENTER("cuStreamDestroy_v2", false);
    const auto found = d.streams.find(handle);
    if (found == d.streams.end()) return cuda::kInvalidHandle;
    stream = found->second;
    stream->stop = true;
    d.streams.erase(found);
    --d.state.streams;
    d.changed.notify_all();
  }
  stream->thread.join();
  return 0;
}
EXPORT cuStreamIsCapturing(cuda::Stream handle, int* status) {
  ENTER("cuStreamIsCapturing", false);
  *status = d.capturing && handle == d.captured ? 1 : cuda::kCaptureStatusNone;
  return 0;
}
EXPORT cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER("cuThreadExchangeStreamCaptureMode", false);
  std::swap(*mode, capture_mode);
  return 0;
}
EXPORT cuStreamSynchronize(cuda::Stream handle) {
  ENTER("cuStreamSynchronize");
  const int device = current_device();
  const auto stream = stream_locked(handle);
  if (!stream) return cuda::kInvalidHandle;
  d.changed.wait(lock, [&] { return stream->work.empty() && !stream->busy; });
  return d.broken[device];
}
EXPORT cuEventCreate(cuda::Event* handle, unsigned) {
  ENTER("cuEventCreate");
  *handle = static_cast<cuda::Event>(d.handle());
  d.events[*handle] = std::make_shared<EventState>();
  ++d.state.events;
  return 0;
}
EXPORT cuEventDestroy_v2(cuda::Event handle) {
  ENTER("cuEventDestroy_v2", false);
  if (d.events.erase(handle) == 0) return cuda::kInvalidHandle;
  --d.state.events;
  return 0;
}
EXPORT cuEventRecord(cuda::Event handle, cuda::Stream stream) {
  ENTER("cuEventRecord");
  const auto found = d.events.find(handle);
  if (found == d.events.end()) return cuda::kInvalidHandle;
  const auto event = found->second;
  const uint64_t turn = ++event->recorded;
  return enqueue_locked(stream, [event, turn] {
    std::lock_guard inner(driver().mutex);
    event->fired = std::max(event->fired, turn);
    driver().changed.notify_all();
  });
}
EXPORT cuEventQuery(cuda::Event handle) {
  ENTER("cuEventQuery");
  const auto found = d.events.find(handle);
  if (found == d.events.end()) return cuda::kInvalidHandle;
  return found->second->fired >= found->second->recorded ? cuda::kSuccess : cuda::kNotReady;
}
EXPORT cuEventSynchronize(cuda::Event handle) {
  ENTER("cuEventSynchronize");
  const int device = current_device();
  const auto found = d.events.find(handle);
  if (found == d.events.end()) return cuda::kInvalidHandle;
  const auto event = found->second;
  const uint64_t turn = event->recorded;
  d.changed.wait(lock, [&] { return event->fired >= turn; });
  return d.broken[device];
}
EXPORT cuStreamWaitEvent(cuda::Stream stream, cuda::Event handle, unsigned) {
  ENTER("cuStreamWaitEvent");
  const auto found = d.events.find(handle);
  if (found == d.events.end()) return cuda::kInvalidHandle;
  const auto event = found->second;
  const uint64_t turn = event->recorded;
  return enqueue_locked(stream, [event, turn] {
    std::unique_lock inner(driver().mutex);
    driver().changed.wait(inner, [&] { return event->fired >= turn; });
  });
}
EXPORT cuModuleLoadDataEx(cuda::Module* module, const void*, unsigned, int*, void**) {
  ENTER("cuModuleLoadDataEx");
  if (d.module_result != 0) return d.module_result;
  *module = static_cast<cuda::Module>(d.handle());
  return 0;
}
EXPORT cuModuleGetFunction(cuda::Function* function, cuda::Module, const char* name) {
  ENTER("cuModuleGetFunction");
  const fake_cuda::Kernel* kernel = fake_cuda::find_kernel(name);
  if (kernel == nullptr) return cuda::kNotFound;
  *function = reinterpret_cast<cuda::Function>(const_cast<fake_cuda::Kernel*>(kernel));
  return 0;
}
EXPORT cuLaunchKernel(cuda::Function function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                      unsigned by, unsigned bz, unsigned, cuda::Stream stream, void** parameters, void**) {
  ENTER("cuLaunchKernel");
  if (gx == 0 || gy == 0 || gz == 0 || bx * by * bz == 0 || bx * by * bz > 1024) return cuda::kInvalidValue;
  const int device = current_device();
  auto run = reinterpret_cast<const fake_cuda::Kernel*>(function)->bind(
      parameters, [device](uint64_t pointer, size_t bytes) { return reaches(device, pointer, bytes); });
  return enqueue_locked(stream, [device, run = std::move(run)] {
    if (may_run(device, &FakeCudaState::launches)) run();
  });
}
EXPORT cuPointerSetAttribute(const void*, int attribute, cuda::Pointer pointer) {
  ENTER("cuPointerSetAttribute");
  if (attribute != cuda::kPointerAttributeSyncMemops ||
      !is_device_memory_locked(pointer, 1, current_device())) {
    return cuda::kInvalidValue;
  }
  return 0;
}
// Hands out a descriptor of host memory that stands for the range; its size says what was exported.
EXPORT cuMemGetHandleForAddressRange(void* handle, cuda::Pointer pointer, size_t bytes, int type,
                                     unsigned long long) {
  ENTER("cuMemGetHandleForAddressRange");
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (type != cuda::kHandleTypeDmaBufFd || pointer % page != 0 || bytes % page != 0)
    return cuda::kInvalidValue;
  const auto after = d.ranges.upper_bound(pointer);
  if (after == d.ranges.begin()) return cuda::kInvalidValue;
  const auto& [begin, range] = *std::prev(after);
  const uint64_t whole_pages = (range.size + page - 1) / page * page;
  if (range.freed || range.device != current_device() || pointer - begin > whole_pages ||
      bytes > whole_pages - (pointer - begin)) {
    return cuda::kInvalidValue;
  }
  const int fd = memfd_create("fake-dmabuf", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) return cuda::kOutOfMemory;
  *static_cast<int*>(handle) = fd;
  return 0;
}
EXPORT cuFlushGPUDirectRDMAWrites(int, int) {
  ENTER("cuFlushGPUDirectRDMAWrites");
  for (const auto& [pointer, bytes] : d.unseen) {
    if (is_device_memory_locked(pointer, bytes.size(), current_device())) {
      std::memcpy(reinterpret_cast<void*>(pointer), bytes.data(), bytes.size());
    }
  }
  d.unseen.clear();
  return 0;
}
EXPORT cuMemGetAddressRange_v2(cuda::Pointer* base, size_t* bytes, cuda::Pointer pointer) {
  ENTER("cuMemGetAddressRange_v2");
  const auto after = d.ranges.upper_bound(pointer);
  if (after == d.ranges.begin()) return cuda::kNotFound;
  const auto& [begin, range] = *std::prev(after);
  if (range.freed || range.device != current_device() || pointer - begin >= range.size)
    return cuda::kNotFound;
  *base = begin;
  *bytes = range.size;
  return 0;
}

CONTROL fake_cuda_reset(uint64_t seed) {
  Driver& d = driver();
  std::unique_lock lock(d.mutex);
  // What a broken context still has to do is dropped, as on a GPU, before the context is made whole.
  d.held = false;
  d.changed.notify_all();
  d.changed.wait(lock, [&] {
    const auto idle = [](const auto& stream) { return !stream || (stream->work.empty() && !stream->busy); };
    return std::all_of(std::begin(d.default_streams), std::end(d.default_streams), idle) &&
           std::all_of(d.streams.begin(), d.streams.end(),
                       [&](const auto& entry) { return idle(entry.second); });
  });
  d.failures.clear();
  d.fail_work_in = d.corrupt_in = 0;
  std::fill(std::begin(d.broken), std::end(d.broken), 0);
  d.random.seed(seed);
  d.delay = 200;
  d.held = d.lenient = d.capturing = false;
  d.module_result = 0;
  d.memory_bytes = uint64_t{1} << 30;
  d.attributes = {{cuda::kAttributeComputeMajor, 9},
                  {cuda::kAttributeGpuDirectSupported, 1},
                  {cuda::kAttributeFlushWritesOptions, 1},
                  {cuda::kAttributeDmaBufSupported, 1}};
  d.state.peak_device_bytes = d.state.device_bytes;
  d.state.copies = d.state.launches = d.state.card_writes = d.state.late_writes = 0;
  d.unseen.clear();
  d.changed.notify_all();
}
CONTROL fake_cuda_state(FakeCudaState* state) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  *state = d.state;
  state->context_depth = context_stack.size();
}
CONTROL fake_cuda_fail_call(const char* symbol, int nth, int result) {
  std::lock_guard lock(driver().mutex);
  driver().failures[symbol] = {nth, result};
}
CONTROL fake_cuda_fail_work(int nth, int result) {
  std::lock_guard lock(driver().mutex);
  driver().fail_work_in = nth;
  driver().fail_work_result = result;
}
CONTROL fake_cuda_corrupt_copy(int nth) {
  std::lock_guard lock(driver().mutex);
  driver().corrupt_in = nth;
}
CONTROL fake_cuda_set_delay(unsigned max_microseconds) { driver().delay = max_microseconds; }
CONTROL fake_cuda_hold(int held) {
  std::lock_guard lock(driver().mutex);
  driver().held = held != 0;
  driver().changed.notify_all();
}
CONTROL fake_cuda_begin_capture(void* stream) {
  std::lock_guard lock(driver().mutex);
  driver().capturing = true;
  driver().capture_spoilt = false;
  driver().captured = static_cast<cuda::Stream>(stream);
}
extern "C" __attribute__((visibility("default"))) int fake_cuda_end_capture() {
  std::lock_guard lock(driver().mutex);
  driver().capturing = false;
  return driver().capture_spoilt ? 0 : 1;
}
CONTROL fake_cuda_set_module_result(int result) {
  std::lock_guard lock(driver().mutex);
  driver().module_result = result;
}
CONTROL fake_cuda_set_lenient(int lenient) {
  std::lock_guard lock(driver().mutex);
  driver().lenient = lenient != 0;
}
CONTROL fake_cuda_set_attribute(int attribute, int value) {
  std::lock_guard lock(driver().mutex);
  driver().attributes[attribute] = value;
}
extern "C" __attribute__((visibility("default"))) int fake_cuda_card_write(uint64_t pointer, const void* data,
                                                                           size_t bytes) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  const auto after = d.ranges.upper_bound(pointer);
  if (after == d.ranges.begin()) return 0;
  const auto& [begin, range] = *std::prev(after);
  if (range.device < 0 || pointer - begin >= range.size) return 0;
  if (range.freed || bytes > range.size - (pointer - begin)) {
    ++d.state.late_writes;
    return 1;
  }
  ++d.state.card_writes;
  if (d.attributes[cuda::kAttributeWritesOrdering] >= cuda::kOrderingOwner) {
    std::memcpy(reinterpret_cast<void*>(pointer), data, bytes);
  } else {
    const auto* from = static_cast<const char*>(data);
    d.unseen.emplace_back(pointer, std::vector<char>(from, from + bytes));
  }
  return 1;
}
CONTROL fake_cuda_set_memory(uint64_t bytes) {
  std::lock_guard lock(driver().mutex);
  driver().memory_bytes = bytes;
}
