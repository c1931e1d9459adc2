#include "transport/rdma/protection_domain.h"

#include <cerrno>
#include <cstring>

#include "transport/rdma/devices.h"

namespace rdmaload::rdma {
namespace {

int access_flags(Access access) {
  switch (access) {
    case Access::kSource:
      return 0;
    case Access::kReceive:
      return abi::kAccessLocalWrite;
    case Access::kRemoteWrite:
      return abi::kAccessLocalWrite | abi::kAccessRemoteWrite;  // the one is not allowed without the other
    case Access::kBound:
      return abi::kAccessLocalWrite | abi::kAccessWindowBind;
  }
  return 0;
}

class VerbsRegion final : public rdma::MemoryRegion {
 public:
  VerbsRegion(std::shared_ptr<ProtectionDomain> domain, const Libraries& libraries, abi::MemoryRegion* handle,
              uint64_t address, uint64_t bytes)
      : rdma::MemoryRegion(address, bytes, handle->lkey, handle->rkey),
        domain_(std::move(domain)),
        libraries_(libraries),
        handle_(handle) {}
  ~VerbsRegion() override {
    if (libraries_.is_opener()) libraries_.ibv_dereg_mr(handle_);
  }
  abi::MemoryRegion* handle() const noexcept { return handle_; }

 private:
  const std::shared_ptr<ProtectionDomain> domain_;  // ends after the region
  const Libraries& libraries_;
  abi::MemoryRegion* const handle_;
};

class VerbsWindow final : public rdma::MemoryRegion {
 public:
  VerbsWindow(std::shared_ptr<ProtectionDomain> domain, const Libraries& libraries,
              const rdma::MemoryRegion& region, abi::MemoryWindow* handle, uint32_t remote_key)
      : rdma::MemoryRegion(region.address(), region.bytes(), region.local_key(), remote_key),
        domain_(std::move(domain)),
        libraries_(libraries),
        handle_(handle) {}
  ~VerbsWindow() override {
    if (libraries_.is_opener()) handle_->context->ops.dealloc_mw(handle_);
  }

 private:
  const std::shared_ptr<ProtectionDomain> domain_;  // ends after the window
  const Libraries& libraries_;
  abi::MemoryWindow* const handle_;
};

}  // namespace

std::string registration_failure(int error) {
  std::string text = std::strerror(error);
  if (error != ENOMEM && error != EPERM && error != EAGAIN) return text;
  const std::optional<uint64_t> limit = memlock_limit();
  if (limit) {
    text +=
        "; this process may lock " + std::to_string(*limit >> 10) +
        " KiB: raise it (ulimit -l unlimited; LimitMEMLOCK=infinity in a systemd unit; docker run --ulimit "
        "memlock=-1)";
  }
  return text;
}

VerbsDomain::VerbsDomain(abi::Context* context)
    : libraries_(Libraries::process()),
      context_(context),
      device_(context->device->name),
      handle_(libraries_.ibv_alloc_pd(context)) {
  if (handle_ == nullptr) {
    throw Error(ErrorCode::kDevice,
                "making a protection domain on " + device_ + ": " + registration_failure(errno));
  }
}

VerbsDomain::~VerbsDomain() {
  if (libraries_.is_opener()) libraries_.ibv_dealloc_pd(handle_);
}

std::unique_ptr<rdma::MemoryRegion> VerbsDomain::register_memory(std::span<std::byte> memory, Access access) {
  if (memory.empty()) throw Error(ErrorCode::kInvalid, "an empty range of memory cannot be registered");
  abi::MemoryRegion* region =
      libraries_.ibv_reg_mr(handle_, memory.data(), memory.size(), access_flags(access));
  if (region == nullptr) {
    throw Error(ErrorCode::kDevice, "registering " + std::to_string(memory.size()) + " bytes with " +
                                        device_ + ": " + registration_failure(errno));
  }
  return std::make_unique<VerbsRegion>(shared_from_this(), libraries_, region,
                                       reinterpret_cast<uintptr_t>(memory.data()), memory.size());
}

std::unique_ptr<rdma::MemoryRegion> VerbsDomain::make_window(const rdma::MemoryRegion& region,
                                                             abi::SendRequest& bind) {
  const auto* registered = dynamic_cast<const VerbsRegion*>(&region);
  const auto allocate = context_->ops.alloc_mw;
  if (registered == nullptr || allocate == nullptr) return nullptr;
  abi::MemoryWindow* window = allocate(handle_, abi::kWindowOfQueuePair);
  if (window == nullptr) return nullptr;
  // What ibv_alloc_mw leaves to its caller; the low byte of a key is the owner's to change with each binding.
  const uint32_t key = (window->rkey & ~0xffU) | ((window->rkey + 1) & 0xffU);
  bind.opcode = abi::kOpcodeBindWindow;
  bind.bind_mw = {window,
                  key,
                  registered->handle(),
                  region.address(),
                  region.bytes(),
                  static_cast<unsigned>(abi::kAccessRemoteWrite)};
  return std::make_unique<VerbsWindow>(shared_from_this(), libraries_, region, window, key);
}

std::unique_ptr<rdma::MemoryRegion> VerbsDomain::register_dmabuf(int fd, uint64_t offset, uint64_t bytes,
                                                                 uint64_t address, Access access) {
  if (libraries_.ibv_reg_dmabuf_mr == nullptr) {
    throw Error(ErrorCode::kNotSupported, "libibverbs has no ibv_reg_dmabuf_mr: rdma-core 34 is needed");
  }
  abi::MemoryRegion* region =
      libraries_.ibv_reg_dmabuf_mr(handle_, offset, bytes, address, fd, access_flags(access));
  if (region == nullptr) {
    const int error = errno;
    const bool unsupported = error == EOPNOTSUPP || error == EPROTONOSUPPORT;
    throw Error(unsupported ? ErrorCode::kNotSupported : ErrorCode::kDevice,
                "registering a dma-buf of " + std::to_string(bytes) + " bytes with " + device_ + ": " +
                    registration_failure(error));
  }
  return std::make_unique<VerbsRegion>(shared_from_this(), libraries_, region, address, bytes);
}

}  // namespace rdmaload::rdma
