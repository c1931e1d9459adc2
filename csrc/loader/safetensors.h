// The header of a safetensors file: which tensor lies where. A pure function of the header's bytes and the
// file's size; it reads nothing itself. The header may come from an attacker: every number is checked before
// it is used, and memory is bounded by a small multiple of the header's size.
//
//     file      = header_bytes header data
//     header_bytes = u64, little-endian
//     header    = JSON, padded with spaces
//               { "__metadata__": {string: string, ...}, name: {"dtype": "F32", "shape": [..],
//               "data_offsets": [b, e]}, ... }
//     data      = the tensors without gaps and without overlaps; offsets count from its beginning
//
// Accepted is what the safetensors crate (0.8) accepts, with four exceptions, none of which any known writer
// makes: a tensor name that occurs twice, a tensor entry written as an array, a dtype written as an object,
// and a dimension above 2^63 - 1 are refused.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rdmaload {

enum class DType : uint8_t {
  kBool,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kF8E5M2FNUZ,
  kF8E4M3FNUZ,
  kF4,
  kF6E2M3,
  kF6E3M2,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64,
};

// The name as it stands in a header, for example "F8_E4M3".
std::string_view dtype_name(DType dtype);
std::optional<DType> dtype_from_name(std::string_view name);
// Of one element; 4 and 6 occur, so ask for whole bytes only of a whole tensor.
int dtype_bits(DType dtype);

struct TensorInfo {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  uint64_t begin;  // first byte, counted from the beginning of the file
  uint64_t end;    // one past the last byte
};

struct SafetensorsHeader {
  std::vector<TensorInfo>
      tensors;  // by begin; empty tensors before the one that begins at the same place, by name
  std::vector<std::pair<std::string, std::string>> metadata;  // by key
  uint64_t data_begin;                                        // where the data begins in the file
};

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the crate's limit

// Takes the header without the 8-byte length before it, and the size of the whole file.
// Throws Error(kFormat) that names the tensor, and for syntax the offset in the header.
SafetensorsHeader parse_safetensors_header(std::string_view json, uint64_t file_bytes);

}  // namespace rdmaload
