#include "transport/resp/resp_transport.h"

#include <algorithm>
#include <exception>
#include <optional>

#include "core/thread_name.h"
#include "transport/threaded_transport.h"

namespace rdmaload::resp {
namespace {

// How long a worker sleeps in poll before it looks whether its reads were cancelled.
constexpr int kPollMilliseconds = 20;
// An idle connection is closed after this time: servers count clients.
constexpr std::chrono::seconds kIdleClose{30};
constexpr std::chrono::milliseconds kFirstReconnectPause{20};
constexpr std::chrono::milliseconds kLongestReconnectPause{1000};

}  // namespace

RespTransport::RespTransport(TransportOptions options) : options_(std::move(options)) {
  threads_.reserve(static_cast<size_t>(options_.connections));
  for (int i = 0; i < options_.connections; ++i) threads_.emplace_back([this] { work(); });
}

RespTransport::~RespTransport() {
  complete_all_cancelled(queue_.stop());
  threads_.clear();
}

void RespTransport::submit(Read& read, Clock::time_point not_before) {
  if (!queue_.push(read, not_before)) complete_all_cancelled({&read});
}

void RespTransport::cancel(const ReadOwner& owner) { complete_all_cancelled(queue_.remove(owner)); }

void RespTransport::work() {
  name_this_thread("rdmaload-resp");
  const uint64_t share =
      std::max<uint64_t>(1, options_.bytes_in_flight / static_cast<uint64_t>(options_.connections));
  std::optional<Connection> connection;
  // On a connection, a read whose owner gave up would cost the others there theirs.
  const auto given_up = [](Read* read) {
    if (!read->owner->cancelled()) return false;
    complete_all_cancelled({read});
    return true;
  };
  auto pause = kFirstReconnectPause;
  while (!queue_.stopped()) {
    Read* next = nullptr;
    if (!connection || connection->idle()) {
      const Deadline wait = connection ? Deadline::after(kIdleClose) : Deadline::never();
      next = queue_.pop(wait);
      if (next == nullptr) {
        connection.reset();
        continue;
      }
      if (given_up(next)) continue;
    }
    try {
      if (!connection) {
        connection.emplace(options_.endpoint, [&] { return queue_.stopped() || next->owner->cancelled(); });
      }
      if (next != nullptr) {
        connection->enqueue(*next);
        next = nullptr;
      }
      while (connection->in_flight_bytes() < share) {
        Read* more = queue_.try_pop(share - connection->in_flight_bytes());
        if (more == nullptr) break;
        if (!given_up(more)) connection->enqueue(*more);
      }
      connection->turn(kPollMilliseconds);
      pause = kFirstReconnectPause;
      if (connection->has_cancelled_reads()) {
        throw Error(ErrorCode::kUnavailable, "closed because its reads were cancelled");
      }
    } catch (const std::exception& failure) {
      const auto* error = dynamic_cast<const Error*>(&failure);
      const Status status =
          error != nullptr ? Status::from(*error) : Status(ErrorCode::kUnavailable, failure.what());
      if (next != nullptr) {  // could not connect: the read waits out the pause with the worker
        const auto until = Clock::now() + pause;
        while (!queue_.stopped() && !next->owner->cancelled() && Clock::now() < until) {
          std::this_thread::sleep_for(std::chrono::milliseconds(10));
        }
        pause = std::min(pause * 2, kLongestReconnectPause);
        next->owner->complete(*next, status);
      }
      if (connection) connection->fail_all(status);
      connection.reset();
    }
  }
  if (connection) connection->fail_all(Status(ErrorCode::kCancelled, "the transport was closed"));
}

}  // namespace rdmaload::resp
