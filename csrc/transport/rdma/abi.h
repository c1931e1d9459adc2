// The parts of the binary interfaces of libibverbs and librdmacm that this library uses, written down here so
// that it builds without their headers and its wheel links neither. tests/cpp/transport/rdma/abi_test.cpp
// compares them with the real headers where those are installed. Names follow theirs without prefix; structs
// that only the libraries make may end early.
#pragma once

#include <pthread.h>
#include <sys/socket.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace rdmaload::rdma::abi {

struct Context;
struct CompletionQueue;
struct QueuePair;
struct WorkCompletion;
struct MemoryWindow;
struct ProtectionDomain;
struct SendRequest;
struct ReceiveRequest;

// --- libibverbs

struct Device {
  void* ops[2];
  int node_type;
  int transport_type;
  char name[64];  // "mlx5_0"
  char dev_name[64];
  char dev_path[256];
  char ibdev_path[256];
};

// The data path is not exported by the library: it is called through this table of a card's provider.
struct ContextOps {
  void* before_alloc_mw[7];
  MemoryWindow* (*alloc_mw)(ProtectionDomain* domain, int type);
  void* bind_mw;
  int (*dealloc_mw)(MemoryWindow* window);
  void* before_poll_cq;
  int (*poll_cq)(CompletionQueue* queue, int count, WorkCompletion* completions);
  int (*req_notify_cq)(CompletionQueue* queue, int solicited_only);
  void* before_post_send[12];
  int (*post_send)(QueuePair* queue_pair, SendRequest* request, SendRequest** bad);
  int (*post_recv)(QueuePair* queue_pair, ReceiveRequest* request, ReceiveRequest** bad);
  void* after_post_recv[5];
};

struct Context {
  abi::Device* device;
  ContextOps ops;
  int cmd_fd;
  int async_fd;
  int num_comp_vectors;
  pthread_mutex_t mutex;
  void* abi_compat;
};

struct ProtectionDomain {
  Context* context;
  uint32_t handle;
};

struct MemoryRegion {
  Context* context;
  ProtectionDomain* pd;
  void* addr;
  size_t length;
  uint32_t handle;
  uint32_t lkey;
  uint32_t rkey;
};

struct MemoryWindow {
  Context* context;
  ProtectionDomain* pd;
  uint32_t rkey;
  uint32_t handle;
  int type;
};

struct CompletionChannel {
  Context* context;
  int fd;
  int refcnt;
};

struct CompletionQueue {
  Context* context;
  CompletionChannel* channel;
  void* cq_context;
  uint32_t handle;
  int cqe;
  pthread_mutex_t mutex;
  pthread_cond_t cond;
  uint32_t comp_events_completed;
  uint32_t async_events_completed;
};

struct QueuePair {
  Context* context;
  void* qp_context;
  ProtectionDomain* pd;
  CompletionQueue* send_cq;
  CompletionQueue* recv_cq;
  void* srq;
  uint32_t handle;
  uint32_t qp_num;
  int state;
  int qp_type;
  pthread_mutex_t mutex;
  pthread_cond_t cond;
  uint32_t events_completed;
};

struct QueuePairCapacity {
  uint32_t max_send_wr;
  uint32_t max_recv_wr;
  uint32_t max_send_sge;
  uint32_t max_recv_sge;
  uint32_t max_inline_data;
};

struct QueuePairInit {
  void* qp_context;
  CompletionQueue* send_cq;
  CompletionQueue* recv_cq;
  void* srq;
  QueuePairCapacity cap;
  int qp_type;
  int sq_sig_all;
};

struct GlobalRoute {
  uint8_t dgid[16];
  uint32_t flow_label;
  uint8_t sgid_index;
  uint8_t hop_limit;
  uint8_t traffic_class;
};

struct AddressHandle {
  alignas(8) GlobalRoute grh;
  uint16_t dlid;
  uint8_t sl;
  uint8_t src_path_bits;
  uint8_t static_rate;
  uint8_t is_global;
  uint8_t port_num;
};

