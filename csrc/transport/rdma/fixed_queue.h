// A first-in, first-out queue of at most as many elements as it was made for: it never allocates afterwards.
#pragma once

#include <cassert>
#include <cstddef>
#include <utility>
#include <vector>

namespace rdmaload::rdma {

template <typename T>
class FixedQueue {
 public:
  explicit FixedQueue(size_t capacity) : slots_(capacity) {}
  bool empty() const noexcept { return size_ == 0; }
  bool full() const noexcept { return size_ == slots_.size(); }
  size_t size() const noexcept { return size_; }
  const T& front() const noexcept {
    assert(size_ > 0);
    return slots_[first_];
  }
  void push(T value) noexcept {
    assert(!full());
    slots_[(first_ + size_) % slots_.size()] = std::move(value);
    ++size_;
  }
  void pop() noexcept {
    assert(size_ > 0);
    first_ = (first_ + 1) % slots_.size();
    --size_;
  }

 private:
  std::vector<T> slots_;
  size_t first_ = 0;
  size_t size_ = 0;
};

}  // namespace rdmaload::rdma
