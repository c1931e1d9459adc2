// Transports for Python: made here, used only by the loader.
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <optional>

#include "bindings/byte_view.h"
#include "bindings/crcs.h"
#include "bindings/errors.h"
#include "bindings/python_transport.h"
#include "bindings/register.h"
#include "transport/cache/caching_transport.h"
#include "transport/file_transport.h"
#include "transport/http/http_transport.h"
#include "transport/memory_transport.h"
#include "transport/rdma/rdma_transport.h"
#include "transport/rdma/verbs_queue_pair.h"
#include "transport/resp/resp_transport.h"
#include "transport/tls.h"

namespace py = pybind11;

namespace rdmaload::bindings {
namespace {

// Destroying a transport joins its threads, which may wait for the GIL. In a process forked from the one that
// made it there are no such threads, and its locks may be held for ever: there it is abandoned.
template <typename T>
std::shared_ptr<T> released_on_delete(T* transport) {
  return std::shared_ptr<T>(transport, [maker = getpid()](T* doomed) {
    if (getpid() != maker) return;
    if (PyGILState_Check() == 0) {
      delete doomed;
      return;
    }
    py::gil_scoped_release release;
    delete doomed;
  });
}

std::shared_ptr<resp::RespTransport> make_resp(std::string host, int port,
                                               std::optional<std::string> username,
                                               std::optional<std::string> password, int db, int protocol,
                                               int connections, uint64_t bytes_in_flight,
                                               double connect_timeout, double inactivity_timeout,
                                               std::string name, std::string socket_path,
                                               std::shared_ptr<const TlsContext> tls) {
  using Seconds = std::chrono::duration<double>;
  resp::Endpoint endpoint;
  endpoint.host = std::move(host);
  endpoint.port = port;
  endpoint.username = std::move(username).value_or("");
  endpoint.password = std::move(password).value_or("");
  endpoint.database = db;
  endpoint.protocol = protocol;
  endpoint.connect_timeout = Seconds(connect_timeout);
  endpoint.inactivity_timeout = Seconds(inactivity_timeout);
  endpoint.name = std::move(name);
  endpoint.socket_path = std::move(socket_path);
  endpoint.tls = std::move(tls);
  return released_on_delete(new resp::RespTransport({std::move(endpoint), connections, bytes_in_flight}));
}

std::shared_ptr<rdma::RdmaTransport> make_rdma(std::string host, int port, int tcp_port, bool fall_back,
                                               std::string device, std::optional<std::string> username,
                                               std::optional<std::string> password, int db, int protocol,
                                               int connections, uint64_t bytes_in_flight,
                                               double connect_timeout, double inactivity_timeout,
                                               std::string name) {
  using Seconds = std::chrono::duration<double>;
  rdma::TransportOptions options;
  options.endpoint.host = std::move(host);
  options.endpoint.port = port;
  options.endpoint.username = std::move(username).value_or("");
  options.endpoint.password = std::move(password).value_or("");
  options.endpoint.database = db;
  options.endpoint.protocol = protocol;
  options.endpoint.connect_timeout = Seconds(connect_timeout);
  options.endpoint.inactivity_timeout = Seconds(inactivity_timeout);
  options.endpoint.name = std::move(name);
  options.device = std::move(device);
  options.connections = connections;
  options.bytes_in_flight = bytes_in_flight;
  options.fabric = std::make_shared<rdma::VerbsFabric>();
  if (fall_back) {
    resp::TransportOptions tcp{options.endpoint, connections, bytes_in_flight};
    tcp.endpoint.port = tcp_port;
    options.fall_back = [tcp] { return std::make_unique<resp::RespTransport>(tcp); };
  }
  return released_on_delete(new rdma::RdmaTransport(std::move(options)));
}

// Connects as a load would, and says how: doctor's.
std::string rdma_way(std::string host, int port, std::string device, std::optional<std::string> username,
                     std::optional<std::string> password, int db, int protocol, double connect_timeout,
                     std::string name) {
  resp::Endpoint endpoint;
  endpoint.host = std::move(host);
  endpoint.port = port;
  endpoint.username = std::move(username).value_or("");
  endpoint.password = std::move(password).value_or("");
  endpoint.database = db;
  endpoint.protocol = protocol;
  endpoint.connect_timeout = std::chrono::duration<double>(connect_timeout);
  endpoint.name = std::move(name);
  rdma::VerbsFabric fabric;
  rdma::Remote remote{endpoint.host, endpoint.port, std::move(device), nullptr};
  rdma::Session session(fabric, endpoint, remote, rdma::Session::kLeastWindowBytes, [] { return false; });
  return session.description();
}

// The last owner may go without the GIL.
std::shared_ptr<py::function> held_anywhere(py::function function) {
  return {new py::function(std::move(function)), [](py::function* doomed) {
            py::gil_scoped_acquire acquire;
            delete doomed;
          }};
}

// An Addresses function of Python: (object, refused) -> (url, headers, etag, proxy, proxy authorization,
// seconds that it lasts or None).
http::Addresses python_addresses(py::function function) {
  return [held = held_anywhere(std::move(function))](const std::string& object, bool refused) {
    py::gil_scoped_acquire acquire;
    try {
      using Headers = std::vector<std::pair<std::string, std::string>>;
      using Answer =
          std::tuple<std::string, Headers, std::string, std::string, std::string, std::optional<double>>;
      auto [url, headers, etag, proxy, authorization, seconds] = py::cast<Answer>((*held)(object, refused));
      return http::Address{std::move(url),
                           std::move(headers),
                           std::move(etag),
                           std::move(proxy),
                           std::move(authorization),
                           Deadline::after(std::chrono::duration<double>(seconds.value_or(1e9))).when()};
    } catch (const py::error_already_set& error) {
      const Status status = status_of_exception(error);
      throw Error(status.code(), status.message());
    } catch (const py::cast_error&) {
      throw Error(ErrorCode::kNotSupported, "the connector's address of '" + object + "' has the wrong form");
    }
  };
}

// A TlsContext, or a function of Python that makes one when it is needed; none: https is refused.
std::function<std::shared_ptr<const TlsContext>()> python_tls(const py::object& given) {
  if (given.is_none()) return {};
  if (!PyCallable_Check(given.ptr())) {
    return [context = py::cast<std::shared_ptr<TlsContext>>(given)] { return context; };
  }
  return [held = held_anywhere(py::cast<py::function>(given))]() -> std::shared_ptr<const TlsContext> {
    py::gil_scoped_acquire acquire;
    try {
      return py::cast<std::shared_ptr<TlsContext>>((*held)());
    } catch (const py::error_already_set& error) {
      const Status status = status_of_exception(error);
      throw Error(status.code(), status.message());
    }
  };
}

std::shared_ptr<http::HttpTransport> make_http(py::function addresses, int connections,
                                               double connect_timeout, double inactivity_timeout,
                                               double stall_timeout, const py::object& tls,
                                               std::string name) {
  using Seconds = std::chrono::duration<double>;
  return released_on_delete(new http::HttpTransport(
      {python_addresses(std::move(addresses)), connections, Seconds(connect_timeout),
       Seconds(inactivity_timeout), Seconds(stall_timeout), python_tls(tls), std::move(name)}));
}

// `entries` has a name and a description per file of the store: (object, bytes, first block, name,
// description).
std::shared_ptr<CachingTransport> make_caching(
    std::shared_ptr<Transport> source, std::string directory, std::optional<uint64_t> limit_bytes,
    uint64_t block_bytes, bool object_per_block,
    const std::vector<std::tuple<std::string, uint64_t, uint64_t, std::string, std::string>>& entries,
    const py::buffer& crcs, int threads, const std::string& io, double patience) {
  CacheOptions options;
  options.directory = std::move(directory);
  options.limit_bytes = limit_bytes;
  options.block_bytes = block_bytes;
  options.object_per_block = object_per_block;
  options.files.reserve(entries.size());
  for (const auto& [object, bytes, first_block, name, description] : entries) {
    options.files.push_back({object, bytes, first_block, {name, description, bytes, block_bytes}});
  }
  options.crcs = crcs_from_bytes(crcs);
  options.reading.threads = threads;
  options.reading.direct_reads = std::max(options.reading.direct_reads, threads);
  options.reading.io = parse_file_io(io);
  options.patience = std::chrono::duration<double>(patience);
  return released_on_delete(new CachingTransport(std::move(source), std::move(options)));
}

}  // namespace

void register_transport(py::module_& module) {
  py::class_<Transport, std::shared_ptr<Transport>>(module, "Transport")
      .def_property_readonly("path", [](const Transport& self) { return std::string(self.path()); })
      .def_property_readonly("fallback_reason", &Transport::fallback_reason)
      .def_property_readonly("keeps_digests", &Transport::keeps_digests)
      .def_property_readonly("description", &Transport::description)
      .def_property_readonly("connections", &Transport::connections);

  module.def("is_local_disk", &is_local_disk, py::arg("fd"));
  py::class_<FileTransport, Transport, std::shared_ptr<FileTransport>>(module, "FileTransport")
      .def(py::init([](std::string root, int threads, const std::string& io) {
             FileOptions options;
             options.threads = threads;
             options.direct_reads = std::max(options.direct_reads, threads);
             options.io = parse_file_io(io);
             return released_on_delete(new FileTransport(std::move(root), std::move(options)));
           }),
           py::kw_only(), py::arg("root"), py::arg("threads"), py::arg("io") = "auto");

  py::class_<MemoryTransport, Transport, std::shared_ptr<MemoryTransport>>(module, "MemoryTransport")
      .def(py::init([](int threads) { return released_on_delete(new MemoryTransport(threads)); }),
           py::kw_only(), py::arg("threads"))
      .def(
          "put",
          [](MemoryTransport& self, const std::string& object, const py::buffer& buffer) {
            const ByteView view(buffer);
            std::vector<std::byte> bytes(view.bytes().begin(), view.bytes().end());
            py::gil_scoped_release release;
            self.put(object, std::move(bytes));
          },
          py::arg("object"), py::arg("buffer"));

  module.def("tls_library", &tls_library);
  py::class_<TlsContext, std::shared_ptr<TlsContext>>(module, "TlsContext")
      .def(py::init([](std::string ca_file, std::string ca_dir, std::string client_cert_file,
                       std::string client_key_file, std::string server_name, bool verify) {
             return std::make_shared<TlsContext>(
                 TlsOptions{std::move(ca_file), std::move(ca_dir), std::move(client_cert_file),
                            std::move(client_key_file), std::move(server_name), verify});
           }),
           py::kw_only(), py::arg("ca_file") = "", py::arg("ca_dir") = "", py::arg("client_cert_file") = "",
           py::arg("client_key_file") = "", py::arg("server_name") = "", py::arg("verify") = true,
           py::call_guard<py::gil_scoped_release>());

  py::class_<resp::RespTransport, Transport, std::shared_ptr<resp::RespTransport>>(module, "RespTransport")
      .def(py::init(&make_resp), py::kw_only(), py::arg("host"), py::arg("port"),
           py::arg("username") = py::none(), py::arg("password") = py::none(), py::arg("db") = 0,
           py::arg("protocol") = 2, py::arg("connections") = 2, py::arg("bytes_in_flight") = 4 << 20,
           py::arg("connect_timeout") = 10.0, py::arg("inactivity_timeout") = 30.0, py::arg("name") = "redis",
           py::arg("socket_path") = "", py::arg("tls") = nullptr);

  py::class_<rdma::RdmaTransport, Transport, std::shared_ptr<rdma::RdmaTransport>>(module, "RdmaTransport")
      .def(py::init(&make_rdma), py::kw_only(), py::arg("host"), py::arg("port"), py::arg("tcp_port"),
           py::arg("fall_back"), py::arg("device") = "", py::arg("username") = py::none(),
           py::arg("password") = py::none(), py::arg("db") = 0, py::arg("protocol") = 2,
           py::arg("connections") = 4, py::arg("bytes_in_flight") = 16 << 20,
           py::arg("connect_timeout") = 10.0, py::arg("inactivity_timeout") = 30.0, py::arg("name") = "rdma");

  module.def("rdma_way", &rdma_way, py::kw_only(), py::arg("host"), py::arg("port"), py::arg("device") = "",
             py::arg("username") = py::none(), py::arg("password") = py::none(), py::arg("db") = 0,
             py::arg("protocol") = 2, py::arg("connect_timeout") = 10.0, py::arg("name") = "rdma",
             py::call_guard<py::gil_scoped_release>());

  py::class_<http::HttpTransport, Transport, std::shared_ptr<http::HttpTransport>>(module, "HttpTransport")
      .def(py::init(&make_http), py::arg("addresses"), py::kw_only(), py::arg("connections") = 8,
           py::arg("connect_timeout") = 10.0, py::arg("inactivity_timeout") = 30.0,
           py::arg("stall_timeout") = 2.0, py::arg("tls") = py::none(), py::arg("name") = "http");

  py::class_<CachingTransport, Transport, std::shared_ptr<CachingTransport>>(module, "CachingTransport")
      .def(py::init(&make_caching), py::arg("source"), py::kw_only(), py::arg("directory"),
           py::arg("limit_bytes"), py::arg("block_bytes"), py::arg("object_per_block"), py::arg("entries"),
           py::arg("crcs"), py::arg("threads"), py::arg("io") = "auto", py::arg("patience") = 30.0);

  py::class_<PythonTransport, Transport, std::shared_ptr<PythonTransport>>(module, "PythonTransport")
      .def(py::init([](py::function reader, int threads) {
             return std::shared_ptr<PythonTransport>(new PythonTransport(std::move(reader), threads),
                                                     [maker = getpid()](PythonTransport* doomed) {
                                                       if (getpid() != maker) return;
                                                       py::gil_scoped_acquire acquire;
                                                       delete doomed;
                                                     });
           }),
           py::arg("reader"), py::arg("threads"));

  py::class_<LentBuffer>(module, "LentBuffer", py::buffer_protocol()).def_buffer([](LentBuffer& self) {
    const auto memory = self.memory();
    return py::buffer_info(memory.data(), sizeof(uint8_t), py::format_descriptor<uint8_t>::format(),
                           static_cast<py::ssize_t>(memory.size()));
  });
}

}  // namespace rdmaload::bindings
