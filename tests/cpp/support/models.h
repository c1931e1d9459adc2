// Made-up models: files full of tensors, their index and the way a store keeps them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/crc32c.h"
#include "loader/plan.h"
#include "support/bytes.h"

namespace rdmaload::testing {

// The header of a safetensors file whose tensors are U8 vectors of these sizes, one after the other. A size
// of kScalar makes an F32 scalar.
constexpr int64_t kScalar = -1;

inline std::string safetensors_header(const std::vector<int64_t>& sizes) {
  std::string header = "{";
  uint64_t at = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const bool scalar = sizes[i] == kScalar;
    const uint64_t end = at + (scalar ? 4 : static_cast<uint64_t>(sizes[i]));
    if (i > 0) header += ",";
    header += "\"t" + std::to_string(i) + "\":{\"dtype\":\"" + (scalar ? "F32" : "U8") + "\",\"shape\":[" +
              (scalar ? "" : std::to_string(sizes[i])) + "],\"data_offsets\":[" + std::to_string(at) + "," +
              std::to_string(end) + "]}";
    at = end;
  }
  return header + "}";
}

struct Model {
  std::vector<std::vector<std::byte>> files;
  TensorIndex index;
  StoreLayout layout;

  // Random content; only the sizes of the tensors matter to a plan.
  void add_file(const std::vector<int64_t>& sizes, uint64_t seed) {
    const std::string header = safetensors_header(sizes);
    uint64_t bytes = 8 + header.size();
    for (const int64_t size : sizes) bytes += size == kScalar ? 4 : static_cast<uint64_t>(size);
    const auto number = static_cast<uint32_t>(files.size());
    index.add_file(number, "file-" + std::to_string(number), bytes, header);
    files.push_back(random_bytes(bytes, seed));
    layout.files.push_back({"model/" + std::to_string(number) + "/", bytes, 0});
  }
  // A file of nothing but one U8 tensor per block.
  void add_blocks(uint64_t bytes, uint64_t block_bytes, uint64_t seed) {
    const auto number = static_cast<uint32_t>(files.size());
    index.add_blocks(number, bytes, block_bytes);
    files.push_back(random_bytes(bytes, seed));
    layout.files.push_back({"model/" + std::to_string(number) + "/", bytes, 0});
  }
  // After the last file.
  void divide(uint64_t chunk_bytes, bool object_per_chunk, bool with_crcs) {
    layout.chunk_bytes = chunk_bytes;
    layout.object_per_chunk = object_per_chunk;
    layout.crcs.clear();
    for (uint32_t file = 0; with_crcs && file < files.size(); ++file) {
      layout.files[file].first_chunk = layout.crcs.size();
      for (uint64_t chunk = 0; chunk < layout.chunk_count(file); ++chunk) {
        layout.crcs.push_back(crc32c(0, chunk_of(file, chunk)));
      }
    }
  }

  std::span<const std::byte> chunk_of(uint32_t file, uint64_t chunk) const {
    const std::span<const std::byte> all(files[file]);
    const uint64_t begin = chunk * layout.chunk_bytes;
    return all.subspan(begin, std::min(layout.chunk_bytes, all.size() - begin));
  }
  // What the store answers for the object of this name; empty when there is none.
  std::span<const std::byte> object(const std::string& name) const {
    for (uint32_t file = 0; file < files.size(); ++file) {
      const std::string& object = layout.files[file].object;
      if (!layout.object_per_chunk) {
        if (name == object) return files[file];
      } else if (name.size() > object.size() && name.starts_with(object)) {
        const uint64_t chunk = std::stoull(name.substr(object.size()));
        if (chunk < layout.chunk_count(file)) return chunk_of(file, chunk);
      }
    }
    return {};
  }
  std::span<const std::byte> bytes_of_tensor(uint32_t tensor) const {
    const IndexedTensor& entry = index.tensors()[tensor];
    return std::span(files[entry.file]).subspan(entry.info.begin, entry.info.end - entry.info.begin);
  }
};

}  // namespace rdmaload::testing
