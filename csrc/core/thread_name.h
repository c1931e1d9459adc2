// Names and numbers the calling thread, so that profilers, leak checks and timelines can tell whose it is.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace rdmaload {

// At most 15 characters, the kernel's limit.
inline void name_this_thread(const char* name) { pthread_setname_np(pthread_self(), name); }

// From 1 on, in the order in which threads first ask; never used again.
inline uint32_t this_thread_number() {
  static std::atomic<uint32_t> last{0};
  thread_local const uint32_t number = ++last;
  return number;
}

}  // namespace rdmaload
