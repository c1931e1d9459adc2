// A block of host memory that tensors are loaded into and then share the ownership of.
//
// Anonymous memory of its own, so that dropping the last owner gives it back to the system. From 2 MiB up it
// starts at a huge-page boundary and asks for transparent huge pages: first-touch faults of 4 KiB pages cost
// more than the copy that fills them. Immovable; any thread may use it; tensors hold it through a shared_ptr.
#pragma once

#include <cstddef>
#include <span>

namespace rdmaload {

class HostArena {
 public:
  // Throws std::bad_alloc when the system has no room. Zero bytes are allowed.
  explicit HostArena(size_t bytes);
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  std::byte* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }
  std::span<std::byte> span() const noexcept { return {data_, size_}; }
  // Gives whole pages back to the system: who still refers to them (a socket that sends from them) keeps them
  // as they are, and the next write to that place gets fresh ones. False: the system refused.
  bool detach(size_t offset, size_t length) noexcept;

 private:
  size_t size_;
  size_t mapped_bytes_ = 0;
  std::byte* data_ = nullptr;
};

}  // namespace rdmaload
