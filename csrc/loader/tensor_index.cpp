#include "loader/tensor_index.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/error.h"

namespace rdmaload {

void TensorIndex::add_file(uint32_t file, const std::string& path, uint64_t file_bytes,
                           std::string_view header) {
  SafetensorsHeader parsed;
  try {
    parsed = parse_safetensors_header(header, file_bytes);
  } catch (const Error& error) {
    throw Error(error.code(), "file '" + path + "': " + error.what());
  }
  tensors_.reserve(tensors_.size() + parsed.tensors.size());
  for (TensorInfo& info : parsed.tensors) tensors_.push_back({std::move(info), file});
}

void TensorIndex::add_blocks(uint32_t file, uint64_t file_bytes, uint64_t block_bytes) {
  if (block_bytes == 0) throw Error(ErrorCode::kInvalid, "block_bytes must not be 0");
  constexpr uint64_t kMaxBytes = std::numeric_limits<int64_t>::max();  // of a file, and so of a dimension
  if (file_bytes > kMaxBytes) throw Error(ErrorCode::kInvalid, "a file is smaller than 2^63 bytes");
  for (uint64_t begin = 0; begin < file_bytes;) {
    const uint64_t size = std::min(block_bytes, file_bytes - begin);
    tensors_.push_back({{"", DType::kU8, {static_cast<int64_t>(size)}, begin, begin + size}, file});
    begin += size;
  }
}

}  // namespace rdmaload
