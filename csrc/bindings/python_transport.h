// The transport behind connectors that are written in Python: worker threads that call a reader function.
//
// reader(object: str, offset: int, buffer) -> int fills `buffer` (a writable buffer of exactly the wanted
// length) and returns how many bytes the object gave. A read into one place is written there directly; one
// that is scattered goes through a buffer of the thread and is copied (and counted). Create and destroy it
// with the GIL held.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "transport/threaded_transport.h"

namespace rdmaload::bindings {

class PythonTransport final : public ThreadedTransport {
 public:
  PythonTransport(pybind11::function reader, int threads);
  ~PythonTransport() override;
  std::string_view path() const noexcept override { return "python"; }

 private:
  std::optional<Status> perform(Read& read) override;
  Status call_reader(Read& read, std::span<std::byte> memory, std::shared_ptr<void> owner);

  pybind11::function reader_;
};

// Memory lent to Python for one read; keeps its owner alive should the view be kept against the rules.
class LentBuffer {
 public:
  LentBuffer(std::span<std::byte> memory, std::shared_ptr<void> owner)
      : memory_(memory), owner_(std::move(owner)) {}
  std::span<std::byte> memory() const { return memory_; }

 private:
  std::span<std::byte> memory_;
  std::shared_ptr<void> owner_;
};

}  // namespace rdmaload::bindings
