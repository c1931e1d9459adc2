// Checksums as an index has them, four little-endian bytes each, for the classes that take a table of them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "core/error.h"

namespace rdmaload::bindings {

inline std::vector<uint32_t> crcs_from_bytes(const pybind11::buffer& buffer) {
  const pybind11::buffer_info info = buffer.request();
  const auto bytes = static_cast<size_t>(info.size * info.itemsize);
  if (bytes % 4 != 0) throw Error(ErrorCode::kFormat, "checksums take four bytes each");
  std::vector<uint32_t> crcs(bytes / 4);
  const auto* raw = static_cast<const unsigned char*>(info.ptr);
  for (size_t i = 0; i < crcs.size(); ++i) {
    crcs[i] = raw[4 * i] | raw[4 * i + 1] << 8 | raw[4 * i + 2] << 16 | uint32_t{raw[4 * i + 3]} << 24;
  }
  return crcs;
}

}  // namespace rdmaload::bindings
