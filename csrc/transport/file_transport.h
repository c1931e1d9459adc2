// Local files into the final memory, by parallel reads through the page cache or past it, chosen per file.
//
// An object is a path relative to the root directory. `threads` workers take reads from the queue and perform
// those that go through the page cache, each copying on a core. Reads past it wait for the disk instead: they
// are handed on to `direct_reads` workers of their own, which exist from the first such read on.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "transport/open_file.h"
#include "transport/threaded_transport.h"

namespace rdmaload {

class FileTransport final : public ThreadedTransport {
 public:
  FileTransport(std::string root, FileOptions options);
  FileTransport(std::string root, int threads) : FileTransport(std::move(root), FileOptions{threads}) {}
  ~FileTransport() override;

  void cancel(const ReadOwner& owner) override;
  // What has been used so far: "file-buffered", "file-direct" or both, joined by "+".
  std::string_view path() const noexcept override;
  std::string fallback_reason() const override { return files_.direct_refusal(); }
  int connections() const noexcept override;

  // For a transport that reads the same files in another way.
  std::shared_ptr<OpenFile> open(const std::string& object) { return files_.get(object); }
  const FileOptions& options() const noexcept { return files_.options(); }

 private:
  class DirectWorkers;
  std::optional<Status> perform(Read& read) override;
  Status read_file(Read& read);
  DirectWorkers& direct_workers();

  OpenFiles files_;
  std::atomic<bool> used_buffered_{false};
  std::atomic<bool> used_direct_{false};
  std::mutex mutex_;
  std::unique_ptr<DirectWorkers> direct_workers_;  // Guarded by mutex_ until the destructor.
};

}  // namespace rdmaload
