// How a test steers the fake CUDA driver: functions that it exports beside the driver's own.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// What a test may look at.
struct FakeCudaState {
  uint64_t device_allocations;  // that are not freed
  uint64_t device_bytes;
  uint64_t peak_device_bytes;  // since the last reset
  uint64_t host_allocations;   // page-locked, not freed
  uint64_t host_bytes;         // page-locked: allocated so, or registered
  uint64_t registrations;
  uint64_t streams;
  uint64_t events;
  uint64_t copies;         // of any direction, done
  uint64_t launches;       // kernels done
  uint64_t context_depth;  // contexts that the calling thread has pushed and not popped
  uint64_t card_writes;    // of a network card, into live device memory; since the last reset
  uint64_t late_writes;    // the same into freed memory
};

// Forgets injected failures and broken contexts, reseeds, and begins to count peaks anew.
void fake_cuda_reset(uint64_t seed);
void fake_cuda_state(FakeCudaState* state);
// The nth call (from 1) of the exported function `symbol` from now on returns `result` and does nothing.
void fake_cuda_fail_call(const char* symbol, int nth, int result);
// The nth copy or kernel that a stream executes from now on breaks the context with `result`, as a bad
// address does.
void fake_cuda_fail_work(int nth, int result);
// The nth copy to the device from now on flips a bit of what it writes.
void fake_cuda_corrupt_copy(int nth);
// At most this long does a stream wait before each piece of work, in microseconds (default 200).
void fake_cuda_set_delay(unsigned max_microseconds);
// Streams stop before their next work while held.
void fake_cuda_hold(int held);
// A CUDA graph is captured on this stream in the default ("global") mode from now on, as by another library:
// a thread that calls the driver without having stepped out of that mode gets an error and spoils the
// capture.
void fake_cuda_begin_capture(void* stream);
// Ends it; 1 when it was not spoilt.
int fake_cuda_end_capture();
// What cuModuleLoadDataEx returns from now on; 0 is success. The real one looks at the GPU and the image.
void fake_cuda_set_module_result(int result);
// While lenient, any memory counts as every device's: for tests that are not about where memory lies.
void fake_cuda_set_lenient(int lenient);
void fake_cuda_set_attribute(int attribute, int value);
void fake_cuda_set_memory(uint64_t bytes);  // of each device
// A network card writes. 0: this is no device memory. Where the device does not order such writes (its
// attribute is below "owner"), they are seen only after cuFlushGPUDirectRDMAWrites.
int fake_cuda_card_write(uint64_t pointer, const void* data, size_t bytes);

// The fake cuFile beside it.
struct FakeCufileState {
  uint64_t handles;  // that are registered
  uint64_t buffers;
  uint64_t reads;  // since the last reset
  uint64_t read_bytes;
  uint64_t compat_mode;  // whether the compatibility mode is allowed by what was set last
};

// Closed again, with the compatibility mode allowed as NVIDIA's default is, and without failures.
void fake_cufile_reset();
void fake_cufile_state(FakeCufileState* state);
// What opening, registering a handle and registering a buffer return from now on; 0 is success.
void fake_cufile_set_results(int open, int handle, int buffer);
// The nth read from now on returns `result` with errno `error`.
void fake_cufile_fail_read(int nth, int result, int error);
void fake_cufile_set_longest(size_t bytes);  // that one read delivers
}
