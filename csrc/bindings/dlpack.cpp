#include "bindings/dlpack.h"

#include <cstring>

#include "core/checked.h"
#include "core/error.h"

namespace py = pybind11;

namespace rdmaload::bindings {
namespace {

constexpr int32_t kDeviceCpu = 1;
constexpr const char* kFresh = "dltensor";
constexpr const char* kUsed = "used_dltensor";

// What an exported tensor owns: its shape and its share of the arena.
struct Exported {
  DlManagedTensor managed;
  std::vector<int64_t> shape;
  std::shared_ptr<HostArena> arena;
};

uint64_t byte_count(const DlTensor& tensor) {
  uint64_t bits = uint64_t{tensor.dtype.bits} * tensor.dtype.lanes;
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] < 0 || __builtin_mul_overflow(bits, static_cast<uint64_t>(tensor.shape[i]), &bits)) {
      throw Error(ErrorCode::kInvalid, "the shape of a tensor is out of range");
    }
  }
  return bits / 8;
}

void check_contiguous(const DlTensor& tensor) {
  if (tensor.strides == nullptr) return;
  int64_t expected = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0) return;
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) {
      throw Error(ErrorCode::kInvalid, "a destination tensor is not contiguous");
    }
    expected *= tensor.shape[i];
  }
}

}  // namespace

py::capsule export_tensor(std::shared_ptr<HostArena> arena, uint64_t offset, DlDataType dtype,
                          std::vector<int64_t> shape) {
  auto exported = std::make_unique<Exported>();
  exported->shape = std::move(shape);
  exported->managed = DlManagedTensor{
      DlTensor{arena->data() + offset, DlDevice{kDeviceCpu, 0}, static_cast<int32_t>(exported->shape.size()),
               dtype, exported->shape.data(), nullptr, 0},
      exported.get(), [](DlManagedTensor* managed) { delete static_cast<Exported*>(managed->manager_ctx); }};
  const uint64_t bytes = byte_count(exported->managed.dl_tensor);
  if (offset > arena->size() || bytes > arena->size() - offset) {
    throw Error(ErrorCode::kInvalid, "a tensor would lie outside of its arena");
  }
  exported->arena = std::move(arena);
  PyObject* capsule = PyCapsule_New(&exported->managed, kFresh, [](PyObject* self) {
    if (PyCapsule_IsValid(self, kFresh)) {
      auto* managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(self, kFresh));
      managed->deleter(managed);
    }
  });
  if (capsule == nullptr) throw py::error_already_set();
  exported.release();  // the capsule's, then its consumer's
  return py::reinterpret_steal<py::capsule>(capsule);
}

ImportedTensor::ImportedTensor(const py::capsule& capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), kFresh)) {
    throw Error(ErrorCode::kInvalid, "expected a DLPack capsule that nobody has consumed yet");
  }
  managed_ = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kFresh));
  if (managed_->dl_tensor.device.device_type != kDeviceCpu) {
    throw Error(ErrorCode::kInvalid, "a destination tensor is not in host memory");
  }
  check_contiguous(managed_->dl_tensor);
  byte_count(managed_->dl_tensor);
  PyCapsule_SetName(capsule.ptr(), kUsed);
}

ImportedTensor::~ImportedTensor() {
  if (managed_->deleter != nullptr) managed_->deleter(managed_);
}

std::span<std::byte> ImportedTensor::memory() const {
  const DlTensor& tensor = managed_->dl_tensor;
  return {static_cast<std::byte*>(tensor.data) + tensor.byte_offset, byte_count(tensor)};
}

}  // namespace rdmaload::bindings
