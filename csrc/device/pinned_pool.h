// Page-locked memory that loads use one after the other.
//
// Page-locking costs more than copying the same bytes once, so what a load gives back is kept for the next
// one on that device: a bounded number of bytes, for a bounded time. A thread that exists only while
// something is kept frees it. Memory is never kept longer than the process's interest: release() frees it at
// once, and is called at exit. Any thread may call. In a process that was forked nothing is touched.
#pragma once

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "device/device_memory.h"

namespace rdmaload {

class PinnedPool {
 public:
  // Two rings of the default size; longer than an engine pauses between two models or two ranks.
  static constexpr size_t kKeptBytes = 128 << 20;
  static constexpr std::chrono::milliseconds kIdle{10'000};

  // The process's. Never destroyed, because the driver may be gone by then.
  static PinnedPool& process();

  explicit PinnedPool(size_t kept_bytes = kKeptBytes, std::chrono::milliseconds idle = kIdle)
      : kept_bytes_(kept_bytes), idle_(idle) {}
  ~PinnedPool() { release(); }
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  // At least `bytes`, with whatever content; goes back to the pool with its last owner, who has waited for
  // all copies from it. The pool outlives it. Throws kDevice.
  std::shared_ptr<PinnedBuffer> take(const Device& device, size_t bytes);
  // Frees what is kept.
  void release() noexcept;
  size_t kept_bytes() const;

 private:
  struct Kept {
    const Device* device;
    std::unique_ptr<PinnedBuffer> buffer;
    std::chrono::steady_clock::time_point since;
  };
  void give_back(const Device& device, std::unique_ptr<PinnedBuffer> buffer) noexcept;
  void start_reaper_locked();
  void reap();

  const pid_t maker_ = getpid();
  const size_t kept_bytes_;
  const std::chrono::milliseconds idle_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Kept> kept_;  // Guarded by mutex_, as all below. Oldest first.
  bool running_ = false;
  bool stopping_ = false;
  std::thread reaper_;
};

}  // namespace rdmaload
