// Checksums as an index has them, four little-endian bytes each, for the classes that take a table of them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings/byte_view.h"
#include "core/error.h"

namespace rdmaload::bindings {

inline std::vector<uint32_t> crcs_from_bytes(const pybind11::buffer& buffer) {
  const ByteView view(buffer);
  if (view.bytes().size() % 4 != 0) throw Error(ErrorCode::kFormat, "checksums take four bytes each");
  std::vector<uint32_t> crcs(view.bytes().size() / 4);
  const auto* raw = reinterpret_cast<const unsigned char*>(view.bytes().data());
  for (size_t i = 0; i < crcs.size(); ++i) {
    crcs[i] = raw[4 * i] | raw[4 * i + 1] << 8 | raw[4 * i + 2] << 16 | uint32_t{raw[4 * i + 3]} << 24;
  }
  return crcs;
}

}  // namespace rdmaload::bindings
