// The DLPack structures (version 0.8 of its stable C interface) and their capsules: how tensors cross to
// torch and back.
//
// Layout and names of the fields are the standard's; see https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "memory/host_arena.h"

namespace rdmaload::bindings {

struct DlDevice {
  int32_t device_type;  // 1: CPU
  int32_t device_id;
};

struct DlDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;  // nullptr: row-major
  uint64_t byte_offset;
};

struct DlManagedTensor {
  DlTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DlManagedTensor*);
};

// A capsule for a tensor inside the arena, of which it keeps a share. Throws kInvalid when it would not lie
// inside.
pybind11::capsule export_tensor(std::shared_ptr<HostArena> arena, uint64_t offset, DlDataType dtype,
                                std::vector<int64_t> shape);

// Takes over the tensor of a capsule: contiguous host memory that stays alive as long as this does.
class ImportedTensor {
 public:
  explicit ImportedTensor(const pybind11::capsule& capsule);
  ~ImportedTensor();
  ImportedTensor(const ImportedTensor&) = delete;
  ImportedTensor& operator=(const ImportedTensor&) = delete;
  std::span<std::byte> memory() const;

 private:
  DlManagedTensor* managed_;
};

}  // namespace rdmaload::bindings
