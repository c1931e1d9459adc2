// One registration function per layer; module.cpp only calls them.
#pragma once

#include <pybind11/pybind11.h>

namespace rdmaload::bindings {

void register_core(pybind11::module_& module);
void register_memory(pybind11::module_& module);
void register_device(pybind11::module_& module);
void register_transport(pybind11::module_& module);
void register_rdma(pybind11::module_& module);
void register_loader(pybind11::module_& module);
void register_server(pybind11::module_& module);

}  // namespace rdmaload::bindings
