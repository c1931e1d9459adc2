// A bounded set of equal buffers, handed out as leases that return themselves.
//
// Buffers are made when first needed and kept for reuse. Any thread may acquire; a lease belongs to one
// thread at a time. The pool must outlive its leases.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "core/deadline.h"
#include "memory/host_arena.h"

namespace rdmaload {

class BufferPool {
 public:
  class Lease {
   public:
    Lease(Lease&& other) noexcept
        : pool_(std::exchange(other.pool_, nullptr)), arena_(std::move(other.arena_)) {}
    Lease& operator=(Lease&&) = delete;
    ~Lease() {
      if (pool_ != nullptr) pool_->give_back(std::move(arena_));
    }
    std::span<std::byte> span() const noexcept { return arena_->span(); }

   private:
    friend class BufferPool;
    Lease(BufferPool* pool, std::unique_ptr<HostArena> arena) : pool_(pool), arena_(std::move(arena)) {}
    BufferPool* pool_;
    std::unique_ptr<HostArena> arena_;
  };

  BufferPool(size_t buffer_bytes, size_t max_buffers)
      : buffer_bytes_(buffer_bytes), max_buffers_(max_buffers) {
    idle_.reserve(max_buffers);
  }

  // Waits for a buffer; nullopt when the deadline passes first. Throws std::bad_alloc.
  std::optional<Lease> acquire(Deadline deadline);

  size_t buffer_bytes() const noexcept { return buffer_bytes_; }

 private:
  void give_back(std::unique_ptr<HostArena> arena) noexcept;

  const size_t buffer_bytes_;
  const size_t max_buffers_;
  std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<std::unique_ptr<HostArena>> idle_;  // Guarded by mutex_.
  size_t made_ = 0;                               // Guarded by mutex_.
};

}  // namespace rdmaload
