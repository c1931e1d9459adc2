// Reads from a Redis or Valkey server over TCP, TLS or a unix socket: N connections, each pipelined, values
// received in place.
//
// One thread per connection owns its socket. Requests wait in one queue; a connection takes the next one when
// its share of bytes_in_flight has room (the server's reply buffers count against its maxmemory, so the bound
// is on bytes). A lost connection fails its reads and is made anew, with growing pauses, when there is more
// to read.
#pragma once

#include <thread>
#include <vector>

#include "transport/read_queue.h"
#include "transport/resp/connection.h"
#include "transport/transport.h"

namespace rdmaload::resp {

struct TransportOptions {
  Endpoint endpoint;
  int connections = 2;
  uint64_t bytes_in_flight = 4 << 20;  // over all connections; each takes at least one read
};

class RespTransport final : public Transport {
 public:
  // Does not connect yet.
  explicit RespTransport(TransportOptions options);
  ~RespTransport() override;

  using Transport::submit;
  void submit(Read& read, Clock::time_point not_before) override;
  void cancel(const ReadOwner& owner) override;
  std::string_view path() const noexcept override {
    return options_.endpoint.tls                   ? "resp-tls"
           : options_.endpoint.socket_path.empty() ? "resp-tcp"
                                                   : "resp-unix";
  }
  int connections() const noexcept override { return options_.connections; }

 private:
  void work();

  const TransportOptions options_;
  ReadQueue queue_;
  std::vector<std::jthread> threads_;
};

}  // namespace rdmaload::resp
