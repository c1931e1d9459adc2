// A protection domain of a real card, and the memory registered with it. See queue_pair.h.
#pragma once

#include <memory>
#include <string>

#include "transport/rdma/libraries.h"
#include "transport/rdma/queue_pair.h"

namespace rdmaload::rdma {

class VerbsDomain final : public ProtectionDomain {
 public:
  // On a card that somebody else keeps open for as long. Throws kDevice.
  explicit VerbsDomain(abi::Context* context);
  ~VerbsDomain() override;
  std::unique_ptr<rdma::MemoryRegion> register_memory(std::span<std::byte> memory, Access access) override;
  std::unique_ptr<rdma::MemoryRegion> register_dmabuf(int fd, uint64_t offset, uint64_t bytes,
                                                      uint64_t address, Access access) override;
  const std::string& device() const noexcept override { return device_; }
  // A window of memory registered kBound, and the request that binds it to the queue pair it is posted on.
  // Null: the card has none.
  std::unique_ptr<rdma::MemoryRegion> make_window(const rdma::MemoryRegion& region, abi::SendRequest& bind);

  abi::Context* context() const noexcept { return context_; }
  abi::ProtectionDomain* handle() const noexcept { return handle_; }

 private:
  const Libraries& libraries_;
  abi::Context* const context_;
  const std::string device_;
  abi::ProtectionDomain* const handle_;
};

// "Cannot allocate memory", and for ENOMEM what this process may lock and how to raise that.
std::string registration_failure(int error);

}  // namespace rdmaload::rdma
