#include "transport/rdma/libraries.h"

#include <dlfcn.h>
#include <unistd.h>

#include <mutex>

#include "core/error.h"

namespace rdmaload::rdma {
namespace {

std::mutex process_mutex;
const Libraries* process_libraries = nullptr;  // Guarded by process_mutex. Never destroyed.

Error missing(const std::string& library, const std::string& problem) {
  return Error(
      ErrorCode::kNotSupported,
      "RDMA needs " + library + ": " + problem +
          " (Debian, Ubuntu: apt-get install librdmacm1 ibverbs-providers; Fedora, RHEL: dnf install "
          "librdmacm libibverbs)");
}

void* open_library(const std::string& name) {
  void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle != nullptr) return handle;
  const char* why = dlerror();
  throw missing(name, why != nullptr ? why : "it cannot be opened");
}

}  // namespace

const Libraries& Libraries::process() {
  const std::lock_guard lock(process_mutex);
  if (process_libraries == nullptr) process_libraries = new Libraries("libibverbs.so.1", "librdmacm.so.1");
  return *process_libraries;
}

Libraries::Libraries(const std::string& verbs, const std::string& rdmacm) : opener_(getpid()) {
  void* handle = open_library(verbs);
#define RDMALOAD_RDMA_FIND(name, result, parameters) \
  name = reinterpret_cast<result(*) parameters>(dlsym(handle, #name));
#define RDMALOAD_RDMA_REQUIRE(name, result, parameters) \
  RDMALOAD_RDMA_FIND(name, result, parameters)          \
  if (name == nullptr) throw missing(library, "it lacks " #name);
  {
    const std::string& library = verbs;
    RDMALOAD_VERBS_REQUIRED(RDMALOAD_RDMA_REQUIRE)
    RDMALOAD_VERBS_OPTIONAL(RDMALOAD_RDMA_FIND)
  }
  handle = open_library(rdmacm);
  {
    const std::string& library = rdmacm;
    RDMALOAD_RDMACM_REQUIRED(RDMALOAD_RDMA_REQUIRE)
  }
#undef RDMALOAD_RDMA_REQUIRE
#undef RDMALOAD_RDMA_FIND
  // Registered memory must survive a fork of this process (Python starts programs so). Free on kernels from
  // 5.12 on; where it fails, another library has registered memory already and decided.
  ibv_fork_init();
}

bool Libraries::is_opener() const noexcept { return getpid() == opener_; }

}  // namespace rdmaload::rdma
