// The fake CUDA driver for tests: opened as the process's driver, steered, and looked into.
#pragma once

#include <dlfcn.h>

#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/cufile.h"
#include "device/device_memory.h"
#include "device/pinned_pool.h"
#include "device/stream.h"
#include "support/fake_cuda/control.h"

namespace rdmaload::testing {

// One per test: a fresh seed, no failures. At its end nothing may be left of what the test made.
class FakeGpu {
 public:
  explicit FakeGpu(uint64_t seed = 1)
      : driver(Driver::open_process(RDMALOAD_FAKE_CUDA, kImage)),
        library_(dlopen(RDMALOAD_FAKE_CUDA, RTLD_NOW)) {
    function<void(uint64_t)>("fake_cuda_reset")(seed);
    function<void()>("fake_cufile_reset")();
    PinnedPool::process().release();  // so that a test sees what it locks itself
    device(0).copy_stream();          // made once and kept, so not a leak
    device(1).copy_stream();
  }
  ~FakeGpu() {
    hold(false);
    PinnedPool::process().release();
    function<void(uint64_t)>("fake_cuda_reset")(1);
    dlclose(library_);
  }
  FakeGpu(const FakeGpu&) = delete;
  FakeGpu& operator=(const FakeGpu&) = delete;

  Device& device(int ordinal = 0) const { return Device::get(ordinal); }
  FakeCudaState state() const {
    FakeCudaState state{};
    function<void(FakeCudaState*)>("fake_cuda_state")(&state);
    return state;
  }
  void fail_call(const char* symbol, int nth, int result) const {
    function<void(const char*, int, int)>("fake_cuda_fail_call")(symbol, nth, result);
  }
  void fail_work(int nth, int result) const { function<void(int, int)>("fake_cuda_fail_work")(nth, result); }
  void corrupt_copy(int nth) const { function<void(int)>("fake_cuda_corrupt_copy")(nth); }
  void set_delay(unsigned microseconds) const {
    function<void(unsigned)>("fake_cuda_set_delay")(microseconds);
  }
  void hold(bool held) const { function<void(int)>("fake_cuda_hold")(held ? 1 : 0); }
  void begin_capture(cuda::Stream stream) const { function<void(void*)>("fake_cuda_begin_capture")(stream); }
  bool end_capture() const { return function<int()>("fake_cuda_end_capture")() != 0; }
  void set_module_result(int result) const { function<void(int)>("fake_cuda_set_module_result")(result); }
  void set_lenient() const { function<void(int)>("fake_cuda_set_lenient")(1); }
  void set_attribute(int attribute, int value) const {
    function<void(int, int)>("fake_cuda_set_attribute")(attribute, value);
  }
  void set_memory(uint64_t bytes) const { function<void(uint64_t)>("fake_cuda_set_memory")(bytes); }

  // For FakeNetwork: what its cards write to device memory goes through the fake device.
  std::function<bool(uint64_t, const void*, size_t)> card_writer() const {
    auto* const write = function<int(uint64_t, const void*, size_t)>("fake_cuda_card_write");
    return [write](uint64_t to, const void* from, size_t bytes) { return write(to, from, bytes) != 0; };
  }

  FakeCufileState cufile_state() const {
    FakeCufileState state{};
    function<void(FakeCufileState*)>("fake_cufile_state")(&state);
    return state;
  }
  void set_cufile_results(int open, int handle, int buffer) const {
    function<void(int, int, int)>("fake_cufile_set_results")(open, handle, buffer);
  }
  void fail_cufile_read(int nth, int result, int error) const {
    function<void(int, int, int)>("fake_cufile_fail_read")(nth, result, error);
  }
  void set_cufile_longest(size_t bytes) const { function<void(size_t)>("fake_cufile_set_longest")(bytes); }

  // What a kernel of a consumer's stream would see now: reads in stream order, then waits for that stream.
  std::vector<std::byte> read(const Device& device, cuda::Pointer from, size_t bytes,
                              cuda::Stream stream) const {
    std::vector<std::byte> seen(bytes);
    if (bytes == 0) return seen;
    const DeviceGuard guard(device);
    driver.check("cuMemcpyDtoHAsync", driver.copy_to_host(seen.data(), from, bytes, stream));
    driver.check("cuStreamSynchronize", driver.stream_synchronize(stream));
    return seen;
  }

  const Driver& driver;

 private:
  template <typename Signature>
  Signature* function(const char* symbol) const {
    void* found = dlsym(library_, symbol);
    if (found == nullptr) throw std::runtime_error(std::string("the fake driver has no ") + symbol);
    return reinterpret_cast<Signature*>(found);
  }
  static constexpr std::byte kImage[16]{};  // the fake takes any image
  void* library_;
};

}  // namespace rdmaload::testing
