#include "transport/threaded_transport.h"

#include <exception>

#include "core/thread_name.h"

namespace rdmaload {
namespace {

const Status& cancelled_status() {
  static const Status status(ErrorCode::kCancelled, "the read was cancelled");
  return status;
}

}  // namespace

void complete_all_cancelled(const std::vector<Read*>& reads) noexcept {
  for (Read* read : reads) read->owner->complete(*read, cancelled_status());
}

void ThreadedTransport::start() {
  threads_.reserve(static_cast<size_t>(thread_count_));
  for (int i = 0; i < thread_count_; ++i) threads_.emplace_back([this] { work(); });
}

void ThreadedTransport::stop() {
  complete_all_cancelled(queue_.stop());
  threads_.clear();  // jthread joins
}

void ThreadedTransport::submit(Read& read, Clock::time_point not_before) {
  if (!queue_.push(read, not_before)) read.owner->complete(read, cancelled_status());
}

void ThreadedTransport::cancel(const ReadOwner& owner) { complete_all_cancelled(queue_.remove(owner)); }

void ThreadedTransport::work() {
  name_this_thread("rdmaload-read");
  while (Read* read = queue_.pop(Deadline::never())) {
    std::optional<Status> status;
    if (read->owner->cancelled()) {
      status = cancelled_status();
    } else {
      if (read->received == 0) read->crc = 0;
      if (read->received == 0) read->digest = 0;
      read->copied_bytes = 0;
      read->checksum_time = {};
      try {
        status = perform(*read);
      } catch (const Error& error) {
        status = Status::from(error);
      } catch (const std::exception& error) {
        status = Status(ErrorCode::kUnavailable, error.what());
      } catch (...) {
        status = Status(ErrorCode::kUnavailable, "unknown failure while reading " + read->object);
      }
    }
    if (status) read->owner->complete(*read, *status);
  }
}

}  // namespace rdmaload
