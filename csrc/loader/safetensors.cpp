#include "loader/safetensors.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <limits>
#include <tuple>

#include "core/checked.h"
#include "core/error.h"
#include "loader/json.h"

namespace rdmaload {
namespace {

struct DTypeRow {
  DType dtype;
  std::string_view name;
  int bits;
};

// In the order of the enumerators, which is checked below. Names and sizes are the safetensors crate's.
constexpr DTypeRow kDTypes[] = {
    {DType::kBool, "BOOL", 8},
    {DType::kU8, "U8", 8},
    {DType::kI8, "I8", 8},
    {DType::kF8E5M2, "F8_E5M2", 8},
    {DType::kF8E4M3, "F8_E4M3", 8},
    {DType::kF8E8M0, "F8_E8M0", 8},
    {DType::kF8E5M2FNUZ, "F8_E5M2FNUZ", 8},
    {DType::kF8E4M3FNUZ, "F8_E4M3FNUZ", 8},
    {DType::kF4, "F4", 4},
    {DType::kF6E2M3, "F6_E2M3", 6},
    {DType::kF6E3M2, "F6_E3M2", 6},
    {DType::kI16, "I16", 16},
    {DType::kU16, "U16", 16},
    {DType::kF16, "F16", 16},
    {DType::kBF16, "BF16", 16},
    {DType::kI32, "I32", 32},
    {DType::kU32, "U32", 32},
    {DType::kF32, "F32", 32},
    {DType::kC64, "C64", 64},
    {DType::kF64, "F64", 64},
    {DType::kI64, "I64", 64},
    {DType::kU64, "U64", 64},
};
static_assert([] {
  for (size_t i = 0; i < std::size(kDTypes); ++i) {
    if (static_cast<size_t>(kDTypes[i].dtype) != i) return false;
  }
  return std::size(kDTypes) == static_cast<size_t>(DType::kU64) + 1;
}());

constexpr std::string_view kMetadata = "__metadata__";
constexpr uint64_t kLengthBytes = 8;  // the u64 before the header

// A name from the file as it may stand in a message: on one line, and of bounded length.
std::string quoted(std::string_view name) {
  constexpr size_t kMaxShown = 200;
  size_t shown = std::min(name.size(), kMaxShown);
  // Not in the middle of a UTF-8 sequence.
  while (shown < name.size() && shown > 0 && (static_cast<uint8_t>(name[shown]) & 0xc0) == 0x80) --shown;
  std::string text = "\"";
  for (const char c : name.substr(0, shown)) {
    if (static_cast<uint8_t>(c) < 0x20 || c == 0x7f) {
      constexpr std::string_view kHex = "0123456789abcdef";
      text += {'\\', 'x', kHex[static_cast<uint8_t>(c) >> 4], kHex[static_cast<uint8_t>(c) & 0xf]};
    } else {
      if (c == '"' || c == '\\') text += '\\';
      text += c;
    }
  }
  return text + (shown < name.size() ? "...\"" : "\"");
}

std::string shape_text(const std::vector<int64_t>& shape) {
  constexpr size_t kMaxShown = 16;
  std::string text = "[";
  for (size_t i = 0; i < std::min(shape.size(), kMaxShown); ++i) {
    if (i != 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + (shape.size() > kMaxShown ? ", ...]" : "]");
}

std::string range_text(uint64_t begin, uint64_t end) {
  std::string text = "[";
  text += std::to_string(begin);
  text += ", ";
  text += std::to_string(end);
  text += "]";
  return text;
}

[[noreturn]] void fail(const std::string& what) {
  throw Error(ErrorCode::kFormat, "safetensors header: " + what);
}

[[noreturn]] void fail_tensor(const TensorInfo& tensor, const std::string& what) {
  fail("tensor " + quoted(tensor.name) + ": " + what);
}

uint64_t tensor_bytes(const TensorInfo& tensor) {
  std::optional<uint64_t> bits = 1;
  for (const int64_t dimension : tensor.shape) {
    if (bits) bits = checked_mul(*bits, static_cast<uint64_t>(dimension));
  }
  if (bits) bits = checked_mul(*bits, static_cast<uint64_t>(dtype_bits(tensor.dtype)));
  if (!bits) fail_tensor(tensor, "shape " + shape_text(tensor.shape) + " has more than 2^64 bits");
  if (*bits % 8 != 0) {
    fail_tensor(tensor, "shape " + shape_text(tensor.shape) + " of " + std::string(dtype_name(tensor.dtype)) +
                            " does not end at a whole byte");
  }
  return *bits / 8;
}

// Reads the JSON: all that its grammar and the types of its fields say. Offsets stay relative to the data.
class HeaderReader {
 public:
  explicit HeaderReader(std::string_view json) : json_(json) {}

  void read(SafetensorsHeader& header) {
    try {
      read_members(header);
    } catch (const Error& error) {
      throw Error(error.code(), "safetensors header, " + std::string(error.what()));
    }
  }

 private:
  void read_members(SafetensorsHeader& header) {
    json_.begin_object();
    while (json_.next_member(name_)) {
      try {
        read_member(header);
      } catch (const Error& error) {
        throw Error(error.code(), error.what() + (" (in " + quoted(name_) + ")"));
      }
    }
    json_.finish();
  }

  void read_member(SafetensorsHeader& header) {
    if (name_ != kMetadata) {
      header.tensors.push_back(read_tensor());
      return;
    }
    if (has_metadata_) json_.fail("the name occurs twice");
    has_metadata_ = true;
    read_metadata(header.metadata);
  }

  void read_metadata(std::vector<std::pair<std::string, std::string>>& metadata) {
    if (json_.peek() == JsonReader::Kind::kNull) return json_.read_null();
    std::string key;
    json_.begin_object();
    while (json_.next_member(key)) {
      json_.read_string(text_);
      metadata.emplace_back(key, text_);
    }
  }

  TensorInfo read_tensor() {
    TensorInfo tensor{name_, {}, {}, 0, 0};
    bool has_dtype = false;
    bool has_shape = false;
    bool has_offsets = false;
    const auto once = [&](bool& seen) {
      if (seen) json_.fail("field " + quoted(field_) + " occurs twice");
      seen = true;
    };
    json_.begin_object();
    while (json_.next_member(field_)) {
      if (field_ == "dtype") {
        once(has_dtype);
        tensor.dtype = read_dtype();
      } else if (field_ == "shape") {
        once(has_shape);
        tensor.shape = read_shape();
      } else if (field_ == "data_offsets") {
        once(has_offsets);
        read_offsets(tensor);
      } else {
        json_.skip_value();  // the crate ignores fields that it does not know, and so must we
      }
    }
    for (const auto& [has, field] : {std::pair(has_dtype, "dtype"), std::pair(has_shape, "shape"),
                                     std::pair(has_offsets, "data_offsets")}) {
      if (!has) json_.fail(std::string("the entry has no field \"") + field + "\"");
    }
    return tensor;
  }

  DType read_dtype() {
    json_.read_string(text_);
    const auto dtype = dtype_from_name(text_);
    if (!dtype) json_.fail("unknown dtype " + quoted(text_));
    return *dtype;
  }

  std::vector<int64_t> read_shape() {
    shape_.clear();
    json_.begin_array();
    while (json_.next_element()) {
      const uint64_t dimension = json_.read_unsigned();
      if (dimension > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        json_.fail("the dimension " + std::to_string(dimension) + " does not fit 63 bits");
      }
      shape_.push_back(static_cast<int64_t>(dimension));
    }
    return shape_;  // copied, so that each tensor holds only what it needs
  }

  void read_offsets(TensorInfo& tensor) {
    json_.begin_array();
    bool two = json_.next_element();
    if (two) tensor.begin = json_.read_unsigned();
    two = two && json_.next_element();
    if (two) tensor.end = json_.read_unsigned();
    if (!two || json_.next_element()) json_.fail("data_offsets must be two integers");
  }

  JsonReader json_;
  bool has_metadata_ = false;
  std::string name_;   // of the member being read
  std::string field_;  // of the tensor's field being read
  // Reused.
  std::string text_;
  std::vector<int64_t> shape_;
};

void check_ranges(const std::vector<TensorInfo>& tensors, uint64_t data_bytes) {
  for (const TensorInfo& tensor : tensors) {
    const auto range = [&] { return "data_offsets " + range_text(tensor.begin, tensor.end); };
    if (tensor.end < tensor.begin) fail_tensor(tensor, range() + " end before they begin");
    if (tensor.end > data_bytes) {
      fail_tensor(tensor, range() + " end after the file's " + std::to_string(data_bytes) +
                              " bytes of data (is the file truncated?)");
    }
    const uint64_t bytes = tensor_bytes(tensor);
    if (tensor.end - tensor.begin != bytes) {
      fail_tensor(tensor, "shape " + shape_text(tensor.shape) + " of " +
                              std::string(dtype_name(tensor.dtype)) + " takes " + std::to_string(bytes) +
                              " bytes, but " + range() + " hold " +
                              std::to_string(tensor.end - tensor.begin));
    }
  }
}

// By sorting rather than by hashing: names chosen to collide cost nothing.
void check_unique_names(const std::vector<TensorInfo>& tensors) {
  std::vector<const TensorInfo*> by_name;
  by_name.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) by_name.push_back(&tensor);
  std::sort(by_name.begin(), by_name.end(), [](const auto* a, const auto* b) { return a->name < b->name; });
  const auto twice = std::adjacent_find(by_name.begin(), by_name.end(),
                                        [](const auto* a, const auto* b) { return a->name == b->name; });
  if (twice != by_name.end()) fail_tensor(**twice, "the name occurs twice");
}

void sort_by_place(std::vector<TensorInfo>& tensors) {
  const auto before = [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  };
  if (!std::is_sorted(tensors.begin(), tensors.end(), before))
    std::sort(tensors.begin(), tensors.end(), before);
}

// Sorted tensors must cover the data exactly.
void check_coverage(const std::vector<TensorInfo>& tensors, uint64_t data_bytes) {
  uint64_t covered = 0;
  const TensorInfo* previous = nullptr;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.begin < covered) {
      fail_tensor(tensor, "data_offsets " + range_text(tensor.begin, tensor.end) +
                              " overlap those of tensor " + quoted(previous->name) + ", " +
                              range_text(previous->begin, previous->end));
    }
    if (tensor.begin > covered) {
      fail_tensor(tensor, "data_offsets " + range_text(tensor.begin, tensor.end) +
                              " leave the data from byte " + std::to_string(covered) + " to no tensor");
    }
    covered = tensor.end;
    previous = &tensor;
  }
  if (covered != data_bytes) {
    fail("the tensors end at byte " + std::to_string(covered) + " of the data, the file at byte " +
         std::to_string(data_bytes));
  }
}

// A key that occurs twice has its last value, as in the crate.
void sort_metadata(std::vector<std::pair<std::string, std::string>>& metadata) {
  std::stable_sort(metadata.begin(), metadata.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  // Backwards, the last of equals comes first and is the one that unique() keeps.
  const auto kept = std::unique(metadata.rbegin(), metadata.rend(),
                                [](const auto& a, const auto& b) { return a.first == b.first; });
  metadata.erase(metadata.begin(), kept.base());
}

}  // namespace

std::string_view dtype_name(DType dtype) {
  assert(dtype <= DType::kU64);
  return kDTypes[static_cast<size_t>(dtype)].name;
}

int dtype_bits(DType dtype) {
  assert(dtype <= DType::kU64);
  return kDTypes[static_cast<size_t>(dtype)].bits;
}

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const DTypeRow& row : kDTypes) {
    if (row.name == name) return row.dtype;
  }
  return std::nullopt;
}

SafetensorsHeader parse_safetensors_header(std::string_view json, uint64_t file_bytes) {
  if (json.size() > kMaxHeaderBytes) {
    fail(std::to_string(json.size()) + " bytes are more than the limit of " +
         std::to_string(kMaxHeaderBytes));
  }
  const uint64_t data_begin = kLengthBytes + json.size();
  if (data_begin > file_bytes) {
    fail(std::to_string(json.size()) + " bytes do not fit a file of " + std::to_string(file_bytes) +
         " bytes");
  }
  const uint64_t data_bytes = file_bytes - data_begin;

  SafetensorsHeader header{{}, {}, data_begin};
  HeaderReader(json).read(header);
  check_ranges(header.tensors, data_bytes);
  check_unique_names(header.tensors);
  sort_by_place(header.tensors);
  check_coverage(header.tensors, data_bytes);
  sort_metadata(header.metadata);
  // Cannot wrap: no end is beyond the data, which ends where the file ends.
  for (TensorInfo& tensor : header.tensors) {
    tensor.begin += data_begin;
    tensor.end += data_begin;
  }
  return header;
}

}  // namespace rdmaload
