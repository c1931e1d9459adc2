// Files straight into GPU memory, by GPUDirect Storage, where that pays and works; everything else goes the
// staged way.
//
// It decides as FileTransport does between the page cache and the disk (open_file.h), with cuFile in the
// place of direct reads into host memory: what is cached is read through the cache. `workers` threads each
// have a block of device memory that cuFile knows; a read arrives there in whole pages of the file, its
// checksum is computed there, and its pieces go from there to their places on the copy stream. So
// destinations are written in the order of the streams, as by the staged way, may lie anywhere, and need not
// be registered.
//
// A read that cuFile cannot do goes on to the staged transport, and so do all later ones of that file; why is
// data (fallback_reason). Any thread may use it.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device/cufile.h"
#include "transport/file_transport.h"
#include "transport/staged_transport.h"
#include "transport/threaded_transport.h"

namespace rdmaload {

struct GdsOptions {
  uint64_t read_bytes = 8 << 20;      // the longest read that will be submitted
  uint64_t device_bytes = 128 << 20;  // for all blocks; at least one must fit
  int workers = 8;                    // reads at once, as many as of direct reads into host memory
  size_t scatter_pieces = 16;         // as StagingOptions
  bool verify_device = false;  // what has no checksum to compare with goes the staged way, which checks it
};

class GdsTransport final : public ThreadedTransport {
 public:
  // `staged` reads the same `files`. Throws kNotSupported when no block fits.
  GdsTransport(std::shared_ptr<FileTransport> files, std::shared_ptr<StagedTransport> staged, Device& device,
               const CuFile& cufile, GdsOptions options);
  ~GdsTransport() override;

  void cancel(const ReadOwner& owner) override;
  // "file-gds", joined by "+" with the staged way's where some went there.
  std::string_view path() const noexcept override;
  std::string fallback_reason() const override;
  int connections() const noexcept override;
  // Device memory that the blocks take when they are needed.
  uint64_t block_bytes() const noexcept;
  // Bytes whose checksum was computed on the device where the owner asked for it; counted at each attempt.
  uint64_t verified_bytes() const noexcept { return verified_bytes_; }

 private:
  struct Block;
  struct Blocks;
  struct OpenHandle;
  std::optional<Status> perform(Read& read) override;
  std::shared_ptr<OpenHandle> handle_of(const std::string& object);
  Blocks* blocks();
  std::optional<Status> receive(Read& read, OpenHandle& handle, Block& block);
  Status deliver(Read& read, Block& block, uint64_t skipped);
  std::optional<Status> hand_on(Read& read);
  void refuse(const std::string& why);

  const std::shared_ptr<FileTransport> files_;
  const std::shared_ptr<StagedTransport> staged_;
  Device& device_;
  const CuFile& cufile_;
  const GdsOptions options_;
  std::string no_kernels_reason_;
  const Kernels* const kernels_;
  uint64_t data_bytes_ = 0;   // of each block's data; its table of pieces lies behind
  uint64_t table_bytes_ = 0;  // with a word for the checksum at the end
  size_t count_ = 0;          // of blocks, and threads

  std::atomic<bool> used_gds_{false};
  std::atomic<bool> handed_on_{false};
  std::atomic<uint64_t> verified_bytes_{0};
  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<OpenHandle>> handles_;  // Guarded by mutex_, as all below.
  bool blocks_tried_ = false;
  std::unique_ptr<Blocks> blocks_;  // constant once made
  std::vector<Block*> idle_;
  std::string refusal_;
};

}  // namespace rdmaload
