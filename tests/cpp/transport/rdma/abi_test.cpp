// csrc/transport/rdma/abi.h against the real headers, at compile time, where those are installed.
#include "transport/rdma/abi.h"

#include <doctest/doctest.h>

#include "core/error.h"
#include "transport/rdma/libraries.h"

#if __has_include(<infiniband/verbs.h>) && __has_include(<rdma/rdma_cma.h>)
#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

#include <type_traits>
#undef ibv_reg_mr

namespace rdmaload::rdma {
namespace {

#define SAME_SIZE(ours, theirs) \
  static_assert(sizeof(abi::ours) == sizeof(theirs) && alignof(abi::ours) == alignof(theirs))
#define SAME_FIELD(ours, our_field, theirs, their_field)                           \
  static_assert(offsetof(abi::ours, our_field) == offsetof(theirs, their_field) && \
                sizeof(abi::ours::our_field) == sizeof(theirs::their_field))
#define FIELD(ours, theirs, field) SAME_FIELD(ours, field, theirs, field)

SAME_SIZE(Device, ibv_device);
FIELD(Device, ibv_device, node_type);
FIELD(Device, ibv_device, name);
FIELD(Device, ibv_device, ibdev_path);
SAME_SIZE(ContextOps, ibv_context_ops);
FIELD(ContextOps, ibv_context_ops, alloc_mw);
FIELD(ContextOps, ibv_context_ops, dealloc_mw);
FIELD(ContextOps, ibv_context_ops, poll_cq);
FIELD(ContextOps, ibv_context_ops, req_notify_cq);
FIELD(ContextOps, ibv_context_ops, post_send);
FIELD(ContextOps, ibv_context_ops, post_recv);
SAME_SIZE(Context, ibv_context);
FIELD(Context, ibv_context, device);
FIELD(Context, ibv_context, ops);
FIELD(Context, ibv_context, num_comp_vectors);
SAME_SIZE(ProtectionDomain, ibv_pd);
FIELD(ProtectionDomain, ibv_pd, context);
SAME_SIZE(MemoryRegion, ibv_mr);
FIELD(MemoryRegion, ibv_mr, addr);
FIELD(MemoryRegion, ibv_mr, length);
FIELD(MemoryRegion, ibv_mr, lkey);
FIELD(MemoryRegion, ibv_mr, rkey);
SAME_SIZE(MemoryWindow, ibv_mw);
FIELD(MemoryWindow, ibv_mw, context);
FIELD(MemoryWindow, ibv_mw, rkey);
SAME_SIZE(CompletionChannel, ibv_comp_channel);
FIELD(CompletionChannel, ibv_comp_channel, fd);
SAME_SIZE(CompletionQueue, ibv_cq);
FIELD(CompletionQueue, ibv_cq, context);
FIELD(CompletionQueue, ibv_cq, cqe);
SAME_SIZE(QueuePair, ibv_qp);
FIELD(QueuePair, ibv_qp, context);
FIELD(QueuePair, ibv_qp, qp_num);
SAME_SIZE(QueuePairCapacity, ibv_qp_cap);
FIELD(QueuePairCapacity, ibv_qp_cap, max_inline_data);
SAME_SIZE(QueuePairInit, ibv_qp_init_attr);
FIELD(QueuePairInit, ibv_qp_init_attr, send_cq);
FIELD(QueuePairInit, ibv_qp_init_attr, recv_cq);
FIELD(QueuePairInit, ibv_qp_init_attr, cap);
FIELD(QueuePairInit, ibv_qp_init_attr, qp_type);
FIELD(QueuePairInit, ibv_qp_init_attr, sq_sig_all);
SAME_SIZE(AddressHandle, ibv_ah_attr);
FIELD(AddressHandle, ibv_ah_attr, port_num);
SAME_SIZE(QueuePairAttributes, ibv_qp_attr);
FIELD(QueuePairAttributes, ibv_qp_attr, qp_state);
FIELD(QueuePairAttributes, ibv_qp_attr, cap);
FIELD(QueuePairAttributes, ibv_qp_attr, ah_attr);
FIELD(QueuePairAttributes, ibv_qp_attr, timeout);
FIELD(QueuePairAttributes, ibv_qp_attr, rate_limit);
SAME_SIZE(ScatterGather, ibv_sge);
FIELD(ScatterGather, ibv_sge, lkey);
SAME_SIZE(SendRequest, ibv_send_wr);
FIELD(SendRequest, ibv_send_wr, sg_list);
FIELD(SendRequest, ibv_send_wr, num_sge);
FIELD(SendRequest, ibv_send_wr, opcode);
FIELD(SendRequest, ibv_send_wr, send_flags);
FIELD(SendRequest, ibv_send_wr, imm_data);
SAME_FIELD(SendRequest, rdma.remote_addr, ibv_send_wr, wr.rdma.remote_addr);
SAME_FIELD(SendRequest, rdma.rkey, ibv_send_wr, wr.rdma.rkey);
SAME_SIZE(ReceiveRequest, ibv_recv_wr);
FIELD(ReceiveRequest, ibv_recv_wr, num_sge);
SAME_SIZE(WorkCompletion, ibv_wc);
FIELD(WorkCompletion, ibv_wc, wr_id);
FIELD(WorkCompletion, ibv_wc, status);
FIELD(WorkCompletion, ibv_wc, opcode);
FIELD(WorkCompletion, ibv_wc, byte_len);
FIELD(WorkCompletion, ibv_wc, imm_data);
FIELD(WorkCompletion, ibv_wc, wc_flags);

static_assert(IBV_NODE_RNIC == abi::kNodeRnic);
static_assert(IBV_QPT_RC == abi::kQueuePairReliableConnected);
static_assert(IBV_QPS_ERR == abi::kStateError);
static_assert(IBV_QP_STATE == abi::kAttributeState);
static_assert(IBV_ACCESS_LOCAL_WRITE == abi::kAccessLocalWrite);
static_assert(IBV_ACCESS_REMOTE_WRITE == abi::kAccessRemoteWrite);
static_assert(IBV_ACCESS_MW_BIND == abi::kAccessWindowBind);
static_assert(IBV_MW_TYPE_2 == abi::kWindowOfQueuePair);
static_assert(IBV_WR_BIND_MW == abi::kOpcodeBindWindow);
static_assert(IBV_WR_RDMA_WRITE == abi::kOpcodeWrite);
static_assert(IBV_WR_RDMA_WRITE_WITH_IMM == abi::kOpcodeWriteWithImmediate);
static_assert(IBV_WR_SEND == abi::kOpcodeSend);
static_assert(IBV_SEND_SIGNALED == abi::kSendSignaled);
static_assert(IBV_SEND_INLINE == abi::kSendInline);
static_assert(IBV_WC_SUCCESS == abi::kStatusSuccess);
static_assert(IBV_WC_WR_FLUSH_ERR == abi::kStatusFlushed);
static_assert(IBV_WC_WITH_IMM == abi::kCompletionWithImmediate);

static_assert(sizeof(abi::EventChannel) == sizeof(rdma_event_channel));
SAME_SIZE(ConnectionAddress, rdma_addr);
SAME_FIELD(ConnectionAddress, src, rdma_addr, src_storage);
SAME_FIELD(ConnectionAddress, dst, rdma_addr, dst_storage);
SAME_FIELD(ConnectionAddress, sgid, rdma_addr, addr.ibaddr.sgid);
FIELD(ConnectionId, rdma_cm_id, verbs);
FIELD(ConnectionId, rdma_cm_id, channel);
FIELD(ConnectionId, rdma_cm_id, qp);
FIELD(ConnectionId, rdma_cm_id, route);
FIELD(ConnectionId, rdma_cm_id, port_num);
SAME_SIZE(ConnectionParameters, rdma_conn_param);
FIELD(ConnectionParameters, rdma_conn_param, responder_resources);
FIELD(ConnectionParameters, rdma_conn_param, initiator_depth);
FIELD(ConnectionParameters, rdma_conn_param, retry_count);
FIELD(ConnectionParameters, rdma_conn_param, rnr_retry_count);
FIELD(ConnectionEvent, rdma_cm_event, id);
FIELD(ConnectionEvent, rdma_cm_event, event);
FIELD(ConnectionEvent, rdma_cm_event, status);
static_assert(RDMA_PS_TCP == abi::kPortSpaceTcp);
static_assert(RDMA_CM_EVENT_ADDR_RESOLVED == abi::kEventAddressResolved);
static_assert(RDMA_CM_EVENT_ADDR_ERROR == abi::kEventAddressError);
static_assert(RDMA_CM_EVENT_ROUTE_RESOLVED == abi::kEventRouteResolved);
static_assert(RDMA_CM_EVENT_ROUTE_ERROR == abi::kEventRouteError);
static_assert(RDMA_CM_EVENT_CONNECT_REQUEST == abi::kEventConnectRequest);
static_assert(RDMA_CM_EVENT_CONNECT_ERROR == abi::kEventConnectError);
static_assert(RDMA_CM_EVENT_UNREACHABLE == abi::kEventUnreachable);
static_assert(RDMA_CM_EVENT_REJECTED == abi::kEventRejected);
static_assert(RDMA_CM_EVENT_ESTABLISHED == abi::kEventEstablished);
static_assert(RDMA_CM_EVENT_DISCONNECTED == abi::kEventDisconnected);
static_assert(RDMA_CM_EVENT_DEVICE_REMOVAL == abi::kEventDeviceRemoval);
static_assert(RDMA_CM_EVENT_ADDR_CHANGE == abi::kEventAddressChange);
static_assert(RDMA_CM_EVENT_TIMEWAIT_EXIT == abi::kEventTimewaitExit);

// Ours and theirs have the same number of parameters of the same sizes, and a result of the same.
template <typename A, typename B>
struct SameShape : std::false_type {};
template <typename Ours, typename... A, typename Theirs, typename... B>
struct SameShape<Ours (*)(A...), Theirs (*)(B...)> {
  static constexpr bool same_result = [] {
    if constexpr (std::is_void_v<Ours> || std::is_void_v<Theirs>) {
      return std::is_void_v<Ours> && std::is_void_v<Theirs>;
    } else {
      return sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;
    }
  }();
  static constexpr bool value = [] {
    if constexpr (sizeof...(A) != sizeof...(B)) {
      return false;
    } else {
      return same_result && ((sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>) && ...);
    }
  }();
};
#define CHECK_FUNCTION(name, result, parameters) \
  static_assert(SameShape<decltype(Libraries::name), decltype(&::name)>::value, #name);
RDMALOAD_VERBS_REQUIRED(CHECK_FUNCTION)
RDMALOAD_VERBS_OPTIONAL(CHECK_FUNCTION)
RDMALOAD_RDMACM_REQUIRED(CHECK_FUNCTION)

}  // namespace
}  // namespace rdmaload::rdma
#endif

namespace rdmaload::rdma {
namespace {

TEST_CASE("a missing library is named with what to install") {
  for (const auto& [verbs, rdmacm] :
       {std::pair("libnone-verbs.so.1", "librdmacm.so.1"), std::pair("libc.so.6", "librdmacm.so.1")}) {
    try {
      Libraries libraries(verbs, rdmacm);
      FAIL("it was opened");
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kNotSupported);
      CHECK(std::string(error.what()).find(verbs) != std::string::npos);
      CHECK(std::string(error.what()).find("apt-get install") != std::string::npos);
    }
  }
}

}  // namespace
}  // namespace rdmaload::rdma
