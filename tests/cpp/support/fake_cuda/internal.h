// What the fake driver tells the fake cuFile beside it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fake_cuda {

// Whether this is live memory of the device that is current on this thread.
bool reached_by_current_device(uintptr_t pointer, size_t bytes);
// What any driver call on this thread does to a CUDA graph that is captured meanwhile.
void call_driver();
// Waits for a random time, as a stream does before its work.
void pause();

}  // namespace fake_cuda
