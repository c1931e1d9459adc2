#include "memory/host_arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <limits>
#include <new>

namespace rdmaload {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;  // x86-64 and most aarch64 kernels

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

HostArena::HostArena(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (bytes > std::numeric_limits<size_t>::max() / 2) throw std::bad_alloc();
  const bool huge = bytes >= kHugePageBytes;
  mapped_bytes_ = round_up(bytes, page);
  const size_t reserve = mapped_bytes_ + (huge ? kHugePageBytes : 0);
  void* mapping = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<std::byte*>(mapping);
  data_ = begin;
  if (!huge) return;
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const size_t before = round_up(address, kHugePageBytes) - address;
  data_ = begin + before;
  // Giving back what lies outside the aligned block cannot fail for whole pages of our own mapping.
  if (before > 0) munmap(begin, before);
  if (const size_t after = reserve - before - mapped_bytes_; after > 0) munmap(data_ + mapped_bytes_, after);
  // A hint: where huge pages are off, the arena works with small ones.
  madvise(data_, mapped_bytes_, MADV_HUGEPAGE);
}

HostArena::~HostArena() {
  if (data_ != nullptr) munmap(data_, mapped_bytes_);
}

bool HostArena::detach(size_t offset, size_t length) noexcept {
  constexpr int kDontNeedLocked =
      24;  // MADV_DONTNEED_LOCKED of Linux 5.18: of memory that mlock() holds, too
  return madvise(data_ + offset, length, MADV_DONTNEED) == 0 ||
         (errno == EINVAL && madvise(data_ + offset, length, kDontNeedLocked) == 0);
}

}  // namespace rdmaload
