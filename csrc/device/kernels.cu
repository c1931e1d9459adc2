// What a GPU does with bytes that have arrived: puts them in their places, checks them, converts them.
//
// C++17, no library but CUDA's float types. Host references of the same: tests/cpp/support/fake_cuda/kernels.cpp.
// Grids may be smaller than the work: every kernel strides.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {

// As ScatterPiece in kernels.h.
struct Piece {
  uint64_t from;
  uint64_t to;
  uint64_t bytes;
};

// Copies by units of T; both ends are aligned to it.
template <typename T>
__device__ void copy_units(const uint8_t* from, uint8_t* to, uint64_t units) {
  const T* source = reinterpret_cast<const T*>(from);
  T* target = reinterpret_cast<T*>(to);
  for (uint64_t i = threadIdx.x; i < units; i += blockDim.x) target[i] = source[i];
}

// One thread block copies one piece: bytes up to the first boundary that both ends share, the widest units that
// fit both ends, and the bytes that are left.
__device__ void copy_piece(const uint8_t* from, uint8_t* to, uint64_t bytes) {
  const uint64_t difference = reinterpret_cast<uint64_t>(from) ^ reinterpret_cast<uint64_t>(to);
  const uint64_t unit = difference % 16 == 0 ? 16 : difference % 8 == 0 ? 8 : difference % 4 == 0 ? 4 : difference % 2 == 0 ? 2 : 1;
  uint64_t head = (unit - reinterpret_cast<uint64_t>(to) % unit) % unit;
  if (head > bytes) head = bytes;
  copy_units<uint8_t>(from, to, head);
  const uint64_t units = (bytes - head) / unit;
  switch (unit) {
    case 16: copy_units<uint4>(from + head, to + head, units); break;
    case 8: copy_units<uint2>(from + head, to + head, units); break;
    case 4: copy_units<uint32_t>(from + head, to + head, units); break;
    case 2: copy_units<uint16_t>(from + head, to + head, units); break;
    default: copy_units<uint8_t>(from + head, to + head, units);
  }
  const uint64_t done = head + units * unit;
  copy_units<uint8_t>(from + done, to + done, bytes - done);
}

constexpr uint32_t kPolynomial = 0x82f63b78u;     // CRC-32C, reflected
constexpr uint64_t kCrcBytesPerThread = 1024;     // as in kernels.cpp

// The product of two polynomials of degree below 32 modulo CRC-32C's, in reflected order: the top bit is x^0.
__device__ uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int bit = 31; bit >= 0; --bit) {
    if (a >> bit & 1) product ^= b;
    b = b >> 1 ^ (b & 1 ? kPolynomial : 0);
  }
  return product;
}

// x^(8 * bytes): what a checksum is multiplied by when so many bytes follow.
__device__ uint32_t shift_by(uint64_t bytes) {
  uint32_t power = 0x00800000u;   // x^8
  uint32_t result = 0x80000000u;  // 1
  for (; bytes != 0; bytes >>= 1) {
    if (bytes & 1) result = multiply(power, result);
    power = multiply(power, power);
  }
  return result;
}

template <typename To, typename From>
__device__ To converted(From value) {
  return static_cast<To>(static_cast<float>(value));
}

template <typename From, typename To>
__device__ void convert_all(const void* from, void* to, uint64_t count) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    static_cast<To*>(to)[i] = converted<To, From>(static_cast<const From*>(from)[i]);
  }
}

template <typename From>
__device__ void convert_from(const void* from, void* to, uint32_t to_type, uint64_t count) {
  if (to_type == 0) convert_all<From, __half>(from, to, count);
  if (to_type == 1) convert_all<From, __nv_bfloat16>(from, to, count);
  if (to_type == 2) convert_all<From, float>(from, to, count);
}

}  // namespace

extern "C" __global__ void rdmaload_scatter(const uint8_t* block, const Piece* pieces, uint32_t count) {
  for (uint32_t i = blockIdx.x; i < count; i += gridDim.x) {
    copy_piece(block + pieces[i].from, reinterpret_cast<uint8_t*>(pieces[i].to), pieces[i].bytes);
  }
}

// Each thread computes the remainder of its own part with nothing before it, moves it to where it stands in the
// whole, and adds it (exclusive or) to the result; the first thread adds what the initial and final inversions give.
extern "C" __global__ void rdmaload_crc32c(const uint8_t* data, uint64_t bytes, uint32_t* crc) {
  __shared__ uint32_t table[256];
  for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) {
    uint32_t entry = i;
    for (int bit = 0; bit < 8; ++bit) entry = entry >> 1 ^ (entry & 1 ? kPolynomial : 0);
    table[i] = entry;
  }
  __syncthreads();
  const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x * kCrcBytesPerThread;
  uint32_t sum = 0;
  for (uint64_t begin = thread * kCrcBytesPerThread; begin < bytes; begin += stride) {
    const uint64_t end = bytes - begin < kCrcBytesPerThread ? bytes : begin + kCrcBytesPerThread;
    uint32_t part = 0;
    for (uint64_t i = begin; i < end; ++i) part = part >> 8 ^ table[(part ^ data[i]) & 0xff];
    sum ^= multiply(shift_by(bytes - end), part);
  }
  if (thread == 0 && bytes > 0) sum ^= multiply(shift_by(bytes), 0xffffffffu) ^ 0xffffffffu;
  if (sum != 0) atomicXor(crc, sum);
}

extern "C" __global__ void rdmaload_convert(const void* from, uint32_t from_type, void* to, uint32_t to_type,
                                            uint64_t count) {
  if (from_type == 0) convert_from<__half>(from, to, to_type, count);
  if (from_type == 1) convert_from<__nv_bfloat16>(from, to, to_type, count);
  if (from_type == 2) convert_from<float>(from, to, to_type, count);
}
