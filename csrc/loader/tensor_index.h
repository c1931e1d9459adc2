// The tensor index: the parsed safetensors headers of a model's weight files.
//
// Built once per opened model, then read-only: any thread may read it.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "loader/safetensors.h"

namespace rdmaload {

struct IndexedTensor {
  TensorInfo info;
  uint32_t file;  // position among the files of the store layout
};

class TensorIndex {
 public:
  // `file` is the file's position in the StoreLayout; `header` the JSON without its length. Throws kFormat,
  // naming `path`.
  void add_file(uint32_t file, const std::string& path, uint64_t file_bytes, std::string_view header);
  // A file that must hold exactly one tensor, under `stored_name`; in the index it gets `name`.
  void add_single(uint32_t file, const std::string& path, uint64_t file_bytes, std::string_view header,
                  std::string_view stored_name, std::string name);
  // A file whose content does not matter: its bytes as unnamed U8 tensors of at most `block_bytes`.
  void add_blocks(uint32_t file, uint64_t file_bytes, uint64_t block_bytes);
  const std::vector<IndexedTensor>& tensors() const noexcept { return tensors_; }
  // The first tensor whose name another before it has, and that one: {earlier, later}.
  std::optional<std::pair<size_t, size_t>> duplicate() const;

 private:
  std::vector<IndexedTensor> tensors_;
};

}  // namespace rdmaload