struct QueuePairAttributes {
  int qp_state;
  int cur_qp_state;
  int path_mtu;
  int path_mig_state;
  uint32_t qkey;
  uint32_t rq_psn;
  uint32_t sq_psn;
  uint32_t dest_qp_num;
  unsigned qp_access_flags;
  QueuePairCapacity cap;
  AddressHandle ah_attr;
  AddressHandle alt_ah_attr;
  uint16_t pkey_index;
  uint16_t alt_pkey_index;
  uint8_t en_sqd_async_notify;
  uint8_t sq_draining;
  uint8_t max_rd_atomic;
  uint8_t max_dest_rd_atomic;
  uint8_t min_rnr_timer;
  uint8_t port_num;
  uint8_t timeout;
  uint8_t retry_cnt;
  uint8_t rnr_retry;
  uint8_t alt_port_num;
  uint8_t alt_timeout;
  uint32_t rate_limit;
};

struct ScatterGather {
  uint64_t addr;
  uint32_t length;
  uint32_t lkey;
};

struct SendRequest {
  uint64_t wr_id;
  SendRequest* next;
  ScatterGather* sg_list;
  int num_sge;
  int opcode;
  unsigned send_flags;
  uint32_t imm_data;  // network byte order
  struct {
    uint64_t remote_addr;
    uint32_t rkey;
    uint64_t unused[2];
  } rdma;
  uint64_t xrc;
  struct {
    MemoryWindow* mw;
    uint32_t rkey;
    MemoryRegion* mr;
    uint64_t addr;
    uint64_t length;
    unsigned mw_access_flags;
  } bind_mw;
};

struct ReceiveRequest {
  uint64_t wr_id;
  ReceiveRequest* next;
  ScatterGather* sg_list;
  int num_sge;
};

struct WorkCompletion {
  uint64_t wr_id;
  int status;
  int opcode;
  uint32_t vendor_err;
  uint32_t byte_len;
  uint32_t imm_data;  // network byte order
  uint32_t qp_num;
  uint32_t src_qp;
  unsigned wc_flags;
  uint16_t pkey_index;
  uint16_t slid;
  uint8_t sl;
  uint8_t dlid_path_bits;
};

constexpr int kNodeRnic = 4;
constexpr int kQueuePairReliableConnected = 2;
constexpr int kStateError = 6;
constexpr int kAttributeState = 1;
constexpr int kAccessLocalWrite = 1;
constexpr int kAccessRemoteWrite = 2;
constexpr int kAccessWindowBind = 16;
constexpr int kWindowOfQueuePair = 2;  // type 2: only through the queue pair that it was bound on
constexpr int kOpcodeWrite = 0;
constexpr int kOpcodeWriteWithImmediate = 1;
constexpr int kOpcodeSend = 2;
constexpr int kOpcodeBindWindow = 8;
constexpr unsigned kSendSignaled = 2;
constexpr unsigned kSendInline = 8;
constexpr int kStatusSuccess = 0;
constexpr int kStatusFlushed = 5;
constexpr unsigned kCompletionWithImmediate = 2;

// --- librdmacm

struct EventChannel {
  int fd;
};

struct ConnectionAddress {
  sockaddr_storage src;
  sockaddr_storage dst;
  uint8_t sgid[16];
  uint8_t dgid[16];
  uint16_t pkey;
};

struct ConnectionId {
  Context* verbs;
  EventChannel* channel;
  void* context;
  QueuePair* qp;
  struct {
    alignas(8) ConnectionAddress addr;
    void* path_rec;
    int num_paths;
  } route;
  int ps;
  uint8_t port_num;
};

struct ConnectionParameters {
  const void* private_data;
  uint8_t private_data_len;
  uint8_t responder_resources;
  uint8_t initiator_depth;
  uint8_t flow_control;
  uint8_t retry_count;
  uint8_t rnr_retry_count;
  uint8_t srq;
  uint32_t qp_num;
};

struct ConnectionEvent {
  ConnectionId* id;
  ConnectionId* listen_id;
  int event;
  int status;
};

constexpr int kPortSpaceTcp = 0x0106;
constexpr int kEventAddressResolved = 0;
constexpr int kEventAddressError = 1;
constexpr int kEventRouteResolved = 2;
constexpr int kEventRouteError = 3;
constexpr int kEventConnectRequest = 4;
constexpr int kEventConnectError = 6;
constexpr int kEventUnreachable = 7;
constexpr int kEventRejected = 8;
constexpr int kEventEstablished = 9;
constexpr int kEventDisconnected = 10;
constexpr int kEventDeviceRemoval = 11;
constexpr int kEventAddressChange = 14;
constexpr int kEventTimewaitExit = 15;

}  // namespace rdmaload::rdma::abi

