// Registering destinations with the fake network's cards, and memory of the fake GPU.
#include "transport/rdma/registrar.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <functional>
#include <string>
#include <vector>

#include "device/gpudirect.h"
#include "memory/host_arena.h"
#include "support/fake_gpu.h"
#include "support/fake_queue_pair.h"

namespace rdmaload::rdma {
namespace {

using rdmaload::testing::FakeGpu;
using testing::FakeNetwork;

ErrorCode code_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.code();
  }
  FAIL("nothing was thrown");
  return ErrorCode::kUnavailable;
}

struct Fixture {
  FakeNetwork network;
  std::shared_ptr<ProtectionDomain> domain = network.listen("fake", 0, true)->domain();
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
};

TEST_CASE("host memory is registered in slabs without gaps that share no page") {
  Fixture fixture;
  const uint64_t page = fixture.page;
  const MemoryRegistrar registrar(fixture.domain, 4 * page);
  const HostArena arena(11 * page);
  const std::span<std::byte> memory = arena.span().subspan(100, 10 * page);
  const Registration registration = registrar.register_host(memory, Access::kRemoteWrite);
  REQUIRE(registration.registered());
  CHECK(registration.road() == MemoryRoad::kHost);
  CHECK(registration.bytes() == memory.size());
  REQUIRE(registration.slabs().size() == 3);
  uint64_t at = reinterpret_cast<uintptr_t>(memory.data());
  for (const auto& slab : registration.slabs()) {
    CHECK(slab->address() == at);
    CHECK(slab->bytes() <= 4 * page);
    at += slab->bytes();
    if (&slab != &registration.slabs().back()) CHECK(at % page == 0);
    CHECK(registration.find(slab->address()) == slab.get());
    CHECK(registration.find(at - 1) == slab.get());
  }
  CHECK(at == reinterpret_cast<uintptr_t>(memory.data()) + memory.size());
  CHECK(registration.find(at) == nullptr);
  CHECK(registration.find(reinterpret_cast<uintptr_t>(memory.data()) - 1) == nullptr);
}

TEST_CASE("what fits into one slab is one") {
  Fixture fixture;
  const MemoryRegistrar registrar(fixture.domain, 4 * fixture.page);
  const HostArena arena(8 * fixture.page);
  for (uint64_t first = 0; first < 4; ++first) {
    const auto memory = arena.span().subspan(first * fixture.page, 4 * fixture.page);
    CHECK(registrar.register_host(memory, Access::kRemoteWrite).slabs().size() == 1);
  }
}

TEST_CASE("too little lockable memory: nothing is registered, and the reason is told") {
  Fixture fixture;
  fixture.network.set([&](auto& faults) { faults.memlock_bytes = 10 * fixture.page; });
  const MemoryRegistrar registrar(fixture.domain, 4 * fixture.page);
  const HostArena arena(11 * fixture.page);
  const Registration registration = registrar.register_host(arena.span(), Access::kRemoteWrite);
  CHECK(!registration.registered());
  CHECK(registration.slabs().empty());
  CHECK(registration.reason().find("locked memory") != std::string::npos);
  CHECK(fixture.network.registered_bytes() == 0);
  CHECK(registrar.register_host(arena.span().first(9 * fixture.page), Access::kRemoteWrite).registered());
}

TEST_CASE("nonsense is refused") {
  Fixture fixture;
  CHECK(code_of([&] { MemoryRegistrar(fixture.domain, 0); }) == ErrorCode::kInvalid);
  CHECK(code_of([&] { MemoryRegistrar(fixture.domain, fixture.page + 1); }) == ErrorCode::kInvalid);
  CHECK(code_of([&] { MemoryRegistrar(fixture.domain, kMaxSlabBytes + fixture.page); }) ==
        ErrorCode::kInvalid);
  const MemoryRegistrar registrar(fixture.domain);
  CHECK(code_of([&] { registrar.register_host({}, Access::kRemoteWrite); }) == ErrorCode::kInvalid);
  const FakeGpu gpu;
  CHECK(code_of([&] { registrar.register_device(gpu.device(), UINT64_MAX - 5, 10, Access::kRemoteWrite); }) ==
        ErrorCode::kInvalid);
}

TEST_CASE("GPU memory is registered as dma-bufs, at its own addresses") {
  Fixture fixture;
  const FakeGpu gpu;
  const DeviceBuffer buffer(gpu.device(), 10 * fixture.page);
  const MemoryRegistrar registrar(fixture.domain, 4 * fixture.page);
  const Registration registration =
      registrar.register_device(gpu.device(), buffer.data() + 100, 8 * fixture.page, Access::kRemoteWrite);
  REQUIRE(registration.registered());
  CHECK(registration.road() == MemoryRoad::kDmaBuf);
  CHECK(registration.slabs().front()->address() == buffer.data() + 100);
  CHECK(registration.bytes() == 8 * fixture.page);
}

TEST_CASE("GPU memory without dma-buf and peermem is staged, and the reason is told") {
  Fixture fixture;
  const FakeGpu gpu;
  if (has_peermem()) return;  // then it has another road
  const DeviceBuffer buffer(gpu.device(), 10 * fixture.page);
  const MemoryRegistrar registrar(fixture.domain);
  const auto reason = [&] {
    return registrar.register_device(gpu.device(), buffer.data(), 100, Access::kRemoteWrite).reason();
  };
  SUBCASE("the GPU cannot") {
    gpu.set_attribute(cuda::kAttributeDmaBufSupported, 0);
    CHECK(reason().find("cannot export dma-bufs") != std::string::npos);
  }
  SUBCASE("the card cannot") {
    fixture.network.set([](auto& faults) { faults.dmabuf = false; });
    CHECK(reason().find("takes no dma-buf") != std::string::npos);
  }
  SUBCASE("not enough may be locked") {
    fixture.network.set([](auto& faults) { faults.memlock_bytes = 10; });
    CHECK(reason().find("locked memory") != std::string::npos);
  }
  CHECK(reason().find("nvidia_peermem is not loaded") != std::string::npos);
  CHECK(fixture.network.registered_bytes() == 0);
}

}  // namespace
}  // namespace rdmaload::rdma
