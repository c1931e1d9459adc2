// What is registered of the memory that reads go to: once per allocation of a GPU, whatever lies in it.
#include "transport/rdma/destinations.h"

#include <doctest/doctest.h>

#include <memory>
#include <vector>

#include "device/device_memory.h"
#include "support/fake_gpu.h"
#include "support/fake_queue_pair.h"

namespace rdmaload::rdma {
namespace {

using rdmaload::testing::FakeGpu;
using testing::FakeNetwork;
using Blocks = std::vector<std::span<std::byte>>;

constexpr uint64_t kSlabBytes = uint64_t{4} << 20;

std::byte* at(cuda::Pointer pointer) { return reinterpret_cast<std::byte*>(static_cast<uintptr_t>(pointer)); }

struct Fixture {
  const FakeGpu gpu;
  FakeNetwork network;
  std::shared_ptr<ProtectionDomain> domain = network.listen("fake", 0, true)->domain();
  std::shared_ptr<Destinations> destinations = std::make_shared<Destinations>(kSlabBytes);

  // As a network would: piece by piece, as far as one registration reaches.
  bool all_found(const Blocks& blocks) {
    for (std::span<std::byte> block : blocks) {
      while (!block.empty()) {
        const auto found = destinations->find(block, domain);
        if (found.region == nullptr || found.bytes == 0 || found.bytes > block.size()) return false;
        const uint64_t address = reinterpret_cast<uintptr_t>(block.data());
        if (found.remote_address(block.data()) != address) return false;
        if (address + found.bytes > found.region->address() + found.region->bytes()) return false;
        block = block.subspan(found.bytes);
      }
    }
    return true;
  }
};

// Tensors as torch's allocator places them: at multiples of 512 bytes, with some space between.
Blocks tensors_in(const DeviceBuffer& buffer, size_t count, size_t stride, size_t bytes) {
  Blocks blocks;
  for (size_t i = 0; i < count; ++i) blocks.emplace_back(at(buffer.data()) + i * stride, bytes);
  return blocks;
}

TEST_CASE("2,000 small tensors in one allocation of a GPU are one registration") {
  Fixture fixture;
  const DeviceBuffer buffer(fixture.gpu.device(), 2'000 * 1024);
  const Blocks blocks = tensors_in(buffer, 2'000, 1024, 300);
  auto lease = fixture.destinations->add(fixture.gpu.device(), blocks);
  CHECK(fixture.network.registrations() == 0);  // nobody needed one yet
  REQUIRE(fixture.all_found(blocks));
  CHECK(fixture.destinations->registrations() == 1);
  CHECK(fixture.network.registrations() == 1);
  CHECK(fixture.network.registered_bytes() == 1'999 * 1024 + 300);  // no byte beside them
  lease.reset();
  CHECK(fixture.network.registrations() == 0);
  CHECK(fixture.destinations->find(blocks[0], fixture.domain).region == nullptr);
}

TEST_CASE("a registration ends with its allocation, its slab, or at a gap that is somebody else's") {
  Fixture fixture;
  Device& device = fixture.gpu.device();
  SUBCASE("allocations") {
    const DeviceBuffer one(device, 100'000), two(device, 100'000);
    Blocks blocks = tensors_in(one, 50, 2'000, 1'999);
    const Blocks others = tensors_in(two, 50, 2'000, 2'000);
    blocks.insert(blocks.begin(), others.rbegin(), others.rend());  // in whatever order
    auto lease = fixture.destinations->add(device, blocks);
    REQUIRE(fixture.all_found(blocks));
    CHECK(fixture.network.registrations() == 2);
    CHECK(fixture.network.registered_bytes() == 49 * 2'000 + 1'999 + 100'000);
  }
  SUBCASE("slabs") {
    const DeviceBuffer buffer(device, 3 * kSlabBytes);
    const Blocks blocks = tensors_in(buffer, 3'000, 4'000, 3'999);
    auto lease = fixture.destinations->add(device, blocks);
    REQUIRE(fixture.all_found(blocks));
    CHECK(fixture.network.registrations() == 3);
  }
  SUBCASE("gaps") {
    const DeviceBuffer buffer(device, 3 * kSlabBytes);
    const Blocks blocks{{at(buffer.data()), 100}, {at(buffer.data()) + 2 * kBridgedBytes, 200}};
    auto lease = fixture.destinations->add(device, blocks);
    REQUIRE(fixture.all_found(blocks));
    CHECK(fixture.network.registered_bytes() == 300);
    CHECK(fixture.destinations->find({at(buffer.data()) + 100, 50}, fixture.domain).region == nullptr);
  }
}

TEST_CASE("blocks that touch, repeat or overlap are found from end to end") {
  Fixture fixture;
  const DeviceBuffer buffer(fixture.gpu.device(), 10'000);
  std::byte* const begin = at(buffer.data());
  const Blocks blocks{{begin, 5'000}, {begin + 100, 50}, {begin, 5'000}, {begin + 5'000, 5'000}, {begin, 0}};
  const auto lease = fixture.destinations->add(fixture.gpu.device(), blocks);
  REQUIRE(fixture.all_found({{begin, 10'000}, {begin + 4'900, 200}}));
  CHECK(fixture.network.registrations() == 1);
}

TEST_CASE("tensors of two loads may lie between each other, and each load's go when it goes") {
  Fixture fixture;
  const DeviceBuffer buffer(fixture.gpu.device(), 200 * 1024);
  const Blocks all = tensors_in(buffer, 200, 1024, 1000);
  const Blocks outer{all[0], all[75], all[199]}, before(all.begin() + 51, all.begin() + 75),
      behind(all.begin() + 76, all.begin() + 100);
  Blocks inner = before;
  inner.insert(inner.end(), behind.begin(), behind.end());
  auto outer_lease = fixture.destinations->add(fixture.gpu.device(), outer);
  auto inner_lease = fixture.destinations->add(fixture.gpu.device(), inner);
  REQUIRE(fixture.all_found(inner));
  REQUIRE(fixture.all_found(outer));
  const MemoryRegion* const between = fixture.destinations->find(all[75], fixture.domain).region;
  CHECK(between == fixture.destinations->find(all[0], fixture.domain).region);
  SUBCASE("the one around goes first") {
    outer_lease.reset();
    CHECK(fixture.all_found(inner));
    for (const size_t i : {0, 75, 199}) {
      CHECK(fixture.destinations->find(all[i], fixture.domain).region == nullptr);
    }
    inner_lease.reset();
  }
  SUBCASE("the one within goes first") {
    inner_lease.reset();
    CHECK(fixture.destinations->find(all[75], fixture.domain).region == between);
    CHECK(fixture.all_found(outer));
    CHECK(fixture.destinations->find(all[60], fixture.domain).region == nullptr);
    outer_lease.reset();
  }
  CHECK(fixture.network.registrations() == 0);
}

}  // namespace
}  // namespace rdmaload::rdma