// Every function: its name, what it returns, its parameters.
#define RDMALOAD_VERBS_REQUIRED(X)                                                                           \
  X(ibv_fork_init, int, ())                                                                                  \
  X(ibv_get_device_list, abi::Device**, (int* count))                                                        \
  X(ibv_free_device_list, void, (abi::Device * *list))                                                       \
  X(ibv_open_device, abi::Context*, (abi::Device * device))                                                  \
  X(ibv_close_device, int, (abi::Context * context))                                                         \
  X(ibv_alloc_pd, abi::ProtectionDomain*, (abi::Context * context))                                          \
  X(ibv_dealloc_pd, int, (abi::ProtectionDomain * domain))                                                   \
  X(ibv_reg_mr, abi::MemoryRegion*,                                                                          \
    (abi::ProtectionDomain * domain, void* memory, size_t bytes, int access))                                \
  X(ibv_dereg_mr, int, (abi::MemoryRegion * region))                                                         \
  X(ibv_create_comp_channel, abi::CompletionChannel*, (abi::Context * context))                              \
  X(ibv_destroy_comp_channel, int, (abi::CompletionChannel * channel))                                       \
  X(ibv_create_cq, abi::CompletionQueue*,                                                                    \
    (abi::Context * context, int entries, void* cookie, abi::CompletionChannel* channel, int vector))        \
  X(ibv_destroy_cq, int, (abi::CompletionQueue * queue))                                                     \
  X(ibv_get_cq_event, int, (abi::CompletionChannel * channel, abi::CompletionQueue * *queue, void** cookie)) \
  X(ibv_ack_cq_events, void, (abi::CompletionQueue * queue, unsigned count))                                 \
  X(ibv_modify_qp, int, (abi::QueuePair * queue_pair, abi::QueuePairAttributes * attributes, int mask))      \
  X(ibv_wc_status_str, const char*, (int status))

// rdma-core 34 and later.
#define RDMALOAD_VERBS_OPTIONAL(X)         \
  X(ibv_reg_dmabuf_mr, abi::MemoryRegion*, \
    (abi::ProtectionDomain * domain, uint64_t offset, size_t bytes, uint64_t address, int fd, int access))

#define RDMALOAD_RDMACM_REQUIRED(X)                                                                        \
  X(rdma_create_event_channel, abi::EventChannel*, ())                                                     \
  X(rdma_destroy_event_channel, void, (abi::EventChannel * channel))                                       \
  X(rdma_create_id, int, (abi::EventChannel * channel, abi::ConnectionId * *id, void* context, int space)) \
  X(rdma_destroy_id, int, (abi::ConnectionId * id))                                                        \
  X(rdma_bind_addr, int, (abi::ConnectionId * id, sockaddr * address))                                     \
  X(rdma_resolve_addr, int, (abi::ConnectionId * id, sockaddr * from, sockaddr * to, int milliseconds))    \
  X(rdma_resolve_route, int, (abi::ConnectionId * id, int milliseconds))                                   \
  X(rdma_create_qp, int,                                                                                   \
    (abi::ConnectionId * id, abi::ProtectionDomain * domain, abi::QueuePairInit * init))                   \
  X(rdma_destroy_qp, void, (abi::ConnectionId * id))                                                       \
  X(rdma_connect, int, (abi::ConnectionId * id, abi::ConnectionParameters * parameters))                   \
  X(rdma_listen, int, (abi::ConnectionId * id, int backlog))                                               \
  X(rdma_accept, int, (abi::ConnectionId * id, abi::ConnectionParameters * parameters))                    \
  X(rdma_reject, int, (abi::ConnectionId * id, const void* data, uint8_t bytes))                           \
  X(rdma_disconnect, int, (abi::ConnectionId * id))                                                        \
  X(rdma_migrate_id, int, (abi::ConnectionId * id, abi::EventChannel * channel))                           \
  X(rdma_get_cm_event, int, (abi::EventChannel * channel, abi::ConnectionEvent * *event))                  \
  X(rdma_ack_cm_event, int, (abi::ConnectionEvent * event))                                                \
  X(rdma_get_src_port, uint16_t, (abi::ConnectionId * id))                                                 \
  X(rdma_event_str, const char*, (int event))
