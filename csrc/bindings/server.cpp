// The weight server for Python: a store, and a server that gives out what is in it.
#include "server/server.h"

#include <pybind11/stl.h>
#include <unistd.h>

#include <cstring>

#include "bindings/register.h"
#include "core/error.h"

namespace py = pybind11;

namespace rdmaload::bindings {
namespace {

using server::Counters;
using server::ExportedFile;
using server::FileRange;
using server::RdmaOptions;
using server::Server;
using server::ServerOptions;
using server::Store;
using server::ValueMemory;

// Keys `{prefix}0`, `{prefix}1`, ... for the chunks of a file.
void export_file(Store& store, const std::string& prefix, std::string path, uint64_t size, int64_t mtime_ns,
                 uint64_t chunk_bytes) {
  if (chunk_bytes == 0) throw Error(ErrorCode::kInvalid, "chunks of no bytes");
  const auto file = std::make_shared<const ExportedFile>(std::move(path), size, mtime_ns);
  for (uint64_t offset = 0, chunk = 0; offset < size; offset += chunk_bytes, ++chunk) {
    store.export_range(prefix + std::to_string(chunk), {file, offset, std::min(chunk_bytes, size - offset)});
  }
}

// The keys `{from}0` to `{from}{count - 1}` under `to`, too.
void export_copies(Store& store, const std::string& from, const std::string& to, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) store.export_copy(to + std::to_string(i), from + std::to_string(i));
}

void unlock(Store& store, const std::vector<std::string>& keys) {
  for (const std::string& key : keys) store.unlock(key);
}

std::shared_ptr<server::Value> value_of(Store& store, std::string_view bytes) {
  auto value = store.memory()->allocate(bytes.size());
  if (value == nullptr) {
    throw Error(ErrorCode::kUnavailable,
                "the memory limit is too low even for the index of the exported models");
  }
  if (!bytes.empty()) std::memcpy(value->fill().data(), bytes.data(), bytes.size());
  return value;
}

void export_value(Store& store, const std::string& key, const py::bytes& content) {
  const std::string_view bytes = content;
  const py::gil_scoped_release release;  // `content` is held by the caller, and bytes do not change
  store.export_value(key, value_of(store, bytes));
}

void set_value(Store& store, const std::string& key, const py::bytes& content) {
  const std::string_view bytes = content;
  const py::gil_scoped_release release;
  if (store.set(key, value_of(store, bytes), server::SetCondition::kAlways) != server::Outcome::kDone) {
    throw Error(ErrorCode::kUnavailable, "the key " + key + " cannot be written");
  }
}

void add_name(Store& store, const std::string& key, const std::string& name) {
  const std::string_view member = name;
  if (store.add_members(key, {&member, 1}).outcome == server::Outcome::kNoMemory) {
    throw Error(ErrorCode::kUnavailable,
                "the memory limit is too low even for the names of the exported models");
  }
}

py::dict counters_of(const Server& server) {
  const Counters& counters = server.counters();
  const ValueMemory& memory = *server.store()->memory();
  py::dict found;
  found["connections_accepted"] = counters.connections_accepted.load();
  found["connections_refused"] = counters.connections_refused.load();
  found["connections_now"] = counters.connections_now.load();
  found["connections_stalled"] = counters.connections_stalled.load();
  found["commands"] = counters.commands.load();
  found["errors"] = counters.errors.load();
  found["hits"] = counters.hits.load();
  found["misses"] = counters.misses.load();
  found["bytes_received"] = counters.bytes_received.load();
  found["bytes_sent"] = counters.bytes_sent.load();
  found["bytes_by_reference"] = counters.bytes_by_reference.load();
  found["refused_for_memory"] = counters.refused_for_memory.load();
  found["auth_failures"] = counters.auth_failures.load();
  found["auth_refused"] = counters.auth_refused.load();
  found["tls_failures"] = counters.tls_failures.load();
  found["files_failed"] = counters.files_failed.load();
  found["rdma_connections_now"] = counters.rdma_connections_now.load();
  found["rdma_reads"] = counters.rdma_reads.load();
  found["rdma_work_requests"] = counters.rdma_work_requests.load();
  found["rdma_direct_bytes"] = counters.rdma_direct_bytes.load();
  found["rdma_copied_bytes"] = counters.rdma_copied_bytes.load();
  found["registered_bytes"] = memory.registered_bytes();
  found["keys"] = server.store()->size();
  found["values"] = memory.values();
  found["used_bytes"] = memory.used_bytes();
  found["held_bytes"] = memory.held_bytes();
  found["limit_bytes"] = memory.limit_bytes();
  return found;
}

// A server's threads do not exist in a process forked from its own: there it is abandoned.
std::shared_ptr<Server> make_server(std::shared_ptr<Store> store, std::string host, int port,
                                    std::optional<std::string> password, int threads, int max_connections,
                                    double stall_timeout, std::string version,
                                    const std::optional<std::array<std::string, 3>>& tls,
                                    std::optional<std::string> rdma_host, std::optional<int> rdma_port,
                                    int rdma_max_connections) {
  ServerOptions options;
  options.host = std::move(host);
  options.port = port;
  options.password = std::move(password).value_or("");
  options.threads = threads;
  options.max_connections = max_connections;
  options.stall_timeout = std::chrono::duration<double>(stall_timeout);
  options.version = std::move(version);
  if (tls) options.tls = {(*tls)[0], (*tls)[1], (*tls)[2]};
  options.rdma.host = std::move(rdma_host).value_or("");
  options.rdma.port = rdma_port;
  options.rdma.max_connections = rdma_max_connections;
  return {new Server(std::move(store), std::move(options)), [maker = getpid()](Server* doomed) {
            if (getpid() != maker) return;
            if (PyGILState_Check() == 0) {
              delete doomed;
              return;
            }
            const py::gil_scoped_release release;
            delete doomed;
          }};
}

}  // namespace

