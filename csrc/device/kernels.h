// The kernels of kernels.cu, and how to launch them on a stream. They read and write device memory only.
//
// Each has a host reference with the same name in tests/cpp/support/fake_cuda and a road that does without:
// copies piece by piece, checksums on the host, torch's own conversion.
#pragma once

#include <cstdint>

#include "device/device.h"

namespace rdmaload {

// A part of a packed block that goes to its own place.
struct ScatterPiece {
  uint64_t from;  // offset in the block
  cuda::Pointer to;
  uint64_t bytes;
};

// Pieces are cut to this size, so that thread blocks share large ones.
constexpr uint64_t kScatterPieceBytes = 64 << 10;

enum class FloatType : uint32_t { kF16 = 0, kBF16 = 1, kF32 = 2 };
size_t float_bytes(FloatType type);

class Kernels {
 public:
  // Throws kNotSupported when the build has no kernels or none that this GPU and driver can run, kDevice when
  // loading them failed.
  explicit Kernels(const Device& device);

  // All with the device current. `pieces` is a table of `count` in device memory.
  Status scatter(cuda::Pointer block, cuda::Pointer pieces, uint32_t count, cuda::Stream stream) const;
  // Exclusive-ors into the word at `crc`, which must be 0, the CRC32C of the bytes.
  Status crc32c(cuda::Pointer data, uint64_t bytes, cuda::Pointer crc, cuda::Stream stream) const;
  // Rounds to nearest, ties to even; both places aligned to their type and not overlapping.
  Status convert(cuda::Pointer from, FloatType from_type, cuda::Pointer to, FloatType to_type, uint64_t count,
                 cuda::Stream stream) const;

 private:
  Status launch(cuda::Function function, const char* name, uint64_t blocks, cuda::Stream stream,
                void** parameters) const;

  const Driver& driver_;
  cuda::Module module_ = nullptr;  // unloaded with the process
  cuda::Function scatter_ = nullptr;
  cuda::Function crc32c_ = nullptr;
  cuda::Function convert_ = nullptr;
};

}  // namespace rdmaload
