// A transport around another one that keeps what passes on this machine's disk and reads it from there the
// next time, in whichever process that is.
//
// The unit is the block: a read of exactly one block of a file in `files` is looked up in the cache
// directory. What is there is read by a FileTransport into the reader's memory and its checksum compared;
// what is not is asked of the source, received as ever, and written to the disk before the read completes. A
// block that another process (or another read of this one) is fetching is waited for, at most `patience`;
// then it is fetched without the cache. Every other read goes to the source as it is. Segments are host
// memory.
//
// The cache never fails a read: what keeps it from working is logged data (fallback_reason), and reads go to
// the source. One thread looks blocks up, `store_threads` write, the FileTransport has its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "transport/cache/cache_directory.h"
#include "transport/file_transport.h"
#include "transport/threaded_transport.h"

namespace rdmaload {

struct CachedFile {
  std::string object;  // as reads name it, or what the names of its blocks start with
  uint64_t bytes = 0;
  uint64_t first_block = 0;  // position of its first checksum in CacheOptions::crcs
  CacheEntry entry;          // without a name: nothing of this file is kept
};

struct CacheOptions {
  std::string directory;
  std::optional<uint64_t> limit_bytes;
  uint64_t block_bytes = 8 << 20;
  bool object_per_block = false;  // block n is the object "<object>n"; false: a range of the object
  std::vector<CachedFile> files;
  std::vector<uint32_t> crcs;  // what the store says of each block; empty: nothing
  FileOptions reading;
  int store_threads = 2;  // writing is a copy to the page cache: a core each
  std::chrono::duration<double> patience{30};
};

class CachingTransport final : public ThreadedTransport {
 public:
  CachingTransport(std::shared_ptr<Transport> source, CacheOptions options);
  ~CachingTransport() override;

  using Transport::submit;
  void submit(Read& read, Clock::time_point not_before) override;
  void cancel(const ReadOwner& owner) override;
  // What the source's own reads go to, as ever.
  std::shared_ptr<void> prepare(std::span<const std::span<std::byte>> destinations) override {
    return source_->prepare(destinations);
  }
  std::string description() const override { return source_->description(); }
  // The source's path, "cache-" and the file transport's, or both joined by "+": what has been used.
  std::string_view path() const noexcept override;
  std::string fallback_reason() const override;
  int connections() const noexcept override { return source_->connections(); }

 private:
  struct Fetch;
  class Writers;
  struct Known {  // of one file
    bool tried = false;
    std::shared_ptr<CacheFile> file;
  };

  std::optional<Status> perform(Read& read) override;
  void look_up(Fetch& fetch);
  void unlock(Fetch& fetch) noexcept;
  void wait_for_other(Fetch& fetch);
  void read_from_disk(Fetch& fetch, uint32_t crc);
  void read_from_source(Fetch& fetch, bool keep);
  void completed(Fetch& fetch, const Status& status);
  void go_on(Fetch& fetch, const Status& status);
  void read_back(Fetch& fetch, const Status& status);
  void received(Fetch& fetch, const Status& status);
  Status store(Fetch& fetch);
  void finish(Fetch& fetch, const Status& status) noexcept;
  bool find_block(Fetch& fetch) const;
  std::shared_ptr<CacheFile> file_of(size_t number);
  std::optional<uint32_t> expected(const Fetch& fetch) const;
  void give_up(const std::string& reason);

  const std::shared_ptr<Transport> source_;
  const CacheOptions options_;
  CacheDirectory directory_;
  std::unordered_map<std::string, size_t> numbers_;  // positions in options_.files, by object
  std::unique_ptr<FileTransport> disk_;
  std::unique_ptr<Writers> writers_;
  std::atomic<bool> stopping_{false};
  std::atomic<bool> stores_{true};  // false once the disk refused a write
  std::atomic<bool> used_source_{false};
  std::atomic<bool> used_disk_{false};
  std::vector<Known> known_;  // Used by the thread that looks up.
  size_t open_files_ = 0;     // Used by the thread that looks up.

  mutable std::mutex mutex_;
  std::condition_variable quiet_;
  std::unordered_map<const Fetch*, std::shared_ptr<Fetch>>
      fetches_;  // Guarded by mutex_. What is outstanding.
  size_t callbacks_ =
      0;  // Guarded by mutex_. Threads of the source, the disk and the writers that are in here.
  uint64_t damaged_blocks_ = 0;          // Guarded by mutex_.
  std::string reason_;                   // Guarded by mutex_. The first.
  mutable std::set<std::string> paths_;  // Guarded by mutex_. What path() has returned, which must last.
};

}  // namespace rdmaload
