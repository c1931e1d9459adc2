// Local files by parallel buffered pread, straight into the final memory.
//
// An object is a path relative to the root directory. A bounded number of descriptors is kept open. Each
// worker thread reads whole ranges; pieces are checksummed while they are in cache.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "transport/threaded_transport.h"

namespace rdmaload {

class FileTransport final : public ThreadedTransport {
 public:
  FileTransport(std::string root, int threads);
  ~FileTransport() override { stop(); }

  std::string_view path() const noexcept override { return "file-buffered"; }

 private:
  class Descriptor;
  Status perform(Read& read) override;
  std::shared_ptr<const Descriptor> open(const std::string& object);

  const std::string root_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<const Descriptor>> open_;  // Guarded by mutex_.
};

}  // namespace rdmaload
