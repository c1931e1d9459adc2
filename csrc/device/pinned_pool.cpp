#include "device/pinned_pool.h"

#include <vector>

#include "core/thread_name.h"

namespace rdmaload {

PinnedPool& PinnedPool::process() {
  static auto* pool = new PinnedPool;
  return *pool;
}

std::shared_ptr<PinnedBuffer> PinnedPool::take(const Device& device, size_t bytes) {
  device.driver().check_process();  // in a forked process the mutex may be held for ever
  std::unique_ptr<PinnedBuffer> found;
  {
    std::lock_guard lock(mutex_);
    for (auto at = kept_.begin(); at != kept_.end(); ++at) {
      const size_t size = at->buffer->span().size();
      // Of a much larger one most would lie idle, page-locked.
      if (at->device == &device && size >= bytes && size / 4 <= bytes) {
        found = std::move(at->buffer);
        kept_.erase(at);
        break;
      }
    }
  }
  if (!found) found = std::make_unique<PinnedBuffer>(device, bytes);
  return {found.release(), [this, &device](PinnedBuffer* buffer) {
            give_back(device, std::unique_ptr<PinnedBuffer>(buffer));
          }};
}

void PinnedPool::give_back(const Device& device, std::unique_ptr<PinnedBuffer> buffer) noexcept {
  if (!device.driver().is_opener()) {  // forked: the memory and the lock are the parent's
    static_cast<void>(buffer.release());
    return;
  }
  std::vector<std::unique_ptr<PinnedBuffer>> doomed;  // freed without the lock
  try {
    std::lock_guard lock(mutex_);
    kept_.push_back({&device, std::move(buffer), std::chrono::steady_clock::now()});
    size_t total = 0;
    for (const Kept& kept : kept_) total += kept.buffer->span().size();
    for (; total > kept_bytes_; kept_.pop_front()) {
      total -= kept_.front().buffer->span().size();
      doomed.push_back(std::move(kept_.front().buffer));
    }
    start_reaper_locked();
    changed_.notify_all();
  } catch (const std::exception&) {  // no memory or no thread: kept until the next one comes, or freed
  }
}

void PinnedPool::start_reaper_locked() {
  if (running_ || stopping_ || kept_.empty()) return;
  if (reaper_.joinable()) reaper_.join();  // it has ended: running_ was the last thing that it touched
  reaper_ = std::thread([this] { reap(); });
  running_ = true;
}

void PinnedPool::reap() {
  name_this_thread("rdmaload-pins");
  std::unique_lock lock(mutex_);
  while (!stopping_ && !kept_.empty()) {
    const auto due = kept_.front().since + idle_;
    if (std::chrono::steady_clock::now() < due) {
      changed_.wait_until(lock, due);
      continue;
    }
    std::unique_ptr<PinnedBuffer> doomed = std::move(kept_.front().buffer);
    kept_.pop_front();
    lock.unlock();
    doomed.reset();
    lock.lock();
  }
  running_ = false;
}

void PinnedPool::release() noexcept {
  if (getpid() != maker_) return;  // forked: the memory, the thread and maybe a held lock are the parent's
  std::deque<Kept> doomed;
  std::thread reaper;
  {
    std::lock_guard lock(mutex_);
    doomed.swap(kept_);
    stopping_ = true;
    changed_.notify_all();
    reaper = std::move(reaper_);
  }
  if (reaper.joinable()) reaper.join();
  std::lock_guard lock(mutex_);
  stopping_ = false;
  start_reaper_locked();  // for what came back meanwhile
}

size_t PinnedPool::kept_bytes() const {
  std::lock_guard lock(mutex_);
  size_t total = 0;
  for (const Kept& kept : kept_) total += kept.buffer->span().size();
  return total;
}

}  // namespace rdmaload
