#include "bindings/errors.h"

#include <algorithm>
#include <array>
#include <string>

namespace py = pybind11;

namespace rdmaload::bindings {
namespace {

struct ClassOfCode {
  ErrorCode code;
  const char* name;
};

constexpr std::array<ClassOfCode, 10> kClasses{{
    {ErrorCode::kUnavailable, "UnavailableError"},
    {ErrorCode::kTimeout, "LoadTimeoutError"},
    {ErrorCode::kAuthentication, "AuthenticationError"},
    {ErrorCode::kNotFound, "NotFoundError"},
    {ErrorCode::kIntegrity, "IntegrityError"},
    {ErrorCode::kFormat, "FormatError"},
    {ErrorCode::kNotSupported, "NotSupportedError"},
    {ErrorCode::kDevice, "DeviceError"},
    {ErrorCode::kInvalid, "UrlError"},
    {ErrorCode::kCancelled, "RdmaloadError"},  // the root, so last: the others match it, too
}};

}  // namespace

py::object python_error_class(ErrorCode code) {
  const auto entry = std::find_if(kClasses.begin(), kClasses.end(),
                                  [code](const ClassOfCode& one) { return one.code == code; });
  // A code that nobody has given a class.
  const char* const name = entry == kClasses.end() ? "RdmaloadError" : entry->name;
  return py::module_::import("rdmaload.errors").attr(name);
}

py::object memory_error_class() { return py::module_::import("rdmaload.errors").attr("MemoryLimitError"); }

Status status_of_exception(const py::error_already_set& error) {
  const std::string text = py::str(error.value());
  const py::module_ errors = py::module_::import("rdmaload.errors");
  for (const ClassOfCode& entry : kClasses) {
    if (entry.code != ErrorCode::kCancelled && error.matches(errors.attr(entry.name))) {
      return Status(entry.code, text);
    }
  }
  // Nothing that has a code; its text is complete all the same.
  if (error.matches(errors.attr("RdmaloadError"))) return Status(ErrorCode::kNotSupported, text);
  const std::string named = std::string(py::str(error.type().attr("__name__"))) + ": " + text;
  if (error.matches(PyExc_TimeoutError)) return Status(ErrorCode::kTimeout, named);
  if (error.matches(PyExc_FileNotFoundError) || error.matches(PyExc_KeyError)) {
    return Status(ErrorCode::kNotFound, named);
  }
  if (error.matches(PyExc_PermissionError)) return Status(ErrorCode::kAuthentication, named);
  if (error.matches(PyExc_OSError)) return Status(ErrorCode::kUnavailable, named);
  // A mistake in the connector: trying again would not help.
  return Status(ErrorCode::kNotSupported, "the connector failed with " + named);
}

}  // namespace rdmaload::bindings
