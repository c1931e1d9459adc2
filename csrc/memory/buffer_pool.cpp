#include "memory/buffer_pool.h"

namespace rdmaload {

std::optional<BufferPool::Lease> BufferPool::acquire(Deadline deadline) {
  std::unique_lock lock(mutex_);
  const auto available = [this] { return !idle_.empty() || made_ < max_buffers_; };
  if (deadline.when() == Clock::time_point::max()) {
    returned_.wait(lock, available);
  } else if (!returned_.wait_until(lock, deadline.when(), available)) {
    return std::nullopt;
  }
  if (!idle_.empty()) {
    auto arena = std::move(idle_.back());
    idle_.pop_back();
    return Lease(this, std::move(arena));
  }
  auto arena = std::make_unique<HostArena>(buffer_bytes_);
  ++made_;
  return Lease(this, std::move(arena));
}

void BufferPool::give_back(std::unique_ptr<HostArena> arena) noexcept {
  {
    std::lock_guard lock(mutex_);
    idle_.push_back(std::move(arena));  // never allocates: capacity was reserved for every buffer
  }
  returned_.notify_one();
}

}  // namespace rdmaload
