// The list of CRC-32C implementations behind crc32c.h, so that tests and benchmarks can run each of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace rdmaload::crc32c_internal {

// Advances the raw CRC register (no inversion before or after) over `size` bytes at any alignment.
using Update = uint32_t (*)(uint32_t crc, const std::byte* data, size_t size) noexcept;

struct Implementation {
  std::string_view name;
  bool supported;  // by this CPU and operating system; calling `update` when false is an illegal instruction
  Update update;
};

// Everything compiled into this build, fastest first. The last one, "table", is supported everywhere.
std::span<const Implementation> implementations() noexcept;

#if defined(__x86_64__)
bool has_vpclmul() noexcept;
bool has_pclmul() noexcept;
uint32_t update_vpclmul(uint32_t crc, const std::byte* data, size_t size) noexcept;
uint32_t update_pclmul(uint32_t crc, const std::byte* data, size_t size) noexcept;
#elif defined(__aarch64__) && defined(__linux__)
bool has_armv8_crc() noexcept;
uint32_t update_armv8(uint32_t crc, const std::byte* data, size_t size) noexcept;
#endif

}  // namespace rdmaload::crc32c_internal
