// Queue pairs of real cards: libibverbs for the data, librdmacm for connecting. See queue_pair.h.
//
// Connections are made with addresses and ports (RDMA_PS_TCP) and no private data, one completion queue and
// one completion channel each, responder resources and initiator depth 1, retry counts of 7 (a client), as
// Valkey makes them. No call polls busily. In a forked child nothing of it may be used; its destructors leave
// the parent's resources alone there.
#pragma once

#include <memory>

#include "transport/rdma/queue_pair.h"

namespace rdmaload::rdma {

// Any thread may use it. The libraries are opened at the first resolve() or listen(): kNotSupported with the
// reason where they are missing.
class VerbsFabric final : public Fabric {
 public:
  std::unique_ptr<QueuePair> resolve(const Remote& remote, Deadline deadline, const GiveUp& give_up) override;
  std::unique_ptr<Listener> listen(const std::string& address, int port, bool share_domain) override;
};

}  // namespace rdmaload::rdma
