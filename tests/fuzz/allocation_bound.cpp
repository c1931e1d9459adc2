#include "allocation_bound.h"

#include <malloc.h>

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <new>

namespace {

constexpr int64_t kUnbounded = std::numeric_limits<int64_t>::max();
thread_local int64_t live_bytes = 0;
thread_local int64_t bound = kUnbounded;

void* counted(size_t size) {
  if (static_cast<int64_t>(size) < 0 || live_bytes > bound - static_cast<int64_t>(size)) {
    std::fprintf(stderr, "an allocation of %zu bytes, with %lld allocated, is above the bound of %lld\n",
                 size, static_cast<long long>(live_bytes), static_cast<long long>(bound));
    std::abort();
  }
  void* const memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) std::abort();
  live_bytes += static_cast<int64_t>(malloc_usable_size(memory));
  return memory;
}

void counted_free(void* memory) noexcept {
  if (memory == nullptr) return;
  live_bytes -= static_cast<int64_t>(malloc_usable_size(memory));
  std::free(memory);
}

}  // namespace

void* operator new(size_t size) { return counted(size); }
void* operator new[](size_t size) { return counted(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept { return counted(size); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return counted(size); }
void operator delete(void* memory) noexcept { counted_free(memory); }
void operator delete[](void* memory) noexcept { counted_free(memory); }
void operator delete(void* memory, size_t) noexcept { counted_free(memory); }
void operator delete[](void* memory, size_t) noexcept { counted_free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { counted_free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { counted_free(memory); }

namespace rdmaload::fuzz {

AllocationBound::AllocationBound(uint64_t max_bytes) noexcept {
  bound = live_bytes + static_cast<int64_t>(max_bytes);
}
AllocationBound::~AllocationBound() { bound = kUnbounded; }

}  // namespace rdmaload::fuzz
