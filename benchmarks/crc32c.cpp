// Speed of every CRC32C implementation that this CPU has, in cache: one JSON object, GB/s by implementation
// and size.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "core/crc32c_implementations.h"

namespace {

using rdmaload::crc32c_internal::Implementation;

constexpr size_t kSizes[] = {64, 4096, 65536, 262144, 1 << 20};
constexpr size_t kBytesPerRound = 256 << 20;  // long enough for the clock, short enough to repeat
constexpr int kRounds = 7;                    // the best one counts: the machine is shared

double gb_per_s(const Implementation& implementation, const std::byte* data, size_t size) {
  double best = 0;
  volatile uint32_t sink = 0;  // keeps the compiler from dropping the work
  for (int round = 0; round < kRounds; ++round) {
    const size_t repeats = kBytesPerRound / size;
    uint32_t crc = 1;
    const auto begin = std::chrono::steady_clock::now();
    for (size_t i = 0; i < repeats; ++i) crc = implementation.update(crc, data, size);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    sink = crc;
    best = std::max(best, static_cast<double>(repeats * size) / seconds.count() / 1e9);
  }
  (void)sink;
  return best;
}

}  // namespace

int main() {
  std::vector<std::byte> data(1 << 20);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i * 131 + (i >> 9));
  const char* separator = "{";
  for (const Implementation& implementation : rdmaload::crc32c_internal::implementations()) {
    if (!implementation.supported) continue;
    std::printf("%s\"%s\": ", separator, std::string(implementation.name).c_str());
    const char* inner = "{";
    for (const size_t size : kSizes) {
      std::printf("%s\"%zu\": %.1f", inner, size, gb_per_s(implementation, data.data(), size));
      inner = ", ";
    }
    std::printf("}");
    separator = ", ";
  }
  std::printf("}\n");
}