void register_server(py::module_& module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<Store, std::shared_ptr<Store>>(module, "WeightStore")
      .def(py::init(
               [](uint64_t limit_bytes) { return std::make_shared<Store>(ValueMemory::make(limit_bytes)); }),
           py::arg("limit_bytes"))
      .def("export_file", &export_file, py::kw_only(), py::arg("prefix"), py::arg("path"), py::arg("size"),
           py::arg("mtime_ns"), py::arg("chunk_bytes"), Released())
      .def("export_copies", &export_copies, py::kw_only(), py::arg("prefix"), py::arg("to"), py::arg("count"),
           Released())
      .def("export_value", &export_value, py::arg("key"), py::arg("content"))
      .def("set_value", &set_value, py::arg("key"), py::arg("content"))
      .def("unlock", &unlock, py::arg("keys"), Released())
      .def("add_name", &add_name, py::arg("key"), py::arg("name"), Released());
  py::class_<Server, std::shared_ptr<Server>>(module, "WeightServer")
      .def(py::init(&make_server), py::arg("store"), py::kw_only(), py::arg("host") = "127.0.0.1",
           py::arg("port") = 0, py::arg("password") = py::none(), py::arg("threads") = 2,
           py::arg("max_connections") = 10000, py::arg("stall_timeout") = 120.0, py::arg("version") = "",
           py::arg("tls") = py::none(), py::arg("rdma_host") = py::none(), py::arg("rdma_port") = py::none(),
           py::arg("rdma_max_connections") = RdmaOptions{}.max_connections)
      .def_property_readonly("port", &Server::port)
      .def_property_readonly("rdma_port", &Server::rdma_port)
      .def_property_readonly("counters", &counters_of)
      .def(
          "wait",
          [](Server& self, double seconds) { return self.wait(std::chrono::duration<double>(seconds)); },
          py::arg("seconds"), Released())
      .def("take_log", &Server::take_log)
      .def("close", &Server::stop, Released());
}

}  // namespace rdmaload::bindings
