// cuFile without a disk that knows GPUs: the entry points that this library uses, over the fake driver's
// memory.
//
// It is as strict as the documents are: a read needs a current context, a registered handle, registered
// memory of that context's device, and whole pages; it is slow, and nothing of what it will write is there
// before it returns. What it wrote last may be short.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "device/cufile_abi.h"
#include "support/fake_cuda/control.h"
#include "support/fake_cuda/internal.h"

namespace cufile = rdmaload::cufile;

namespace {

constexpr size_t kPage = 4096;

struct State {
  std::mutex mutex;
  bool compat = true;  // as configured, until the driver is opened
  bool opened = false;
  bool opened_with_compat = false;
  int open_result = 0, handle_result = 0, buffer_result = 0;
  int fail_read_in = 0, fail_read_result = 0, fail_read_errno = 0;
  size_t longest = SIZE_MAX;
  std::map<void*, int> handles;
  std::map<uintptr_t, size_t> buffers;
  uintptr_t next_handle = 0x100;
  FakeCufileState counters{};
};

State& state() {
  static auto* instance = new State;
  return *instance;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT long cuFileUseCount() {
  std::lock_guard lock(state().mutex);
  return state().opened ? 1 : 0;
}
EXPORT cufile::Error cuFileSetParameterBool(int parameter, bool value) {
  std::lock_guard lock(state().mutex);
  if (parameter != cufile::kParameterAllowCompatMode || state().opened) return {cufile::kInvalidValue, 0};
  state().compat = value;
  return {0, 0};
}
EXPORT cufile::Error cuFileDriverOpen() {
  fake_cuda::call_driver();
  std::lock_guard lock(state().mutex);
  if (state().open_result != 0) return {state().open_result, 0};
  state().opened = true;
  state().opened_with_compat = state().compat;
  return {0, 0};
}
EXPORT cufile::Error cuFileDriverGetProperties(cufile::Properties* properties) {
  std::lock_guard lock(state().mutex);
  *properties = {};
  properties->major_version = 2;
  const bool compat = state().opened ? state().opened_with_compat : state().compat;
  properties->control_flags = compat ? 1u << cufile::kControlAllowCompatMode : 0;
  return {0, 0};
}
EXPORT cufile::Error cuFileHandleRegister(cufile::Handle* handle, cufile::Descriptor* descriptor) {
  fake_cuda::call_driver();
  State& s = state();
  std::lock_guard lock(s.mutex);
  if (!s.opened) return {cufile::kDriverNotInitialized, 0};
  if (s.handle_result != 0) return {s.handle_result, 0};
  if (descriptor->type != cufile::kHandleTypeFd || fcntl(descriptor->fd, F_GETFL) < 0) {
    return {cufile::kInvalidValue, 0};
  }
  for (const auto& [known, fd] : s.handles) {
    if (fd == descriptor->fd) return {cufile::kHandleAlreadyRegistered, 0};
  }
  *handle = reinterpret_cast<void*>(s.next_handle += 16);
  s.handles[*handle] = descriptor->fd;
  ++s.counters.handles;
  return {0, 0};
}
EXPORT void cuFileHandleDeregister(cufile::Handle handle) {
  fake_cuda::call_driver();
  std::lock_guard lock(state().mutex);
  state().counters.handles -= state().handles.erase(handle);
}
EXPORT cufile::Error cuFileBufRegister(const void* buffer, size_t bytes, int) {
  fake_cuda::call_driver();
  State& s = state();
  std::lock_guard lock(s.mutex);
  const auto begin = reinterpret_cast<uintptr_t>(buffer);
  if (s.buffer_result != 0) return {s.buffer_result, 0};
  if (!fake_cuda::reached_by_current_device(begin, bytes)) return {cufile::kInvalidValue, 0};
  if (!s.buffers.emplace(begin, bytes).second) return {cufile::kMemoryAlreadyRegistered, 0};
  ++s.counters.buffers;
  return {0, 0};
}
EXPORT cufile::Error cuFileBufDeregister(const void* buffer) {
  fake_cuda::call_driver();
  std::lock_guard lock(state().mutex);
  if (state().buffers.erase(reinterpret_cast<uintptr_t>(buffer)) == 0)
    return {cufile::kMemoryNotRegistered, 0};
  --state().counters.buffers;
  return {0, 0};
}
EXPORT ssize_t cuFileRead(cufile::Handle handle, void* buffer, size_t bytes, off_t file_offset,
                          off_t buffer_offset) {
  fake_cuda::call_driver();
  State& s = state();
  int fd = -1;
  {
    std::lock_guard lock(s.mutex);
    const auto found = s.handles.find(handle);
    const auto registered = s.buffers.find(reinterpret_cast<uintptr_t>(buffer));
    if (found == s.handles.end() || registered == s.buffers.end()) return -cufile::kInvalidValue;
    fd = found->second;
    const auto from = static_cast<size_t>(buffer_offset);
    if (from > registered->second || bytes > registered->second - from) return -cufile::kInvalidValue;
    if (bytes % kPage != 0 || file_offset % kPage != 0 || (registered->first + from) % kPage != 0) {
      return -cufile::kInvalidValue;
    }
    if (s.fail_read_in > 0 && --s.fail_read_in == 0) {
      errno = s.fail_read_errno;
      return s.fail_read_result;
    }
    bytes = std::min(bytes, s.longest);
  }
  const uintptr_t target = reinterpret_cast<uintptr_t>(buffer) + static_cast<uintptr_t>(buffer_offset);
  if (!fake_cuda::reached_by_current_device(target, bytes)) return -cufile::kInvalidValue;
  fake_cuda::pause();
  // As strict readers of disks want it.
  std::unique_ptr<char, void (*)(void*)> content(
      static_cast<char*>(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage)), std::free);
  size_t done = 0;
  while (done < bytes) {
    const ssize_t got = pread(fd, content.get() + done, bytes - done, file_offset + static_cast<off_t>(done));
    if (got < 0) return -1;
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  std::copy_n(content.get(), done, reinterpret_cast<char*>(target));
  std::lock_guard lock(s.mutex);
  ++s.counters.reads;
  s.counters.read_bytes += done;
  return static_cast<ssize_t>(done);
}

EXPORT void fake_cufile_reset() {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.compat = true;
  s.opened = s.opened_with_compat = false;
  s.open_result = s.handle_result = s.buffer_result = 0;
  s.fail_read_in = 0;
  s.longest = SIZE_MAX;
  s.counters.reads = s.counters.read_bytes = 0;
}
EXPORT void fake_cufile_state(FakeCufileState* result) {
  std::lock_guard lock(state().mutex);
  *result = state().counters;
  result->compat_mode = state().compat ? 1 : 0;
}
EXPORT void fake_cufile_set_results(int open, int handle, int buffer) {
  std::lock_guard lock(state().mutex);
  state().open_result = open;
  state().handle_result = handle;
  state().buffer_result = buffer;
}
EXPORT void fake_cufile_fail_read(int nth, int result, int error) {
  std::lock_guard lock(state().mutex);
  state().fail_read_in = nth;
  state().fail_read_result = result;
  state().fail_read_errno = error;
}
EXPORT void fake_cufile_set_longest(size_t bytes) {
  std::lock_guard lock(state().mutex);
  state().longest = bytes;
}
