// Counts the places of a send queue: an unsignaled request keeps its place until a later signaled one has
// completed. A value of one thread.
#pragma once

#include <cstddef>

#include "transport/rdma/fixed_queue.h"
#include "transport/rdma/queue_pair.h"

namespace rdmaload::rdma {

class SendLedger {
 public:
  size_t room() const noexcept { return kSendDepth - used_; }
  void posted(bool signaled) {
    ++used_;
    ++since_signaled_;
    if (!signaled) return;
    covered_.push(since_signaled_);
    since_signaled_ = 0;
  }
  // Of the oldest signaled request that had not completed. In an error unsignaled ones complete as well, and
  // may find nothing left: the connection is over then.
  void completed() noexcept {
    if (covered_.empty()) return;
    used_ -= covered_.front();
    covered_.pop();
  }

 private:
  size_t used_ = 0;
  size_t since_signaled_ = 0;
  FixedQueue<size_t> covered_{kSendDepth};  // requests that each signaled one frees
};

}  // namespace rdmaload::rdma
