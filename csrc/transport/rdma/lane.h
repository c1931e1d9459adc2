// How reads travel over one RDMA connection: what the two roads (ours and a Valkey's) have in common.
//
// Belongs to one worker thread. Reads that a lane took and did not complete are in flight with it. When
// anything goes wrong an Error is thrown; the worker then calls close(), after which nothing can land any
// more, and only then fail_all().
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "transport/rdma/destinations.h"
#include "transport/rdma/session.h"
#include "transport/read_queue.h"

namespace rdmaload::rdma {

class Lane {
 public:
  virtual ~Lane() = default;
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  virtual bool idle() const noexcept = 0;
  // Takes of the queue what there is room for; completes those whose owner gave up already.
  virtual void take(ReadQueue& queue, size_t workers) = 0;
  // Sends, receives, completes what can be moved now; waits up to `time` when nothing can. Throws kTimeout
  // when nothing has come for the inactivity time-out while reads were in flight.
  virtual void turn(std::chrono::milliseconds time) = 0;
  virtual bool has_cancelled_reads() const noexcept = 0;
  // After close(): completes every read in flight, the one at the head with `first`.
  virtual void fail_all(const Status& first) noexcept = 0;

  // Whether it can serve values of this size as well as it should.
  virtual bool suits(uint64_t longest_read) const noexcept = 0;
  void close() noexcept { session_->close(); }
  uint64_t completed_reads() const noexcept { return completed_reads_; }
  std::string description() const { return session_->description(); }

 protected:
  Lane(std::unique_ptr<Session> session, std::shared_ptr<Destinations> destinations)
      : session_(std::move(session)), destinations_(std::move(destinations)) {}
  std::string context(const Read& read) const {
    return session_->endpoint().name + " key '" + read.object + "'";
  }
  void check_activity(const Read& waiting) const;
  void complete(Read& read, const Status& status) noexcept;
  // Of a read that was in flight when the connection ended; `head`: the one that was being answered.
  Status lost(const Read& read, const Status& first, bool head) const;

  const std::unique_ptr<Session> session_;
  const std::shared_ptr<Destinations> destinations_;

 private:
  uint64_t completed_reads_ = 0;
};

std::unique_ptr<Lane> make_direct_lane(std::unique_ptr<Session> session,
                                       std::shared_ptr<Destinations> destinations, uint64_t bytes_in_flight);
std::unique_ptr<Lane> make_valkey_lane(std::unique_ptr<Session> session,
                                       std::shared_ptr<Destinations> destinations, uint64_t bytes_in_flight);

}  // namespace rdmaload::rdma
