// The safetensors header parser on any header and file size. What it accepts must be what its comment
// promises: tensors of the right size that cover the data without gaps or overlaps, under names of their own;
// and a header written from the result must give the same result.
//
// input = extra (u64, big-endian: data bytes, if its top byte is not 0xff; else the file's size itself)
// header
#include <algorithm>
#include <set>
#include <string>

#include "allocation_bound.h"
#include "core/checked.h"
#include "core/error.h"
#include "fuzz_input.h"
#include "loader/safetensors.h"
#include "loader/tensor_index.h"

namespace rdmaload {
namespace {

std::string escaped(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    constexpr std::string_view kHex = "0123456789abcdef";
    const auto byte = static_cast<uint8_t>(c);
    if (byte < 0x20) {
      out += {'\\', 'u', '0', '0', kHex[byte >> 4], kHex[byte & 15]};
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + "\"";
}

std::string written(const SafetensorsHeader& header) {
  std::string out = "{\"__metadata__\":{";
  const char* comma = "";
  for (const auto& [key, value] : header.metadata) {
    out += comma + escaped(key) + ":" + escaped(value);
    comma = ",";
  }
  out += "}";
  for (const TensorInfo& tensor : header.tensors) {
    out += "," + escaped(tensor.name) + ":{\"dtype\":\"" + std::string(dtype_name(tensor.dtype)) +
           "\",\"shape\":[";
    comma = "";
    for (const int64_t dimension : tensor.shape) {
      out += comma + std::to_string(dimension);
      comma = ",";
    }
    out += "],\"data_offsets\":[" + std::to_string(tensor.begin - header.data_begin) + "," +
           std::to_string(tensor.end - header.data_begin) + "]}";
  }
  return out + "}";
}

void check(const SafetensorsHeader& header, uint64_t header_bytes, uint64_t file_bytes) {
  FUZZ_CHECK(header.data_begin == 8 + header_bytes);
  FUZZ_CHECK(header.data_begin <= file_bytes);
  std::set<std::string_view> names;
  uint64_t at = header.data_begin;
  for (const TensorInfo& tensor : header.tensors) {
    FUZZ_CHECK(names.insert(tensor.name).second);
    FUZZ_CHECK(tensor.begin == at);
    FUZZ_CHECK(tensor.end >= tensor.begin);
    at = tensor.end;
    const bool empty = std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end();
    std::optional<uint64_t> bits = empty ? 0 : 1;
    for (const int64_t dimension : tensor.shape) {
      FUZZ_CHECK(dimension >= 0);
      if (!empty) bits = checked_mul(*bits, static_cast<uint64_t>(dimension));
      FUZZ_CHECK(bits.has_value());
    }
    bits = checked_mul(*bits, static_cast<uint64_t>(dtype_bits(tensor.dtype)));
    FUZZ_CHECK(bits.has_value() && *bits % 8 == 0 && *bits / 8 == tensor.end - tensor.begin);
    FUZZ_CHECK(dtype_from_name(dtype_name(tensor.dtype)) == tensor.dtype);
  }
  FUZZ_CHECK(at == file_bytes);
  FUZZ_CHECK(std::is_sorted(header.metadata.begin(), header.metadata.end(),
                            [](const auto& a, const auto& b) { return a.first < b.first; }));
}

bool same(const SafetensorsHeader& a, const SafetensorsHeader& b) {
  return a.metadata == b.metadata &&
         std::equal(a.tensors.begin(), a.tensors.end(), b.tensors.begin(), b.tensors.end(),
                    [&](const TensorInfo& x, const TensorInfo& y) {
                      return x.name == y.name && x.dtype == y.dtype && x.shape == y.shape &&
                             x.begin - a.data_begin == y.begin - b.data_begin &&
                             x.end - a.data_begin == y.end - b.data_begin;
                    });
}

}  // namespace
}  // namespace rdmaload

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rdmaload;
  fuzz::FuzzInput input(data, size);
  const uint64_t number = input.u64();
  const std::string json(input.rest());
  const uint64_t file_bytes = number >> 56 == 0xff ? number & 0xffff'ffff : 8 + json.size() + number;

  SafetensorsHeader header;
  try {
    // The most costly text is metadata: six bytes of it are a pair of strings of 64 bytes, in a vector that
    // doubles and is then sorted with a buffer.
    const fuzz::AllocationBound bound(48 * json.size() + 16384);
    header = parse_safetensors_header(json, file_bytes);
  } catch (const Error& error) {
    FUZZ_CHECK(error.code() == ErrorCode::kFormat);
    FUZZ_CHECK(std::string_view(error.what()).starts_with("safetensors header"));
    return 0;
  }
  check(header, json.size(), file_bytes);

  const std::string text = written(header);
  const uint64_t data_bytes = file_bytes - header.data_begin;
  if (data_bytes <= UINT64_MAX - 8 - text.size()) {
    const SafetensorsHeader again = parse_safetensors_header(text, 8 + text.size() + data_bytes);
    FUZZ_CHECK(same(header, again));
  }
  TensorIndex index;
  index.add_file(3, "file", file_bytes, json);
  FUZZ_CHECK(index.tensors().size() == header.tensors.size());
  return 0;
}
