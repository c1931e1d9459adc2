#include "bindings/python_transport.h"

#include "bindings/errors.h"
#include "memory/host_arena.h"
#include "transport/segment_cursor.h"

namespace py = pybind11;

namespace rdmaload::bindings {

PythonTransport::PythonTransport(py::function reader, int threads)
    : ThreadedTransport(threads), reader_(std::move(reader)) {
  start();
}

PythonTransport::~PythonTransport() {
  py::gil_scoped_release release;  // the workers may need it to end
  stop();
}

std::optional<Status> PythonTransport::perform(Read& read) {
  read.times.first_byte = read.times.taken;  // the connector does not say when bytes come
  if (read.segments.size() == 1 && read.segments[0].data != nullptr && read.memory_owner != nullptr) {
    const std::span<std::byte> memory(read.segments[0].data, read.segments[0].size);
    const Status status = call_reader(read, memory, read.memory_owner);
    if (!status.ok()) return status;
    SegmentCursor cursor(read);
    iovec vector{memory.data(), memory.size()};
    cursor.advance(std::span(&vector, 1), memory.size());
    return Status();
  }
  // The buffer is owned by what is lent, so a view that Python keeps never dangles.
  auto staging = std::make_shared<HostArena>(read.length);
  const Status status = call_reader(read, staging->span(), staging);
  if (!status.ok()) return status;
  SegmentCursor cursor(read);
  cursor.copy_from(staging->span());
  return Status();
}

Status PythonTransport::call_reader(Read& read, std::span<std::byte> memory, std::shared_ptr<void> owner) {
  py::gil_scoped_acquire acquire;
  try {
    py::object lent = py::cast(std::make_unique<LentBuffer>(memory, std::move(owner)));
    py::object view = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(lent.ptr()));
    if (!view) throw py::error_already_set();
    const auto got = py::cast<uint64_t>(reader_(read.object, read.offset, view));
    try {
      view.attr("release")();
    } catch (const py::error_already_set&) {
      return Status(ErrorCode::kNotSupported,
                    "the connector kept a view of the buffer that it read '" + read.object + "' into");
    }
    if (got != memory.size()) {
      return Status(ErrorCode::kIntegrity, "'" + read.object + "' gave " + std::to_string(got) +
                                               " bytes, expected " + std::to_string(memory.size()));
    }
    return Status();
  } catch (const py::error_already_set& error) {
    return status_of_exception(error);
  } catch (const py::cast_error&) {
    return Status(ErrorCode::kNotSupported,
                  "the connector's read of '" + read.object + "' did not return a length");
  }
}

}  // namespace rdmaload::bindings
