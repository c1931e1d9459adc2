// A block of huge pages that is also a file without a name (memfd), so that the kernel can send from it by
// reference.
//
// sendfile(2) hands pages of it to a socket without copying them, and they stay in use, on loopback even in
// the receiver's queue, after the call. So what was sent must never be written again: forget() detaches pages
// from the block, whoever still holds them keeps them as they are, and the next write to that place gets
// fresh ones. That works for whole pages only: of a huge one that is detached in part the kernel overwrites
// that part with zeros, under the eyes of who still sends it. Immovable; any thread may use it.
#pragma once

#include <cstddef>

namespace rdmaload {

class SharedArena {
 public:
  // `page_bytes`: see shared_huge_page_bytes(); where the system gives smaller ones after all they are
  // treated alike. Throws std::bad_alloc when it has no room or no memfd. Rounded up to whole pages.
  SharedArena(size_t bytes, size_t page_bytes);
  ~SharedArena();
  SharedArena(const SharedArena&) = delete;
  SharedArena& operator=(const SharedArena&) = delete;

  std::byte* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }
  size_t page_bytes() const noexcept { return page_bytes_; }
  int descriptor() const noexcept { return fd_; }
  // Both in whole pages. False when the system refuses: then the place must not be written again.
  bool forget(size_t offset, size_t length) noexcept;

 private:
  size_t size_;
  const size_t page_bytes_;
  int fd_ = -1;
  std::byte* data_ = nullptr;
};

}  // namespace rdmaload
