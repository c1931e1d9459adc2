// Device memory that Python allocated, as the destination of a load.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace rdmaload::bindings {

// Keeps the Python object that owns the memory alive. Made with the GIL held, destroyed with or without.
class DeviceDestination {
 public:
  DeviceDestination(uint64_t pointer, size_t bytes, pybind11::object owner)
      : memory_(reinterpret_cast<std::byte*>(static_cast<uintptr_t>(pointer)), bytes),
        owner_(std::move(owner)) {}
  ~DeviceDestination() {
    pybind11::gil_scoped_acquire acquire;
    owner_ = pybind11::object();
  }
  DeviceDestination(const DeviceDestination&) = delete;
  DeviceDestination& operator=(const DeviceDestination&) = delete;
  // Addresses of the device: nothing on the host may follow them.
  std::span<std::byte> memory() const noexcept { return memory_; }

 private:
  std::span<std::byte> memory_;
  pybind11::object owner_;
};

}  // namespace rdmaload::bindings
