// Tensor index, plan and execution for Python.
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <tuple>
#include <variant>
#include <vector>

#include "bindings/byte_view.h"
#include "bindings/crcs.h"
#include "bindings/device_destination.h"
#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "loader/load.h"
#include "loader/plan.h"
#include "loader/tensor_index.h"
#include "loader/weight_map.h"

namespace py = pybind11;

namespace rdmaload::bindings {
namespace {

using Destination = std::variant<std::shared_ptr<HostArena>, std::shared_ptr<ImportedTensor>,
                                 std::shared_ptr<DeviceDestination>>;

// Destroying a Load waits for its reads, and a reader written in Python needs the GIL to end.
class LoadOperation {
 public:
  LoadOperation(std::shared_ptr<Transport> transport, std::shared_ptr<const StoreLayout> layout,
                std::shared_ptr<const LoadPlan> plan, const std::vector<Destination>& destinations,
                const LoadOptions& options) {
    std::vector<Region> regions;
    regions.reserve(destinations.size());
    for (const Destination& destination : destinations) {
      if (const auto* arena = std::get_if<std::shared_ptr<HostArena>>(&destination)) {
        regions.push_back({(*arena)->span(), *arena});
      } else if (const auto* tensor = std::get_if<std::shared_ptr<ImportedTensor>>(&destination)) {
        regions.push_back({(*tensor)->memory(), *tensor});
      } else {
        const auto& device = std::get<std::shared_ptr<DeviceDestination>>(destination);
        regions.push_back({device->memory(), device});
      }
    }
    load_ = std::make_unique<Load>(std::move(transport), std::move(layout), std::move(plan),
                                   std::move(regions), options);
  }
  ~LoadOperation() {
    if (getpid() != maker_) {  // forked: nobody completes its reads here, so it is abandoned
      static_cast<void>(load_.release());
      return;
    }
    py::gil_scoped_release release;
    load_.reset();
  }
  LoadOperation(const LoadOperation&) = delete;
  LoadOperation& operator=(const LoadOperation&) = delete;
  Load& load() { return *load_; }

 private:
  const pid_t maker_ = getpid();
  std::unique_ptr<Load> load_;
};

std::shared_ptr<StoreLayout> make_layout(
    const std::vector<std::tuple<std::string, uint64_t, uint64_t>>& files, uint64_t chunk_bytes,
    bool object_per_chunk, const py::buffer& crcs, const std::vector<std::string>& digests) {
  auto layout = std::make_shared<StoreLayout>();
  layout->files.reserve(files.size());
  for (const auto& [object, bytes, first_chunk] : files)
    layout->files.push_back({object, bytes, first_chunk});
  layout->chunk_bytes = chunk_bytes;
  layout->object_per_chunk = object_per_chunk;
  layout->crcs = crcs_from_bytes(crcs);
  for (const std::string& kind : digests) layout->digests.push_back(crc_kind(kind));
  layout->validate();
  return layout;
}

// An iterator over rows that are made when they are asked for: a list of 20,000 tuples would set off a
// collection of all of Python's objects, which takes longer than reading those tensors.
class Rows {
 public:
  Rows(size_t count, std::function<py::tuple(size_t)> row) : count_(count), row_(std::move(row)) {}

  py::tuple next() {
    if (next_ == count_) throw py::stop_iteration();
    return row_(next_++);
  }
  size_t left() const { return count_ - next_; }

