// Arenas for Python, and tensors in and out of them by DLPack.
#include <pybind11/stl.h>

#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "memory/host_arena.h"

namespace py = pybind11;

namespace rdmaload::bindings {

void register_memory(py::module_& module) {
  py::class_<HostArena, std::shared_ptr<HostArena>>(module, "HostArena", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("nbytes"))
      .def_buffer([](HostArena& self) {
        return py::buffer_info(self.data(), 1, py::format_descriptor<uint8_t>::format(),
                               static_cast<py::ssize_t>(self.size()));
      })
      .def_property_readonly("nbytes", &HostArena::size)
      .def(
          "tensor",
          [](std::shared_ptr<HostArena> self, uint64_t offset, uint8_t code, uint8_t bits,
             std::vector<int64_t> shape) {
            return export_tensor(std::move(self), offset, DlDataType{code, bits, 1}, std::move(shape));
          },
          py::arg("offset"), py::arg("code"), py::arg("bits"), py::arg("shape"));
  py::class_<ImportedTensor, std::shared_ptr<ImportedTensor>>(module, "ImportedTensor")
      .def(py::init<const py::capsule&>(), py::arg("capsule"))
      .def_property_readonly("nbytes", [](const ImportedTensor& self) { return self.memory().size(); });
}

}  // namespace rdmaload::bindings
