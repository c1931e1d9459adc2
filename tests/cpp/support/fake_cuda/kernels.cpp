// What the kernels of csrc/device/kernels.cu compute, written a second time in the plainest way.
#include "support/fake_cuda/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>

namespace fake_cuda {
namespace {

template <typename T>
T argument(void** parameters, int position) {
  T value;
  std::memcpy(&value, parameters[position], sizeof(T));
  return value;
}

unsigned char* at(uint64_t pointer) {
  return reinterpret_cast<unsigned char*>(static_cast<uintptr_t>(pointer));
}

std::function<void()> bind_scatter(void** parameters, Reaches reaches) {
  struct Piece {
    uint64_t from, to, bytes;
  };
  const auto block = argument<uint64_t>(parameters, 0), table = argument<uint64_t>(parameters, 1);
  const auto count = argument<uint32_t>(parameters, 2);
  return [=] {
    if (!reaches(table, count * sizeof(Piece))) return;
    for (uint32_t i = 0; i < count; ++i) {
      Piece piece;
      std::memcpy(&piece, at(table) + i * sizeof(Piece), sizeof(Piece));
      if (!reaches(block + piece.from, piece.bytes) || !reaches(piece.to, piece.bytes)) return;
      std::memcpy(at(piece.to), at(block + piece.from), piece.bytes);
    }
  };
}

std::function<void()> bind_crc32c(void** parameters, Reaches reaches) {
  const auto data = argument<uint64_t>(parameters, 0), bytes = argument<uint64_t>(parameters, 1);
  const auto out = argument<uint64_t>(parameters, 2);
  return [=] {
    if (!reaches(data, bytes) || !reaches(out, 4)) return;
    uint32_t table[256];
    for (uint32_t i = 0; i < 256; ++i) {
      table[i] = i;
      for (int bit = 0; bit < 8; ++bit) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0x82f63b78u : 0u);
    }
    uint32_t crc = ~0u;
    for (uint64_t i = 0; i < bytes; ++i) crc = crc >> 8 ^ table[(crc ^ at(data)[i]) & 0xff];
    uint32_t word;
    std::memcpy(&word, at(out), 4);
    word ^= ~crc;
    std::memcpy(at(out), &word, 4);
  };
}

// A number's sign, exponent and fraction say everything: through double, which holds all three types exactly.
double read_float(const unsigned char* from, uint32_t type) {
  if (type == 2) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  const int exponent_bits = type == 0 ? 5 : 8, fraction_bits = 15 - exponent_bits;
  const int exponent = half >> fraction_bits & ((1 << exponent_bits) - 1);
  const int fraction = half & ((1 << fraction_bits) - 1), bias = (1 << (exponent_bits - 1)) - 1;
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(fraction, 1 - bias - fraction_bits);
  } else {
    value = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  }
  return half >> 15 ? -value : value;
}

void write_float(unsigned char* to, uint32_t type, double value) {
  if (type == 2) {
    const auto single = static_cast<float>(value);
    std::memcpy(to, &single, 4);
    return;
  }
  const int exponent_bits = type == 0 ? 5 : 8, fraction_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1, largest = (1 << exponent_bits) - 1;
  uint32_t bits;
  if (std::isnan(value)) {
    bits = type == 0 ? 0x7fffu : 0x7fffu;
  } else if (value == 0) {
    bits = 0;
  } else if (std::isinf(value)) {
    bits = static_cast<uint32_t>(largest) << fraction_bits;
  } else {
    int exponent = 0;
    std::frexp(value, &exponent);
    const int unit = std::max(exponent - 1, 1 - bias) - fraction_bits;  // weight of the last fraction bit
    const auto fraction = static_cast<uint64_t>(std::nearbyint(std::ldexp(std::fabs(value), -unit)));
    // Counting in units of the last place runs through subnormals, normals and into infinity without a step.
    const int biased = unit + fraction_bits + bias;
    const uint64_t counted = (static_cast<uint64_t>(biased - 1) << fraction_bits) + fraction;
    bits =
        static_cast<uint32_t>(std::min<uint64_t>(counted, static_cast<uint64_t>(largest) << fraction_bits));
  }
  const auto half = static_cast<uint16_t>(bits | (std::signbit(value) && !std::isnan(value) ? 0x8000u : 0u));
  std::memcpy(to, &half, 2);
}

std::function<void()> bind_convert(void** parameters, Reaches reaches) {
  const auto from = argument<uint64_t>(parameters, 0), to = argument<uint64_t>(parameters, 2);
  const auto from_type = argument<uint32_t>(parameters, 1), to_type = argument<uint32_t>(parameters, 3);
  const auto count = argument<uint64_t>(parameters, 4);
  return [=] {
    const size_t from_bytes = from_type == 2 ? 4 : 2, to_bytes = to_type == 2 ? 4 : 2;
    if (!reaches(from, count * from_bytes) || !reaches(to, count * to_bytes)) return;
    for (uint64_t i = 0; i < count; ++i) {
      write_float(at(to + i * to_bytes), to_type, read_float(at(from + i * from_bytes), from_type));
    }
  };
}

constexpr Kernel kKernels[] = {
    {"rdmaload_scatter", bind_scatter}, {"rdmaload_crc32c", bind_crc32c}, {"rdmaload_convert", bind_convert}};

}  // namespace

const Kernel* find_kernel(const char* name) {
  for (const Kernel& kernel : kKernels) {
    if (std::string_view(kernel.name) == name) return &kernel;
  }
  return nullptr;
}

}  // namespace fake_cuda
