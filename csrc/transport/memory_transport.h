// The reference transport: objects are byte strings held in this process. Tests of the read contract compare
// the others with it.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "transport/threaded_transport.h"

namespace rdmaload {

class MemoryTransport final : public ThreadedTransport {
 public:
  explicit MemoryTransport(int threads = 1);
  ~MemoryTransport() override { stop(); }

  void put(const std::string& object, std::vector<std::byte> bytes);
  void remove(const std::string& object);
  std::string_view path() const noexcept override { return "memory"; }

 private:
  std::optional<Status> perform(Read& read) override;

  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<const std::vector<std::byte>>> objects_;  // Guarded by mutex_.
};

}  // namespace rdmaload
