// A transport whose reads are each done by one blocking call, on a fixed set of worker threads.
//
// The derived class implements perform() and calls stop() first thing in its destructor, while perform() may
// still run.
#pragma once

#include <optional>
#include <thread>
#include <vector>

#include "transport/read_queue.h"
#include "transport/transport.h"

namespace rdmaload {

class ThreadedTransport : public Transport {
 public:
  using Transport::submit;
  void submit(Read& read, Clock::time_point not_before) override;
  void cancel(const ReadOwner& owner) override;
  int connections() const noexcept override { return thread_count_; }

 protected:
  explicit ThreadedTransport(int threads) : thread_count_(threads) {}
  ~ThreadedTransport() override = default;
  void start();  // last thing in the derived constructor
  void stop();   // completes what waits with kCancelled and joins

  // Called on a worker thread. Reads check read.owner->cancelled() between pieces. nullopt: the read was
  // handed on, and whoever has it now completes it.
  virtual std::optional<Status> perform(Read& read) = 0;

 private:
  void work();

  const int thread_count_;
  ReadQueue queue_;
  std::vector<std::jthread> threads_;
};

void complete_all_cancelled(const std::vector<Read*>& reads) noexcept;

}  // namespace rdmaload
