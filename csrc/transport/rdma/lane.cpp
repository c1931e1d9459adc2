#include "transport/rdma/lane.h"

namespace rdmaload::rdma {

void Lane::check_activity(const Read& waiting) const {
  const auto limit = session_->endpoint().inactivity_timeout;
  if (Deadline::at(session_->last_activity + std::chrono::duration_cast<Clock::duration>(limit)).passed()) {
    throw Error(ErrorCode::kTimeout, context(waiting) + ": no byte came over RDMA for " +
                                         std::to_string(limit.count()) + " s (inactivity_timeout)");
  }
}

void Lane::complete(Read& read, const Status& status) noexcept {
  if (status.ok()) ++completed_reads_;
  read.owner->complete(read, status);
}

Status Lane::lost(const Read& read, const Status& first, bool head) const {
  if (read.owner->cancelled()) return Status(ErrorCode::kCancelled, "the read was cancelled");
  if (head || first.code() == ErrorCode::kCancelled) return first;
  // What a silent server costs is a time-out for each of them, whichever is reported.
  const ErrorCode code = first.code() == ErrorCode::kTimeout ? ErrorCode::kTimeout : ErrorCode::kUnavailable;
  return Status(code, context(read) + ": the RDMA connection was lost (" + first.message() + ")");
}

}  // namespace rdmaload::rdma
