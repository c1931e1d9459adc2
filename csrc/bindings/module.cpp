// The extension module rdmaload._core.
#include "bindings/register.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "rdmaload's native core; its Python face is the rdmaload package.";
  rdmaload::bindings::register_core(module);
  rdmaload::bindings::register_memory(module);
  rdmaload::bindings::register_transport(module);
  rdmaload::bindings::register_device(module);  // after its base class
  rdmaload::bindings::register_rdma(module);
  rdmaload::bindings::register_loader(module);
  rdmaload::bindings::register_server(module);
}
