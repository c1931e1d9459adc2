// What the RDMA protocols need of a network card: reliable connected queue pairs and registered memory.
//
// verbs_queue_pair.h implements it with libibverbs and librdmacm, tests/cpp/support/fake_queue_pair.h in
// memory. A QueuePair belongs to one thread at a time; a ProtectionDomain and a Fabric may be used by any.
//
// A connection is made in steps, because the peer may send as soon as it is established: Fabric::resolve or
// Listener::accept gives a queue pair that is not connected; its owner posts receives; start() connects.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "core/deadline.h"
#include "core/error.h"
#include "transport/socket.h"

namespace rdmaload::rdma {

// Who may do what with registered memory, besides this process.
enum class Access {
  kSource,       // the card reads it, for what we post; the peer has no right to it
  kReceive,      // the card writes it, for receives that we posted; the peer has no right to it
  kRemoteWrite,  // the peer may write anywhere in it, until it is deregistered
  kBound,        // the peer of the one queue pair that a window onto it was made for may; see make_window()
};

// A registration of memory with a card: destroying it deregisters. It does not own the memory, which must
// outlive it. Keeps its protection domain alive; may be destroyed by any thread. Before it is destroyed, no
// posted work request may name it (QueuePair::close() sees to that).
class MemoryRegion {
 public:
  virtual ~MemoryRegion() = default;
  uint64_t address() const noexcept { return address_; }  // what remote writes name
  uint64_t bytes() const noexcept { return bytes_; }
  uint32_t local_key() const noexcept { return local_key_; }
  uint32_t remote_key() const noexcept { return remote_key_; }

 protected:
  MemoryRegion(uint64_t address, uint64_t bytes, uint32_t local_key, uint32_t remote_key)
      : address_(address), bytes_(bytes), local_key_(local_key), remote_key_(remote_key) {}
  MemoryRegion(const MemoryRegion&) = delete;
  MemoryRegion& operator=(const MemoryRegion&) = delete;

 private:
  const uint64_t address_;
  const uint64_t bytes_;
  const uint32_t local_key_;
  const uint32_t remote_key_;
};

// What registrations and queue pairs belong to: a queue pair, and so its peer, reaches only memory of its own
// domain. Queue pairs that share a domain can share registrations, and a peer of one of them that guesses a
// key can write to what is registered kRemoteWrite for another: share only among connections to one peer, or
// for memory that no peer may write.
class ProtectionDomain : public std::enable_shared_from_this<ProtectionDomain> {
 public:
  virtual ~ProtectionDomain() = default;
  // Throws kDevice naming the reason; where the limit of locked memory is it, with that limit and what to do.
  virtual std::unique_ptr<MemoryRegion> register_memory(std::span<std::byte> memory, Access access) = 0;
  // GPU memory: [offset, offset + bytes) of the dma-buf, which remote writes name by `address` onwards. The
  // descriptor may be closed afterwards. Throws kNotSupported where the card or the kernel cannot, kDevice.
  virtual std::unique_ptr<MemoryRegion> register_dmabuf(int fd, uint64_t offset, uint64_t bytes,
                                                        uint64_t address, Access access) = 0;
  virtual const std::string& device() const noexcept = 0;  // the card, such as "mlx5_0"
};

struct Completion {
  enum class Kind : uint8_t { kReceive, kSend, kWrite };
  Kind kind = Kind::kReceive;
  // Ended because the queue pair was in error already: not the cause, and nothing was transferred.
  bool flushed = false;
  uint64_t id = 0;
  std::string error;                  // empty: it worked
  std::optional<uint32_t> immediate;  // host byte order; of a receive that a write with immediate consumed
  uint32_t bytes = 0;                 // of a receive: what was sent, or written with the immediate
};

constexpr size_t kReceiveDepth =
    1024;  // posted receives at most; both sides of the Valkey protocol have as many
constexpr size_t kSendDepth = 1024;                   // work requests on the send queue at most
constexpr uint64_t kMaxId = (uint64_t{1} << 62) - 1;  // the largest id of a work request

class QueuePair {
 public:
  virtual ~QueuePair() = default;  // closes

  virtual const std::shared_ptr<ProtectionDomain>& domain() const noexcept = 0;

  // Begins to connect (a resolved one) or to accept; returns at once. wait() and handle_events() notice the
  // rest. Throws kUnavailable.
  virtual void start() = 0;
  virtual bool established() const noexcept = 0;

  // A window onto memory that was registered kBound: the peer of this queue pair, and no other, may write
  // there, whatever keys others guess. After start(), before anything that tells the peer its remote key is
  // posted. It goes before close(), because it holds on to the queue pair, and the region after it. Null: the
  // card has no such windows.
  virtual std::unique_ptr<MemoryRegion> make_window(const MemoryRegion& region) = 0;

