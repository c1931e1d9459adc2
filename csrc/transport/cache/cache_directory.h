// A directory on this machine's disk that keeps blocks of remote files, for every process that reads them.
//
// One file per version of a remote file, under a name that its content never changes for: the remote bytes at
// their own offsets (sparse until all blocks have come), and from the next page on a header and a word per
// block, which says that the block is there and what its CRC32C is. Two processes that want one block agree
// by a lock on a byte behind the file, which the kernel lets go when its holder dies; a block's word is
// written after its bytes, and whoever reads a block computes its checksum, so that a crash or a flipped bit
// costs one read from the store and never a wrong byte.
//
// A file counts against the limit in full from its first block on. Files that some process has open stay; the
// others go in the order of their last opening. Opening and removing happen under one lock of the directory.
// Any thread may call.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>

#include "core/error.h"
#include "transport/transport.h"

namespace rdmaload {

// What one version of a remote file is cached as.
struct CacheEntry {
  std::string name;         // of the file in the directory: 64 lower-case hexadecimal digits
  std::string description;  // what it is, for who looks into the directory; a file with another is replaced
  uint64_t bytes = 0;       // of the remote file
  uint64_t block_bytes = 0;
};

class CacheFile {
 public:
  ~CacheFile();
  CacheFile(const CacheFile&) = delete;
  CacheFile& operator=(const CacheFile&) = delete;

  const std::string& name() const noexcept { return entry_.name; }
  uint64_t bytes_on_disk() const noexcept;  // the table included

  // The block's CRC32C; nullopt: it is not there. Throws kUnavailable, as forget() does.
  std::optional<uint32_t> stored(uint64_t block) const;
  void forget(uint64_t block);
  // Whether the caller is now the one who fetches this block; then unlock() follows. Never waits.
  bool try_lock(uint64_t block);
  void unlock(uint64_t block) noexcept;
  // Writes a block that the caller has locked, with data in every segment.
  Status store(uint64_t block, std::span<const Segment> segments, uint32_t crc);

 private:
  friend class CacheDirectory;
  CacheFile(int fd, std::string path, CacheEntry entry) noexcept;
  bool is_whole() const;  // it has the size and the header of its entry
  uint64_t word_offset(uint64_t block) const noexcept;

  const int fd_;
  const std::string path_;
  const CacheEntry entry_;
  std::mutex mutex_;
  std::set<uint64_t> locked_;  // Guarded by mutex_. The kernel's locks do not tell our own threads apart.
};

class CacheDirectory {
 public:
  // limit_bytes: of all files together; nullopt: whatever leaves a tenth of the file system free.
  CacheDirectory(std::string path, std::optional<uint64_t> limit_bytes)
      : path_(std::move(path)), limit_bytes_(limit_bytes) {}

  const std::string& path() const noexcept { return path_; }
  // The entry's file, made when there is none, others removed to make room. nullptr: it does not fit. Throws
  // what keeps the directory from being used. Waits at most some seconds for other processes.
  std::shared_ptr<CacheFile> open(const CacheEntry& entry);

 private:
  class Locked;
  std::shared_ptr<CacheFile> open_existing(const CacheEntry& entry) const;
  std::shared_ptr<CacheFile> make(const CacheEntry& entry) const;
  bool make_room(uint64_t bytes) const;

  const std::string path_;
  const std::optional<uint64_t> limit_bytes_;
};

}  // namespace rdmaload
