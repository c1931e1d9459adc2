// Ends the process when code allocates more than a target says that its input may cost.
//
// operator new of the whole executable is counted, per thread. libFuzzer's own limits (-malloc_limit_mb,
// -rss_limit_mb) are the same for every input; this one follows the input's size, and works without
// libFuzzer.
#pragma once

#include <cstdint>

namespace rdmaload::fuzz {

// While it lives, at most `max_bytes` more than at its beginning may be allocated at once on this thread.
class AllocationBound {
 public:
  explicit AllocationBound(uint64_t max_bytes) noexcept;
  ~AllocationBound();
  AllocationBound(const AllocationBound&) = delete;
  AllocationBound& operator=(const AllocationBound&) = delete;
};

}  // namespace rdmaload::fuzz
