// GPUs for Python: the staged road, conversions, and which driver there is. Streams and device memory cross
// as the integers that torch gives (cuda_stream, data_ptr).
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "bindings/device_destination.h"
#include "bindings/register.h"
#include "device/kernels.h"
#include "device/pinned_pool.h"
#include "transport/gds_transport.h"
#include "transport/staged_transport.h"

namespace py = pybind11;

namespace rdmaload::bindings {
namespace {

cuda::Stream stream_of(uint64_t handle) {
  return reinterpret_cast<cuda::Stream>(static_cast<uintptr_t>(handle));
}

FloatType float_type(const std::string& name) {
  if (name == "F16") return FloatType::kF16;
  if (name == "BF16") return FloatType::kBF16;
  if (name == "F32") return FloatType::kF32;
  throw Error(ErrorCode::kInvalid, "no kernel converts " + name);
}

// Its destruction waits for reads, which may need the GIL; in a forked process there is nobody to wait for.
template <typename T>
std::shared_ptr<T> abandoned_after_fork(T* transport) {
  return {transport, [maker = getpid()](T* doomed) {
            if (getpid() != maker) return;
            if (PyGILState_Check() == 0) {
              delete doomed;
              return;
            }
            py::gil_scoped_release inner;
            delete doomed;
          }};
}

std::shared_ptr<StagedTransport> make_staged(std::shared_ptr<Transport> source, int device,
                                             uint64_t read_bytes, uint64_t staging_bytes,
                                             uint64_t expected_bytes, uint64_t block_bytes,
                                             bool verify_device, bool trace) {
  StagingOptions options;
  options.read_bytes = read_bytes;
  options.staging_bytes = staging_bytes;
  options.expected_bytes = expected_bytes;
  options.block_bytes = block_bytes;
  options.verify_device = verify_device;
  options.trace = trace;
  py::gil_scoped_release release;
  return abandoned_after_fork(new StagedTransport(std::move(source), Device::get(device), options));
}

std::shared_ptr<GdsTransport> make_gds(std::shared_ptr<FileTransport> files,
                                       std::shared_ptr<StagedTransport> staged, int device,
                                       uint64_t read_bytes, uint64_t device_bytes, bool verify_device) {
  GdsOptions options;
  options.read_bytes = read_bytes;
  options.device_bytes = device_bytes;
  options.verify_device = verify_device;
  py::gil_scoped_release release;
  Device& on = Device::get(device);
  const DeviceGuard guard(on);  // cuFile makes driver calls of its own when it is opened
  return abandoned_after_fork(
      new GdsTransport(std::move(files), std::move(staged), on, CuFile::process(), options));
}

py::dict describe(const StagingCounters& counters) {
  py::dict result;
  result["copied_bytes"] = counters.copied_bytes;
  result["copies"] = counters.copies;
  result["scattered_pieces"] = counters.scattered_pieces;
  result["verified_bytes"] = counters.verified_bytes;
  result["staging_bytes"] = counters.staging_bytes;
  result["device_bytes"] = counters.device_bytes;
  return result;
}

}  // namespace

void register_device(py::module_& module) {
  module.def(
      "open_cuda_driver",
      [](const std::string& library, const py::bytes& kernels) {
        const std::string_view image(kernels);
        auto* kept = new std::string(image);  // for the process's life, as the driver's table
        Driver::open_process(library, std::as_bytes(std::span(*kept)));
      },
      py::arg("library"), py::arg("kernels") = py::bytes());
  module.def("set_cufile_library", &CuFile::set_process_library, py::arg("library"));
  module.def("cufile_refusal", []() -> std::string {
    py::gil_scoped_release release;
    try {
      CuFile::process();
      return "";
    } catch (const Error& error) {
      return error.what();
    }
  });
  module.def(
      "release_pinned_memory", [] { PinnedPool::process().release(); },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "cuda_device_count", [] { return Driver::process().device_count(); },
      py::call_guard<py::gil_scoped_release>());
  module.def("cuda_driver_info", [] {
    const Driver& driver = Driver::process();
    py::dict result;
    result["library"] = driver.library();
    result["version"] = driver.version();
    result["kernels"] = !driver.kernel_image().empty();
    return result;
  });
  module.def(
      "kernels_refusal",
      [](int device) {
        std::string why;
        Device::get(device).kernels(&why);
        return why;
      },
      py::arg("device"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "convert_on_device",
      [](int device, uint64_t source, const std::string& source_type, uint64_t target,
         const std::string& target_type, uint64_t count, uint64_t stream) {
        Device& on = Device::get(device);
        const Kernels* kernels = on.kernels();
        if (kernels == nullptr) return false;
        const FloatType from = float_type(source_type), to = float_type(target_type);
        const DeviceGuard guard(on);
        kernels->convert(source, from, target, to, count, stream_of(stream)).throw_if_failed();
        return true;
      },
      py::arg("device"), py::arg("source"), py::arg("source_type"), py::arg("target"), py::arg("target_type"),
      py::arg("count"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  py::class_<DeviceDestination, std::shared_ptr<DeviceDestination>>(module, "DeviceDestination")
      .def(py::init<uint64_t, size_t, py::object>(), py::arg("pointer"), py::arg("nbytes"), py::arg("owner"))
      .def_property_readonly("nbytes", [](const DeviceDestination& self) { return self.memory().size(); });

  py::class_<StagedTransport, Transport, std::shared_ptr<StagedTransport>>(module, "StagedTransport")
      .def(py::init(&make_staged), py::arg("source"), py::kw_only(), py::arg("device"), py::arg("read_bytes"),
           py::arg("staging_bytes"), py::arg("expected_bytes"),
           py::arg("block_bytes") = StagingOptions().block_bytes, py::arg("verify_device") = false,
           py::arg("trace") = false)
      .def(
          "follow", [](StagedTransport& self, uint64_t stream) { self.follow(stream_of(stream)); },
          py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "lead", [](StagedTransport& self, uint64_t stream) { self.lead(stream_of(stream)); },
          py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("stream",
                             [](const StagedTransport& self) {
                               return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(self.stream()));
                             })
      .def_property_readonly("block_bytes", &StagedTransport::block_bytes)
      .def_property_readonly("no_kernels_reason", &StagedTransport::no_kernels_reason)
      .def("staging_counters", [](const StagedTransport& self) { return describe(self.counters()); })
      .def("trace", [](const StagedTransport& self) {
        using Seconds = std::chrono::duration<double>;
        py::list list;
        for (const StagingTrace& entry : self.trace()) {
          list.append(py::make_tuple(Seconds(entry.begun).count(), Seconds(entry.received).count(),
                                     Seconds(entry.copied).count(), entry.bytes));
        }
        return list;
      });

  py::class_<GdsTransport, Transport, std::shared_ptr<GdsTransport>>(module, "GdsTransport")
      .def(py::init(&make_gds), py::arg("files"), py::arg("staged"), py::kw_only(), py::arg("device"),
           py::arg("read_bytes"), py::arg("device_bytes"), py::arg("verify_device") = false)
      .def_property_readonly("block_bytes", &GdsTransport::block_bytes)
      .def_property_readonly("verified_bytes", &GdsTransport::verified_bytes);
}

}  // namespace rdmaload::bindings