 private:
  size_t count_;
  size_t next_ = 0;
  std::function<py::tuple(size_t)> row_;  // keeps alive what it reads
};

Rows rows_of(std::shared_ptr<TensorIndex> index) {
  const size_t count = index->tensors().size();
  std::map<std::vector<uint64_t>, py::tuple> shapes;  // equal shapes are one tuple
  return {count, [index = std::move(index), shapes = std::move(shapes)](size_t position) mutable {
            const IndexedTensor& tensor = index->tensors()[position];
            const TensorInfo& info = tensor.info;
            auto [shape, is_new] = shapes.try_emplace({info.shape.begin(), info.shape.end()});
            if (is_new) {
              shape->second = py::tuple(info.shape.size());
              for (size_t i = 0; i < info.shape.size(); ++i) shape->second[i] = info.shape[i];
            }
            return py::make_tuple(info.name, dtype_name(info.dtype), shape->second, tensor.file,
                                  info.end - info.begin);
          }};
}

// The tensors of a plan into arenas, by DLPack where `types` (dtype: code and bits) has their type and they
// have bytes: one row each, so that Python does no more for a tensor than to take it.
Rows exports_of(std::shared_ptr<LoadPlan> plan, std::shared_ptr<TensorIndex> index,
                std::vector<std::shared_ptr<HostArena>> arenas,
                const std::map<std::string, std::pair<uint8_t, uint8_t>>& types) {
  std::map<DType, DlDataType> known;
  for (const auto& [name, type] : types) {
    if (const auto dtype = dtype_from_name(name)) known[*dtype] = {type.first, type.second, 1};
  }
  const size_t count = plan->placements.size();
  return {count, [plan = std::move(plan), index = std::move(index), arenas = std::move(arenas),
                  known = std::move(known)](size_t i) {
            const Placement& placed = plan->placements[i];
            const TensorInfo& info = index->tensors().at(placed.tensor).info;
            py::object capsule = py::none();
            const auto type = known.find(info.dtype);
            if (type != known.end() && info.end > info.begin) {
              capsule = export_tensor(arenas.at(placed.region), placed.offset, type->second,
                                      {info.shape.begin(), info.shape.end()});
            }
            return py::make_tuple(placed.tensor, placed.region, placed.offset, info.name, std::move(capsule));
          }};
}

using Seconds = std::chrono::duration<double>;

// Seconds of the clock of Python's time.perf_counter(), which is this one on Linux; None: unset.
py::object seconds_of(Clock::time_point when) {
  if (when == Clock::time_point{}) return py::none();
  return py::float_(Seconds(when.time_since_epoch()).count());
}

py::tuple describe(const ReadTrace& read) {
  return py::make_tuple(seconds_of(read.submitted), seconds_of(read.times.taken),
                        seconds_of(read.times.first_byte), seconds_of(read.times.received),
                        seconds_of(read.done), Seconds(read.checksum_time).count(), read.times.thread,
                        read.file, read.offset, read.bytes, read.attempt, read.ok);
}

}  // namespace

void register_loader(py::module_& module) {
  py::class_<Rows>(module, "_Rows")  // to Python's side an Iterator, as _core.pyi says
      .def("__iter__", [](Rows& self) -> Rows& { return self; })
      .def("__next__", &Rows::next)
      .def("__length_hint__", &Rows::left);

  py::class_<TensorIndex, std::shared_ptr<TensorIndex>>(module, "TensorIndex")
      .def(py::init<>())
      .def(
          "add_file",
          [](TensorIndex& self, uint32_t file, const std::string& path, uint64_t file_bytes,
             const py::buffer& header) {
            const ByteView view(header);
            py::gil_scoped_release release;
            self.add_file(file, path, file_bytes, view.text());
          },
          py::arg("file"), py::arg("path"), py::arg("file_bytes"), py::arg("header"))
      .def(
          "add_single",
          [](TensorIndex& self, uint32_t file, const std::string& path, uint64_t file_bytes,
             const py::buffer& header, const std::string& stored_name, std::string name) {
            const ByteView view(header);
            self.add_single(file, path, file_bytes, view.text(), stored_name, std::move(name));
          },
          py::arg("file"), py::arg("path"), py::arg("file_bytes"), py::arg("header"), py::arg("stored_name"),
          py::arg("name"))
      .def("add_blocks", &TensorIndex::add_blocks, py::arg("file"), py::arg("file_bytes"),
           py::arg("block_bytes"))
      .def("__len__", [](const TensorIndex& self) { return self.tensors().size(); })
      .def("duplicate",
           [](const TensorIndex& self) -> std::optional<std::tuple<std::string, uint32_t, uint32_t>> {
             py::gil_scoped_release release;
             const auto found = self.duplicate();
             if (!found) return std::nullopt;
             const IndexedTensor& again = self.tensors()[found->second];
             return std::tuple(again.info.name, self.tensors()[found->first].file, again.file);
           })
      .def("tensors", &rows_of);

  py::class_<StoreLayout, std::shared_ptr<StoreLayout>>(module, "StoreLayout")
      .def(py::init(&make_layout), py::arg("files"), py::arg("chunk_bytes"), py::arg("object_per_chunk"),
           py::arg("crcs"), py::arg("digests") = std::vector<std::string>{});

  py::class_<PlanLimits>(module, "PlanLimits")
      .def(py::init([](bool whole_chunks, uint64_t read_bytes, uint64_t coalesce_gap,
                       uint64_t max_arena_bytes, uint64_t alignment) {
             return PlanLimits{whole_chunks, read_bytes, coalesce_gap, max_arena_bytes, alignment};
           }),
           py::kw_only(), py::arg("whole_chunks") = PlanLimits().whole_chunks,
           py::arg("read_bytes") = PlanLimits().read_bytes,
           py::arg("coalesce_gap") = PlanLimits().coalesce_gap,
           py::arg("max_arena_bytes") = PlanLimits().max_arena_bytes,
           py::arg("alignment") = PlanLimits().alignment);

  py::class_<LoadPlan, std::shared_ptr<LoadPlan>>(module, "LoadPlan")
      .def_property_readonly("region_bytes", [](const LoadPlan& self) { return self.region_bytes; })
      .def_readonly("wanted_bytes", &LoadPlan::wanted_bytes)
      .def_readonly("read_bytes", &LoadPlan::read_bytes)
      .def_property_readonly("files", &LoadPlan::files)
      .def_property_readonly("reads", [](const LoadPlan& self) { return self.reads.size(); })
      .def_property_readonly("segments", [](const LoadPlan& self) { return self.segments.size(); })
      .def("placements",
           [](std::shared_ptr<LoadPlan> self) {
             const size_t count = self->placements.size();
             return Rows(count, [self = std::move(self)](size_t i) {
               const Placement& placed = self->placements[i];
               return py::make_tuple(placed.tensor, placed.region, placed.offset);
             });
           })
      .def("exports", &exports_of, py::arg("index"), py::arg("arenas"), py::arg("types"));

  module.def(
      "files_of_weight_map",
      [](const py::buffer& text) {
        const ByteView view(text);
        return files_of_weight_map(view.text());
      },
      py::arg("text"));
  module.def(
      "plan_into_arenas",
      [](const TensorIndex& index, const StoreLayout& layout, std::vector<uint32_t> selection,
         const PlanLimits& limits) {
        py::gil_scoped_release release;
        return std::make_shared<LoadPlan>(plan_into_arenas(index, layout, std::move(selection), limits));
      },
      py::arg("index"), py::arg("layout"), py::arg("selection"), py::arg("limits"));
  module.def(
      "plan_into_tensors",
      [](const TensorIndex& index, const StoreLayout& layout, const std::vector<uint32_t>& selection,
         const PlanLimits& limits) {
        py::gil_scoped_release release;
        return std::make_shared<LoadPlan>(plan_into_tensors(index, layout, selection, limits));
      },
      py::arg("index"), py::arg("layout"), py::arg("selection"), py::arg("limits"));

  py::class_<LoadOperation>(module, "LoadOperation")
      .def(py::init([](std::shared_ptr<Transport> transport, std::shared_ptr<StoreLayout> layout,
                       std::shared_ptr<LoadPlan> plan, const std::vector<Destination>& destinations,
                       bool verify, int max_integrity_attempts, double retry_timeout,
                       std::optional<double> timeout, std::optional<uint64_t> queued_bytes, bool trace) {
             LoadOptions options;
             options.verify = verify;
             options.max_integrity_attempts = max_integrity_attempts;
             options.retry_timeout = Seconds(retry_timeout);
             if (timeout) options.timeout = Seconds(*timeout);
             if (queued_bytes) options.queued_bytes = *queued_bytes;
             options.trace = trace;
             return std::make_unique<LoadOperation>(std::move(transport), std::move(layout), std::move(plan),
                                                    destinations, options);
           }),
           py::arg("transport"), py::arg("layout"), py::arg("plan"), py::arg("destinations"), py::kw_only(),
           py::arg("verify") = true, py::arg("max_integrity_attempts") = 3, py::arg("retry_timeout") = 60.0,
           py::arg("timeout") = py::none(), py::arg("queued_bytes") = py::none(), py::arg("trace") = false)
      .def(
          "start", [](LoadOperation& self) { self.load().start(); }, py::call_guard<py::gil_scoped_release>())
      .def("throw_if_failed", [](LoadOperation& self) { self.load().throw_if_failed(); })
      .def_property_readonly("failed_object", [](LoadOperation& self) { return self.load().failed_object(); })
      .def("unfinished_regions", [](LoadOperation& self) { return self.load().unfinished_regions(); })
      .def("finished_files", [](LoadOperation& self) { return self.load().finished_files(); })
      .def(
          "wait_for",
          [](LoadOperation& self, double seconds) {
            return self.load().wait(Deadline::after(Seconds(seconds)));
          },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def(
          "cancel", [](LoadOperation& self) { self.load().cancel(); },
          py::call_guard<py::gil_scoped_release>())
      .def("trace",
           [](LoadOperation& self) {
             const std::vector<ReadTrace> trace = self.load().trace();
             py::list list(trace.size());
             for (size_t i = 0; i < trace.size(); ++i) list[i] = describe(trace[i]);
             return list;
           })
      .def("digests",
           [](LoadOperation& self) {
             const std::vector<PieceDigest> digests = self.load().digests();
             py::list list(digests.size());
             for (size_t i = 0; i < digests.size(); ++i) {
               const PieceDigest& piece = digests[i];
               list[i] = py::make_tuple(piece.file, piece.offset, piece.bytes, piece.digest);
             }
             return list;
           })
      .def("counters", [](LoadOperation& self) {
        const LoadCounters counters = self.load().counters();
        py::dict result;
        result["done_bytes"] = counters.done_bytes;
        result["verified_bytes"] = counters.verified_bytes;
        result["unverified_bytes"] = counters.unverified_bytes;
        result["copied_bytes"] = counters.copied_bytes;
        result["cached_bytes"] = counters.cached_bytes;
        result["retries"] = counters.retries;
        result["checksum_seconds"] = Seconds(counters.checksum_time).count();
        result["seconds"] = Seconds(counters.elapsed).count();
        return result;
      });
}

}  // namespace rdmaload::bindings
