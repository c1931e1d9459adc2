// ErrorCode to the classes of rdmaload.errors, and back. Call with the GIL held.
#pragma once

#include <pybind11/pybind11.h>

#include "core/error.h"

namespace rdmaload::bindings {

pybind11::object python_error_class(ErrorCode code);
// The class for std::bad_alloc.
pybind11::object memory_error_class();
// What an exception raised by a connector written in Python means to the loader.
Status status_of_exception(const pybind11::error_already_set& error);

}  // namespace rdmaload::bindings
