// Names the calling thread, so that profilers and leak checks can tell whose it is.
#pragma once

#include <pthread.h>

namespace rdmaload {

// At most 15 characters, the kernel's limit.
inline void name_this_thread(const char* name) { pthread_setname_np(pthread_self(), name); }

}  // namespace rdmaload
