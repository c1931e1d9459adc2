// The CRCs that object stores keep of whole objects: CRC-32C, CRC-32 (zlib's) and CRC-64/NVME. All are
// reflected, with a register that begins and ends inverted. Any thread may call these functions; they neither
// allocate nor lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace rdmaload {

enum class CrcKind : uint8_t { kNone, kCrc32c, kCrc32, kCrc64Nvme };

// "crc32c", "crc32", "crc64nvme"; kNone for any other name.
CrcKind crc_kind(std::string_view name) noexcept;

// The checksum of the bytes that `value` stands for followed by `data`. Start with 0. 0 for kNone.
uint64_t crc(CrcKind kind, uint64_t value, std::span<const std::byte> data) noexcept;

// The checksum of a followed by b, from their own checksums and the length of b.
uint64_t crc_combine(CrcKind kind, uint64_t crc_a, uint64_t crc_b, uint64_t length_b) noexcept;

// The same by tables alone, for tests and for CPUs without a carry-less multiplication.
uint64_t crc_by_tables(CrcKind kind, uint64_t value, std::span<const std::byte> data) noexcept;

}  // namespace rdmaload
