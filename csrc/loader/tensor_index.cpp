#include "loader/tensor_index.h"

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "core/error.h"

namespace rdmaload {
namespace {

SafetensorsHeader parse(const std::string& path, uint64_t file_bytes, std::string_view header) {
  try {
    return parse_safetensors_header(header, file_bytes);
  } catch (const Error& error) {
    throw Error(error.code(), "file '" + path + "': " + error.what());
  }
}

}  // namespace

void TensorIndex::add_file(uint32_t file, const std::string& path, uint64_t file_bytes,
                           std::string_view header) {
  SafetensorsHeader parsed = parse(path, file_bytes, header);
  tensors_.reserve(tensors_.size() + parsed.tensors.size());
  for (TensorInfo& info : parsed.tensors) tensors_.push_back({std::move(info), file});
}

void TensorIndex::add_single(uint32_t file, const std::string& path, uint64_t file_bytes,
                             std::string_view header, std::string_view stored_name, std::string name) {
  SafetensorsHeader parsed = parse(path, file_bytes, header);
  if (parsed.tensors.size() != 1 || parsed.tensors[0].name != stored_name) {
    throw Error(ErrorCode::kFormat, "file '" + path + "' holds " + std::to_string(parsed.tensors.size()) +
                                        " tensors, expected is one with the name '" +
                                        std::string(stored_name) + "'");
  }
  parsed.tensors[0].name = std::move(name);
  tensors_.push_back({std::move(parsed.tensors[0]), file});
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

std::optional<std::pair<size_t, size_t>> TensorIndex::duplicate() const {
  std::unordered_map<std::string_view, size_t> seen;
  seen.reserve(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const auto [at, is_new] = seen.emplace(tensors_[i].info.name, i);
    if (!is_new) return std::pair(at->second, i);
  }
  return std::nullopt;
}

}  // namespace rdmaload
