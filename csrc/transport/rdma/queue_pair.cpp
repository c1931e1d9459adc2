#include "transport/rdma/queue_pair.h"

#include <poll.h>

#include <algorithm>

namespace rdmaload::rdma {
namespace {

// Who has asked to be connected waits so long for the answer although it has lost interest. A Valkey server
// (seen with 9.1.0) that accepts a client which has gone leaves its keep-alive timer behind, and dies of it
// three seconds later.
constexpr std::chrono::seconds kAnswerTime{1};

}  // namespace

bool QueuePair::wait(std::chrono::milliseconds time) {
  if (!arm()) return true;
  const bool was_established = established();
  if (!wait_for_events(time)) return false;
  return !arm() || established() != was_established;
}

bool QueuePair::wait_for_events(std::chrono::milliseconds time) {
  std::array<pollfd, 2> entries{};
  const std::array<int, 2> watched = descriptors();
  for (size_t i = 0; i < entries.size(); ++i) entries[i] = {watched[i], POLLIN, 0};  // poll skips -1
  const int limit = static_cast<int>(std::clamp<int64_t>(time.count(), 0, 1 << 30));
  // Interrupted by a signal: the caller looks at its deadline and comes again.
  if (::poll(entries.data(), entries.size(), limit) <= 0) return false;
  handle_events();
  return true;
}

void establish(QueuePair& queue_pair, Deadline deadline, const GiveUp& give_up) {
  Deadline answer = Deadline::never();
  bool given_up = false;
  while (!queue_pair.established()) {
    if (!given_up && give_up && give_up()) {
      given_up = true;
      answer = Deadline::after(kAnswerTime);
    }
    if (answer.passed()) {
      throw Error(ErrorCode::kCancelled, "connecting over RDMA was cancelled: " + queue_pair.description());
    }
    if (deadline.passed()) {
      throw Error(ErrorCode::kTimeout, "connecting over RDMA took too long: " + queue_pair.description());
    }
    // Not wait(): the peer may have sent before its confirmation is seen, and that must not make this spin.
    queue_pair.wait_for_events(
        std::chrono::milliseconds(deadline.poll_milliseconds(kGiveUpPollMilliseconds)));
  }
}

}  // namespace rdmaload::rdma
