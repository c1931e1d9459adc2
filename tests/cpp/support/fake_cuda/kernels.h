// Host references of the GPU kernels, by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fake_cuda {

// Whether the device reaches this memory; false when it does not, and the launch has failed.
using Reaches = std::function<bool(uint64_t pointer, size_t bytes)>;

struct Kernel {
  const char* name;
  // Takes the arguments at launch, as the driver does, and gives what runs later.
  std::function<void()> (*bind)(void** parameters, Reaches reaches);
};

const Kernel* find_kernel(const char* name);

}  // namespace fake_cuda
