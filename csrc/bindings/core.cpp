// Errors and checksums for Python.
#include "bindings/byte_view.h"
#include "bindings/errors.h"
#include "bindings/register.h"
#include "core/crc.h"
#include "core/crc32c.h"
#include "core/error.h"

namespace py = pybind11;

namespace rdmaload::bindings {
namespace {

uint32_t crc32c_of(const py::object& data, uint32_t value) {
  const ByteView view(data);
  py::gil_scoped_release release;
  return crc32c(value, view.bytes());
}

CrcKind kind_of(const std::string& name) {
  const CrcKind kind = crc_kind(name);
  if (kind == CrcKind::kNone) throw Error(ErrorCode::kInvalid, "no such checksum: " + name);
  return kind;
}

uint64_t crc_of(const std::string& kind, const py::object& data, uint64_t value) {
  const ByteView view(data);
  py::gil_scoped_release release;
  return crc(kind_of(kind), value, view.bytes());
}

}  // namespace

void register_core(py::module_& module) {
  // Local: other extensions that are built with pybind11 keep their own way with bad_alloc.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      py::set_error(python_error_class(error.code()), error.what());
    } catch (const std::bad_alloc&) {
      py::set_error(memory_error_class(),
                    "the system gives this process no more memory: load less at once (include=, "
                    "weight_iterator()), or raise its limit (ulimit -v)");
    }
  });
  module.def("crc32c", &crc32c_of, py::arg("data"), py::arg("value") = 0);
  module.def("crc32c_combine", &crc32c_combine, py::arg("a"), py::arg("b"), py::arg("length_b"));
  module.def("crc", &crc_of, py::arg("kind"), py::arg("data"), py::arg("value") = 0);
  module.def(
      "crc_combine",
      [](const std::string& kind, uint64_t a, uint64_t b, uint64_t length_b) {
        return crc_combine(kind_of(kind), a, b, length_b);
      },
      py::arg("kind"), py::arg("a"), py::arg("b"), py::arg("length_b"));
  module.def("crc32c_implementation", [] { return std::string(crc32c_implementation()); });
}

}  // namespace rdmaload::bindings
