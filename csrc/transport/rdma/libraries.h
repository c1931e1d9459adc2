// libibverbs and librdmacm, opened at run time: a table of their functions.
//
// One table serves the process: opened at first use, never closed (providers of cards start threads). Any
// thread may use it. A process that was forked afterwards must not use what its parent made.
#pragma once

#include <sys/types.h>

#include <string>

#include "transport/rdma/abi.h"

namespace rdmaload::rdma {

class Libraries {
 public:
  // Throws kNotSupported, naming what is missing and how to install it; then the next call tries again.
  static const Libraries& process();

  Libraries(const std::string& verbs, const std::string& rdmacm);
  Libraries(const Libraries&) = delete;
  Libraries& operator=(const Libraries&) = delete;

  // Whether this process opened them: else it is a forked child, and its parent's resources are not its own.
  bool is_opener() const noexcept;

#define RDMALOAD_RDMA_FIELD(name, result, parameters) result(*name) parameters = nullptr;
  RDMALOAD_VERBS_REQUIRED(RDMALOAD_RDMA_FIELD)
  RDMALOAD_VERBS_OPTIONAL(RDMALOAD_RDMA_FIELD)
  RDMALOAD_RDMACM_REQUIRED(RDMALOAD_RDMA_FIELD)
#undef RDMALOAD_RDMA_FIELD

 private:
  const pid_t opener_;
};

}  // namespace rdmaload::rdma
