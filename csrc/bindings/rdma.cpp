// The RDMA cards of this machine, what doctor asks about them, and the way from a card into GPU memory.
#include <pybind11/stl.h>
#include <unistd.h>

#include "bindings/register.h"
#include "device/gpudirect.h"
#include "transport/rdma/device_transport.h"
#include "transport/rdma/devices.h"

namespace py = pybind11;

namespace rdmaload::bindings {
namespace {

py::dict describe(const rdma::CardPort& port) {
  py::list gids;
  for (const rdma::Gid& gid : port.gids) {
    py::dict entry;
    entry["index"] = gid.index;
    entry["address"] = gid.address;
    entry["type"] = gid.type;
    entry["netdev"] = gid.netdev;
    gids.append(entry);
  }
  py::dict result;
  result["number"] = port.number;
  result["state"] = port.state;
  result["link_layer"] = port.link_layer;
  result["rate"] = port.rate;
  result["gbit_per_s"] = port.gbit_per_s;
  result["gids"] = gids;
  return result;
}

py::dict describe(const rdma::Card& card) {
  py::list ports;
  for (const rdma::CardPort& port : card.ports) ports.append(describe(port));
  py::dict result;
  result["name"] = card.name;
  result["node_type"] = card.node_type;
  result["firmware"] = card.firmware;
  result["pci_path"] = card.pci_path;
  result["numa_node"] = card.numa_node;
  result["netdevs"] = card.netdevs;
  result["usable"] = card.usable();
  result["ports"] = ports;
  return result;
}

// Its destruction waits for reads, which may need the GIL; in a forked process there is nobody to wait for.
std::shared_ptr<rdma::DeviceTransport> make_device_transport(std::shared_ptr<rdma::RdmaTransport> network,
                                                             std::shared_ptr<StagedTransport> staged,
                                                             int device, bool verify_device) {
  py::gil_scoped_release release;
  Device& on = Device::get(device);
  return {new rdma::DeviceTransport(std::move(network), std::move(staged), on, verify_device),
          [maker = getpid()](rdma::DeviceTransport* doomed) {
            if (getpid() != maker) return;
            if (PyGILState_Check() == 0) {
              delete doomed;
              return;
            }
            py::gil_scoped_release inner;
            delete doomed;
          }};
}

}  // namespace

void register_rdma(py::module_& module) {
  module.def(
      "rdma_cards",
      [](const std::string& sysfs) {
        py::list result;
        for (const rdma::Card& card : rdma::list_cards(sysfs)) result.append(describe(card));
        return result;
      },
      py::arg("sysfs") = "/sys");
  // (name, what lies between, hops), nearest first.
  module.def(
      "rdma_cards_by_distance",
      [](const std::string& pci_address, const std::string& sysfs) {
        const std::vector<rdma::Card> cards = rdma::list_cards(sysfs);
        std::vector<std::tuple<std::string, std::string, size_t>> result;
        for (const rdma::CardDistance& distance : rdma::cards_by_distance(cards, pci_address, sysfs)) {
          result.emplace_back(distance.card->name, rdma::name_of(distance.crossing), distance.hops);
        }
        return result;
      },
      py::arg("pci_address"), py::arg("sysfs") = "/sys");
  module.def(
      "rdma_route",
      [](const std::string& host,
         int port) -> std::optional<std::tuple<std::string, std::string, std::string>> {
        const auto route = rdma::route_to(host, port);
        if (!route) return std::nullopt;
        const std::vector<rdma::Card> cards = rdma::list_cards();
        const rdma::Card* card = rdma::card_of_netdev(cards, route->netdev);
        return std::tuple(route->netdev, route->address, card == nullptr ? std::string() : card->name);
      },
      py::arg("host"), py::arg("port"), py::call_guard<py::gil_scoped_release>());
  py::class_<rdma::DeviceTransport, Transport, std::shared_ptr<rdma::DeviceTransport>>(module,
                                                                                       "RdmaDeviceTransport")
      .def(py::init(&make_device_transport), py::arg("network"), py::arg("staged"), py::kw_only(),
           py::arg("device"), py::arg("verify_device") = false)
      .def_property_readonly("verified_bytes", &rdma::DeviceTransport::verified_bytes)
      .def(
          "follow",
          [](rdma::DeviceTransport& self, uint64_t stream) {
            self.follow(reinterpret_cast<cuda::Stream>(static_cast<uintptr_t>(stream)));
          },
          py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "cuda_pci_address", [](int device) { return pci_address(Device::get(device)); }, py::arg("device"),
      py::call_guard<py::gil_scoped_release>());
  module.def("memlock_limit", &rdma::memlock_limit);
  module.def(
      "rdma_probe",
      [](const std::string& host, int port, const std::string& device, const std::string& sysfs,
         const std::string& dev) {
        std::vector<rdma::Probe> probes;
        {
          py::gil_scoped_release release;
          probes = rdma::probe({host, port, device, sysfs, dev});
        }
        py::list result;
        for (const rdma::Probe& probe : probes) {
          py::dict entry;
          entry["name"] = probe.name;
          entry["ok"] = probe.ok;
          entry["required"] = probe.required;
          entry["detail"] = probe.detail;
          entry["next_step"] = probe.next_step;
          result.append(entry);
        }
        return result;
      },
      py::kw_only(), py::arg("host") = "", py::arg("port") = 6379, py::arg("device") = "",
      py::arg("sysfs") = "/sys", py::arg("dev") = "/dev");
}

}  // namespace rdmaload::bindings
