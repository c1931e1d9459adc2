// CRC-32C (Castagnoli), the checksum of every chunk, index and manifest. The fastest implementation that this
// CPU has is chosen at the first call. Any thread may call these functions; they neither allocate nor lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace rdmaload {

// The checksum of the bytes that `value` stands for followed by `data`. Start with 0.
uint32_t crc32c(uint32_t value, std::span<const std::byte> data) noexcept;

// The checksum of a followed by b, from their own checksums and the length of b.
uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b) noexcept;

// Which implementation runs: "vpclmul", "sse4.2+pclmul", "armv8" or "table".
std::string_view crc32c_implementation() noexcept;

}  // namespace rdmaload
