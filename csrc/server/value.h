// Stored bytes, and the memory that they lie in.
//
// A Value is filled once by whoever received it and is immutable from the moment it is shared: a reader in
// flight keeps it alive, whatever happens to its key. Small ones come from the heap; larger ones are runs of
// pages in slabs of 32 MiB, huge pages where the system gives them, so that a hundred gigabytes of chunks are
// a few thousand mappings (a kernel allows 65,530) and few memory regions for a NIC.
//
// Sockets send from slabs by reference, and on loopback even a receiver's queue may still refer to pages of a
// value that is gone. So what was sent like that is never written again: its pages are detached before their
// place is used again. (The fresh ones there are ordinary pages until the kernel makes them huge, or until
// the whole slab is empty and goes.)
//
// ValueMemory never holds more of the system's memory than its limit: what does not fit is refused before it
// is allocated. Values that readers still hold count, and so does room in slabs that nothing uses.
//
// With a card (register_with) slabs are registered with it in parts of 32 MiB, without rights for any peer:
// new ones at once, others when they are first read. Detaching pages makes a registration stale, because the
// card keeps the old ones: it is given up then, and made anew for whoever reads there next. Readers in flight
// hold the one that they began with, whose pages of their value are right. Any thread may call everything
// here.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "memory/host_arena.h"
#include "transport/rdma/queue_pair.h"

namespace rdmaload::server {

class ValueMemory;

class Value {
 public:
  ~Value();
  Value(const Value&) = delete;
  Value& operator=(const Value&) = delete;

  std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }
  // Whether it lies in a slab, which cards can read.
  bool in_slab() const noexcept { return slab_ != nullptr; }
  // Whether sockets may refer to it: it lies in a slab, of which pages can be detached.
  bool can_refer() const noexcept;
  // Before the first reference to its pages is handed to the kernel.
  void refer() const noexcept { referred_ = true; }
  // Only for whoever fills it, before it is shared.
  std::span<std::byte> fill() noexcept { return {data_, size_}; }

 private:
  friend class ValueMemory;
  Value(std::shared_ptr<ValueMemory> memory, size_t size) : memory_(std::move(memory)), size_(size) {}

  std::shared_ptr<ValueMemory> memory_;
  std::byte* data_ = nullptr;
  size_t size_;
  std::unique_ptr<std::byte[]> heap_;
  void* slab_ = nullptr;  // which slab the pages belong to; null for the heap
  uint64_t offset_ = 0;   // in the slab
  mutable std::atomic<bool> referred_ = false;
};

using ValuePtr = std::shared_ptr<const Value>;

// Bytes of a value that a card can read, as long as this lives. Without a region they have to be copied.
struct RegisteredBytes {
  ValuePtr value;
  std::shared_ptr<const rdma::MemoryRegion> region;  // gone before the memory that it registers
  std::span<const std::byte> bytes;
};

class ValueMemory : public std::enable_shared_from_this<ValueMemory> {
 public:
  static std::shared_ptr<ValueMemory> make(uint64_t limit_bytes);

  // nullptr: it does not fit under the limit, or the system has no room.
  std::shared_ptr<Value> allocate(size_t bytes);

  // For what is not a value but grows with what clients store: keys, names in sets. False: over the limit.
  bool charge(uint64_t bytes) noexcept;
  void release(uint64_t bytes) noexcept;

  // From now on slabs are registered with this card, until it is called again with null. Throws kInvalid when
  // they are registered with another one.
  void register_with(std::shared_ptr<rdma::ProtectionDomain> domain);
  // The front of `length` bytes from `offset` on that lies in one registration, which is made if need be. No
  // region: the value lies on the heap, or the system refused (see take_refusal()).
  RegisteredBytes registered(const ValuePtr& value, size_t offset, size_t length);
  // Bytes that are registered now.
  uint64_t registered_bytes() const noexcept { return registered_bytes_.load(); }
  // Why the first registration that was refused was, once; else empty.
  std::string take_refusal();

  uint64_t limit_bytes() const noexcept { return limit_bytes_; }
  uint64_t used_bytes() const noexcept { return used_bytes_.load(); }  // of values and what was charged
  uint64_t held_bytes() const noexcept {
    return held_bytes_.load();
  }  // taken from the system; never above the limit
  uint64_t values() const noexcept { return values_.load(); }  // alive, those of readers included

 private:
  friend class Value;
  struct Part {
    std::shared_ptr<const rdma::MemoryRegion> region;  // null: not registered
    uint64_t forgotten = 0;                            // how often pages of it were detached
    bool refused = false;                              // not tried again before that
  };
  struct Slab {
    explicit Slab(size_t bytes) : memory(bytes) { free.emplace(0, bytes); }
    HostArena memory;
    std::vector<Part> parts;               // of 32 MiB; empty before the first is registered
    std::map<size_t, size_t> free;         // offset to length: neighbours are always merged
    size_t largest_free_bound = SIZE_MAX;  // no free run is longer; not always reached
  };

  explicit ValueMemory(uint64_t limit_bytes) : limit_bytes_(limit_bytes) {}
  bool hold(uint64_t bytes) noexcept;
  bool take_pages(Value& value, size_t bytes);
  bool take_pages(Value& value, size_t bytes, Slab*& fresh);  // fresh: a slab to be registered
  void give_back(Value& value) noexcept;
  static bool carve(Slab& slab, size_t bytes, Value& value);
  void register_slab(Slab& slab);
  std::shared_ptr<const rdma::MemoryRegion> register_part(Slab& slab, size_t index);
  // Of the parts that a value lay in whose pages were detached: for the caller to give up, after the lock.
  using StaleRegions = std::array<std::shared_ptr<const rdma::MemoryRegion>, 2>;
  static StaleRegions take_stale(Slab& slab, size_t offset, size_t length);

  const uint64_t limit_bytes_;
  std::atomic<bool> detaches_ = true;  // until the system refuses once
  std::atomic<uint64_t> used_bytes_ = 0;
  std::atomic<uint64_t> held_bytes_ = 0;
  std::atomic<uint64_t> values_ = 0;
  std::atomic<uint64_t> registered_bytes_ = 0;
  std::mutex mutex_;
  std::shared_ptr<rdma::ProtectionDomain> domain_;  // Guarded by mutex_, as is what follows.
  std::list<Slab> slabs_;
  std::string refusal_;
  bool refused_ = false;
};

}  // namespace rdmaload::server
