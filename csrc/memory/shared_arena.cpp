#include "memory/shared_arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <limits>
#include <new>

namespace rdmaload {

SharedArena::SharedArena(size_t bytes, size_t page_bytes) : size_(bytes), page_bytes_(page_bytes) {
  if (bytes == 0 || bytes > std::numeric_limits<size_t>::max() / 2) throw std::bad_alloc();
  size_ = (bytes + page_bytes - 1) / page_bytes * page_bytes;
  fd_ = memfd_create("rdmaload", MFD_CLOEXEC);
  if (fd_ < 0) throw std::bad_alloc();
  void* mapping = MAP_FAILED;
  if (ftruncate(fd_, static_cast<off_t>(size_)) == 0) {
    mapping = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  }
  if (mapping == MAP_FAILED) {
    close(fd_);
    throw std::bad_alloc();
  }
  data_ = static_cast<std::byte*>(mapping);
  madvise(data_, size_, MADV_HUGEPAGE);
}

SharedArena::~SharedArena() {
  munmap(data_, size_);
  close(fd_);
}

bool SharedArena::forget(size_t offset, size_t length) noexcept {
  return fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                   static_cast<off_t>(length)) == 0;
}

}  // namespace rdmaload