  // Work requests. They throw kUnavailable when the connection is lost or closed, kInvalid when the queue is
  // full (look at send_room() first). What the spans name stays valid until the completion, but for inlined
  // bytes. Receives are posted before start() or after it; on a lost connection they are accepted, so that
  // what came before can still be taken.
  virtual void post_receive(uint64_t id, std::span<std::byte> memory, uint32_t key) = 0;
  // `key`: of the registration that the bytes lie in; nullopt inlines them: they are copied by this call, at
  // most inline_bytes(). Unsignaled requests have no completion unless they fail; their place in the queue is
  // free when a later signaled one has completed. Requests take effect at the peer in the order of their
  // posts.
  virtual void post_send(uint64_t id, std::span<const std::byte> bytes, std::optional<uint32_t> key,
                         bool signaled) = 0;
  virtual void post_write(uint64_t id, std::span<const std::byte> bytes, std::optional<uint32_t> key,
                          uint64_t remote_address, uint32_t remote_key, std::optional<uint32_t> immediate,
                          bool signaled) = 0;
  virtual size_t inline_bytes() const noexcept = 0;
  virtual size_t send_room() const noexcept = 0;  // work requests that fit into the send queue now

  // Takes what has completed; 0 when nothing has. Failed completions are reported, not thrown.
  virtual size_t poll(std::span<Completion> completions) = 0;

  // Sleeps until there is something to poll(), the connection is established, or the time is over (false).
  // Throws kUnavailable when the peer refused, is gone or has closed, and all that came before was polled.
  bool wait(std::chrono::milliseconds time);
  // The same, but for completions: what handle_events() notices alone ends it.
  bool wait_for_events(std::chrono::milliseconds time);

  // The parts of wait(), for a loop that sleeps on many descriptors: sleep while arm() is true and none of
  // descriptors() is readable, then handle_events(), then poll() until it gives 0.
  virtual bool arm() = 0;  // false: poll() has something. Throws as wait().
  // Never blocks. Throws kUnavailable when connecting failed; what is lost later arm() and wait() say.
  virtual void handle_events() = 0;
  virtual std::array<int, 2> descriptors() const noexcept = 0;  // -1: none

  // Ends the connection: when it returns, nothing that was posted and nothing of the peer can touch
  // registered memory through this queue pair any more. Outstanding completions are dropped. May be called
  // again.
  virtual void close() noexcept = 0;

  virtual std::string description() const = 0;   // "mlx5_0 port 1, GID 3 (::ffff:10.0.0.4), to 10.0.0.5:6380"
  virtual std::string peer_address() const = 0;  // "10.0.0.5:41234", for CLIENT LIST and logs
};

// Waits until a started queue pair is established. Throws kUnavailable, kTimeout, kCancelled. Giving up waits
// for the peer's answer, too, a second at most: a peer may not bear one that asks and is gone.
void establish(QueuePair& queue_pair, Deadline deadline, const GiveUp& give_up);

class Listener {
 public:
  virtual ~Listener() = default;
  // The next queue pair that asks to be connected: post receives, then start(). Null: nobody asks now. Throws
  // kDevice for one that could not be made (it has been refused), kUnavailable when the card is gone.
  virtual std::unique_ptr<QueuePair> accept() = 0;
  virtual int descriptor() const noexcept = 0;  // readable when accept() may have one
  virtual int port() const noexcept = 0;
  // The domain that accepted queue pairs get when they share one; memory that none of the peers may write (a
  // store) can be registered with it beforehand.
  virtual const std::shared_ptr<ProtectionDomain>& domain() const noexcept = 0;
};

struct Remote {
  std::string host;  // a name or a numeric address
  int port = 0;
  std::string device;                        // the card to use, such as "mlx5_0"; empty: the route decides
  std::shared_ptr<ProtectionDomain> domain;  // null: one of its own
  // A PCI device ("0000:18:00.0"): where no card is named, the one nearest to it that leads to the host.
  std::string near = {};
};

// Where queue pairs come from.
class Fabric {
 public:
  virtual ~Fabric() = default;
  // Finds address and route and makes a queue pair, not connected yet. Throws kUnavailable (no route, no such
  // card), kTimeout, kCancelled, kNotSupported (no verbs on this machine), kDevice.
  virtual std::unique_ptr<QueuePair> resolve(const Remote& remote, Deadline deadline,
                                             const GiveUp& give_up) = 0;
  // Listens on a card's own numeric address (no wildcard: memory is registered per card); port 0: a free one.
  // share_domain: accepted queue pairs get the listener's domain; else each one its own. Throws kUnavailable,
  // kInvalid, kNotSupported, kDevice.
  virtual std::unique_ptr<Listener> listen(const std::string& address, int port, bool share_domain) = 0;
};

}  // namespace rdmaload::rdma
