// A block of memory that is also a file without a name (memfd), so that the kernel can send from it by
// reference.
//
// sendfile(2) hands pages of it to a socket without copying them, and they stay in use, on loopback even in
// the receiver's queue, after the call. So what was sent must never be written again: forget() detaches pages
// from the block, whoever still holds them keeps them as they are, and the next write to that place gets
// fresh ones. Pages are of the system's ordinary size: half a huge one could not be detached. Immovable; any
// thread may use it.
#pragma once

#include <cstddef>

namespace rdmaload {

class SharedArena {
 public:
  // Throws std::bad_alloc when the system has no room or no memfd. Rounded up to whole pages.
  explicit SharedArena(size_t bytes);
  ~SharedArena();
  SharedArena(const SharedArena&) = delete;
  SharedArena& operator=(const SharedArena&) = delete;

  std::byte* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }
  int descriptor() const noexcept { return fd_; }
  // Both in whole pages. False when the system refuses: then the place must not be written again.
  bool forget(size_t offset, size_t length) noexcept;

  static size_t page_bytes() noexcept;

 private:
  size_t size_;
  int fd_ = -1;
  std::byte* data_ = nullptr;
};

}  // namespace rdmaload
