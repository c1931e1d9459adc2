// A network card that writes into GPU memory, on the fake network and the fake driver: bytes, order, what is
// verified where, and the ways that remain when it cannot.
#include "transport/rdma/device_transport.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "core/crc32c.h"
#include "device/gpudirect.h"
#include "support/fake_gpu.h"
#include "support/fake_transport.h"
#include "support/rdma_server.h"
#include "support/reads.h"
#include "transport/memory_transport.h"

namespace rdmaload::rdma {
namespace {

using rdmaload::testing::Command;
using rdmaload::testing::FakeGpu;
using rdmaload::testing::pick;
using rdmaload::testing::random_bytes;
using rdmaload::testing::RecordingOwner;
using testing::FakeFaults;
using testing::FakeNetwork;
using testing::RdmaServer;
using Bytes = std::vector<std::byte>;

constexpr uint64_t kChunk = 10'000;

std::byte* at(cuda::Pointer pointer) { return reinterpret_cast<std::byte*>(static_cast<uintptr_t>(pointer)); }
bool mentions(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

RdmaServer::Options server_options(bool ours) {
  RdmaServer::Options options;
  options.ours = ours;
  return options;
}

// Chunks in a server, memory of a GPU for them, and the way there as the bindings put it together. Every
// third chunk has bytes that nobody wants, and all are cut into tensors.
struct Fixture {
  explicit Fixture(uint64_t seed = 1, bool ours = true, size_t chunk_count = 24, int ordinal = 0)
      : gpu(seed),
        device(gpu.device(ordinal)),
        server(network, server_options(ours)),
        content(random_bytes(chunk_count * kChunk, seed + 7)),
        memory(std::make_unique<DeviceBuffer>(device, content.size())) {
    network.set([&](FakeFaults& faults) { faults.device_write = gpu.card_writer(); });
    std::mt19937_64 random(seed);
    std::byte* place = at(memory->data());
    for (size_t i = 0; i < chunk_count; ++i) {
      const std::string object = "m/" + std::to_string(i);
      server.put(object, chunk(i));
      tcp_store->put(object, chunk(i));
      auto read = std::make_unique<Read>();
      read->object = object;
      read->length = read->object_bytes = kChunk;
      read->checksum = true;
      read->owner = &owner;
      for (uint64_t left = kChunk; left > 0;) {
        const uint64_t size = pick(random, 0, 2) == 0 ? std::min<uint64_t>(left, 100) : left;
        const bool dropped = i % 3 == 1 && left == kChunk && size < left;
        read->segments.push_back({dropped ? nullptr : place + i * kChunk + (kChunk - left), size});
        if (pick(random, 0, 4) == 0) read->segments.push_back({place, 0});
        left -= size;
      }
      reads.push_back(std::move(read));
    }
  }

  Bytes chunk(size_t i) const {
    return {content.begin() + static_cast<ptrdiff_t>(i * kChunk),
            content.begin() + static_cast<ptrdiff_t>((i + 1) * kChunk)};
  }

  // Destroyed before the fixture's memory.
  struct Road {
    std::shared_ptr<RdmaTransport> network;
    std::shared_ptr<StagedTransport> staged;
    std::shared_ptr<DeviceTransport> direct;
  };
  Road road(int connections = 2, bool fall_back = false, bool verify_device = false) {
    TransportOptions options;
    options.endpoint.host = "fake";
    options.endpoint.port = server.port();
    options.endpoint.name = "rdma://fake";
    options.endpoint.connect_timeout = std::chrono::seconds(20);
    options.endpoint.inactivity_timeout = inactivity;
    options.connections = connections;
    options.bytes_in_flight = 4 * kChunk;
    options.fabric = std::shared_ptr<Fabric>(&network, [](Fabric*) {});
    if (fall_back) {
      options.fall_back = [this] {
        auto tcp = std::make_unique<MemoryTransport>();
        for (size_t i = 0; i < reads.size(); ++i) tcp->put(reads[i]->object, chunk(i));
        return tcp;
      };
    }
    Road made;
    made.network = std::make_shared<RdmaTransport>(options);
    StagingOptions staging;
    staging.read_bytes = kChunk;
    staging.staging_bytes = 8 * kChunk;
    staging.verify_device = verify_device;
    made.staged = std::make_shared<StagedTransport>(made.network, device, staging);
    made.direct = std::make_shared<DeviceTransport>(made.network, made.staged, device, verify_device);
    return made;
  }

  std::vector<std::span<std::byte>> destinations() const {
    std::vector<std::span<std::byte>> blocks;
    for (const auto& read : reads) {
      for (const Segment& segment : read->segments) {
        if (segment.data != nullptr && segment.size > 0) blocks.emplace_back(segment.data, segment.size);
      }
    }
    return blocks;
  }

  // Submits all; failures that another attempt may mend are tried again, as a load does it.
  bool read_all(const Road& made, Stream& consumer, bool retry = false) {
    made.staged->follow(consumer.handle());
    made.direct->follow(consumer.handle());
    if (retry) {
      owner.then([&, direct = made.direct.get()](Read& read, const Status& status) {
        if (status.ok()) {
          ++done;
        } else if (status.code() == ErrorCode::kUnavailable || status.code() == ErrorCode::kTimeout) {
          direct->submit(read);
        }
      });
    }
    for (const auto& read : reads) made.direct->submit(*read);
    if (retry) {
      for (size_t seen = owner.count(); done < reads.size(); seen = owner.count()) {
        if (!owner.wait_for(seen + 1)) return false;
      }
    } else if (!owner.wait_for(reads.size())) {
      return false;
    }
    made.staged->lead(consumer.handle());
    return true;
  }

  // Everything wanted is there, and what is verified is right.
  bool is_complete(Stream& consumer) {
    const Bytes seen = gpu.read(device, memory->data(), content.size(), consumer.handle());
    for (size_t i = 0; i < reads.size(); ++i) {
      const Status status = owner.status_of(*reads[i]);
      CHECK_MESSAGE(status.ok(), status.message());
      if (!status.ok() || reads[i]->crc != crc32c(0, chunk(i))) return false;
      uint64_t from = i * kChunk;
      for (const Segment& segment : reads[i]->segments) {
        const auto begin = static_cast<ptrdiff_t>(from);
        if (segment.data != nullptr &&
            !std::equal(seen.begin() + begin, seen.begin() + begin + static_cast<ptrdiff_t>(segment.size),
                        content.begin() + begin)) {
          return false;
        }
        from += segment.size;
      }
    }
    return true;
  }

  FakeGpu gpu;
  Device& device;
  FakeNetwork network;
  RdmaServer server;
  RecordingOwner owner;
  std::atomic<size_t> done{0};
  std::chrono::milliseconds inactivity{20'000};
  const Bytes content;
  std::unique_ptr<DeviceBuffer> memory;
  std::unique_ptr<MemoryTransport> tcp_store = std::make_unique<MemoryTransport>();
  std::vector<std::unique_ptr<Read>> reads;
};

TEST_CASE("a card writes every byte into GPU memory, the GPU verifies it, and the host copies none") {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    CAPTURE(seed);
    Fixture fixture(seed, true, 24, static_cast<int>(seed % 2));
    Stream consumer(fixture.device);
    const auto road = fixture.road();
    const auto blocks = fixture.destinations();
    const auto lease = road.direct->prepare(blocks);
    REQUIRE(fixture.read_all(road, consumer));
    CHECK(fixture.is_complete(consumer));
    CHECK(road.direct->path() == "resp-rdma+direct-gpu");
    CHECK(road.direct->fallback_reason().empty());
    CHECK(road.staged->counters().copied_bytes == 0);
    for (const auto& read : fixture.reads) CHECK(read->copied_bytes == 0);
    CHECK(road.direct->verified_bytes() == fixture.content.size());
    CHECK(fixture.gpu.state().card_writes >= fixture.reads.size());
    CHECK(fixture.network.refused_writes() == 0);
  }
}

TEST_CASE("a card's writes come after what the consumer had to do with the memory") {
  Fixture fixture;
  Stream consumer(fixture.device);
  const auto road = fixture.road();
  const auto blocks = fixture.destinations();
  const auto lease = road.direct->prepare(blocks);
  // The memory's former owner is not done with it: its last write is enqueued, and late.
  const Bytes former(fixture.content.size(), std::byte{0x5e});
  fixture.gpu.hold(true);
  {
    const DeviceGuard guard(fixture.device);
    REQUIRE(fixture.gpu.driver.copy_to_device(fixture.memory->data(), former.data(), former.size(),
                                              consumer.handle()) == cuda::kSuccess);
  }
  road.staged->follow(consumer.handle());
  road.direct->follow(consumer.handle());
  for (const auto& read : fixture.reads) road.direct->submit(*read);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // time in which nothing may happen
  CHECK(fixture.gpu.state().card_writes == 0);
  fixture.gpu.hold(false);
  REQUIRE(fixture.owner.wait_for(fixture.reads.size()));
  CHECK(fixture.is_complete(consumer));
}

TEST_CASE("connections are made over the card that is nearest to the GPU") {
  Fixture fixture;
  Stream consumer(fixture.device);
  const auto road = fixture.road();
  const auto blocks = fixture.destinations();
  const auto lease = road.direct->prepare(blocks);
  REQUIRE(fixture.read_all(road, consumer));
  CHECK(!fixture.network.near().empty());
  CHECK(fixture.network.near() == pci_address(fixture.device));
}

TEST_CASE("whoever cancels while its reads begin may go as soon as they are done") {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    CAPTURE(seed);
    Fixture fixture;
    Stream consumer(fixture.device);
    const auto road = fixture.road();
    auto owner = std::make_unique<RecordingOwner>();
    for (const auto& read : fixture.reads) {
      read->owner = owner.get();
      read->object = "gone";  // fails at the network, on its thread
    }
    const auto blocks = fixture.destinations();
    const auto lease = road.direct->prepare(blocks);
    fixture.gpu.hold(true);
    road.direct->follow(consumer.handle());
    for (const auto& read : fixture.reads) road.direct->submit(*read);
    fixture.gpu.hold(false);
    std::this_thread::sleep_for(std::chrono::microseconds(20 * seed));
    if (seed % 2 == 0) {
      owner->set_cancelled();
      road.direct->cancel(*owner);
    }
    REQUIRE(owner->wait_for(fixture.reads.size()));
    for (const auto& read : fixture.reads) CHECK(owner->count_of(*read) == 1);
    owner.reset();
  }
}

TEST_CASE("where the device does not order a card's writes they are flushed before they count as there") {
  for (const int ordering : {0, cuda::kOrderingOwner}) {
    CAPTURE(ordering);
    Fixture fixture;
    fixture.gpu.set_attribute(cuda::kAttributeWritesOrdering, ordering);
    if (ordering == cuda::kOrderingOwner) {  // then nothing is asked of the driver
      fixture.gpu.fail_call("cuFlushGPUDirectRDMAWrites", 1, cuda::kNotSupported);
    }
    Stream consumer(fixture.device);
    const auto road = fixture.road();
    const auto blocks = fixture.destinations();
    const auto lease = road.direct->prepare(blocks);
    REQUIRE(fixture.read_all(road, consumer));
    CHECK(fixture.is_complete(consumer));
  }
  Fixture fixture;
  fixture.gpu.set_attribute(cuda::kAttributeFlushWritesOptions, 0);
  fixture.gpu.set_attribute(cuda::kAttributeWritesOrdering, 0);
  try {
    fixture.road();
    FAIL("writes that nobody can order were promised");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kNotSupported);
    CHECK(mentions(error.what(), "cannot flush"));
  }
}

TEST_CASE("a bit that flips on the way to the GPU is seen there") {
  Fixture fixture;
  Stream consumer(fixture.device);
  const auto road = fixture.road(1);
  const auto blocks = fixture.destinations();
  const auto lease = road.direct->prepare(blocks);
  std::atomic<bool> flipped{false};
  fixture.server.hook([&](const Command& command) -> std::optional<std::string> {
    if (command[0] == "RDMALOAD.READ" && command[1] == "m/12" && command[2] != "0" &&
        !flipped.exchange(true)) {
      fixture.network.set([](FakeFaults& faults) { faults.corrupt_writes = 1; });
    }
    return std::nullopt;
  });
  REQUIRE(fixture.read_all(road, consumer));
  size_t wrong = 0;
  for (size_t i = 0; i < fixture.reads.size(); ++i) {
    CHECK(fixture.owner.status_of(*fixture.reads[i]).ok());
    if (fixture.reads[i]->crc != crc32c(0, fixture.chunk(i))) ++wrong;
  }
  CHECK(wrong == 1);
}

TEST_CASE("a CUDA graph that is captured meanwhile stays whole") {
  Fixture fixture;
  fixture.gpu.set_attribute(cuda::kAttributeWritesOrdering, 0);  // so that the driver is asked to flush
  Stream consumer(fixture.device), captured(fixture.device);
  fixture.gpu.begin_capture(captured.handle());
  {
    const auto road = fixture.road();
    const auto blocks = fixture.destinations();
    const auto lease = road.direct->prepare(blocks);
    REQUIRE(fixture.read_all(road, consumer));
    CHECK(fixture.is_complete(consumer));
    CHECK(road.direct->path() == "resp-rdma+direct-gpu");
  }
  CHECK(fixture.gpu.end_capture());
}

TEST_CASE("verify_device: what has no checksum to compare with goes where its way can be checked") {
  Fixture fixture;
  for (size_t i = 0; i < fixture.reads.size(); i += 2) fixture.reads[i]->checksum = false;
  Stream consumer(fixture.device);
  const auto road = fixture.road(2, false, true);
  const auto blocks = fixture.destinations();
  const auto lease = road.direct->prepare(blocks);
  REQUIRE(fixture.read_all(road, consumer));
  CHECK(fixture.is_complete(consumer));
  CHECK(road.direct->path() == "resp-rdma+direct-gpu+resp-rdma+staged-gpu");
  CHECK(mentions(road.direct->fallback_reason(), "verify_device has no stored checksum"));
  CHECK(road.direct->verified_bytes() == fixture.content.size() / 2);
  CHECK(road.staged->counters().verified_bytes == fixture.content.size() / 2);
}

TEST_CASE("what cannot be registered goes through page-locked memory, which is said with the reason") {
  SUBCASE("no dma-buf and no peermem") {
    if (has_peermem()) return;
    Fixture fixture;
    fixture.network.set([](FakeFaults& faults) { faults.dmabuf = false; });
    Stream consumer(fixture.device);
    const auto road = fixture.road();
    const auto blocks = fixture.destinations();
    const auto lease = road.direct->prepare(blocks);
    REQUIRE(fixture.read_all(road, consumer));
    CHECK(fixture.is_complete(consumer));
    CHECK(road.direct->path() == "resp-rdma+staged-gpu");
    CHECK(mentions(road.direct->fallback_reason(), "the card takes no dma-buf"));
    CHECK(mentions(road.direct->fallback_reason(), "nvidia_peermem is not loaded"));
    CHECK(fixture.gpu.state().card_writes == 0);
  }
  SUBCASE("a device that exports none") {
    Fixture fixture;
    fixture.gpu.set_attribute(cuda::kAttributeDmaBufSupported, 0);
    Stream consumer(fixture.device);
    const auto road = fixture.road();
    const auto blocks = fixture.destinations();
    const auto lease = road.direct->prepare(blocks);
    REQUIRE(fixture.read_all(road, consumer));
    CHECK(fixture.is_complete(consumer));
    CHECK(mentions(road.direct->fallback_reason(), "cannot export dma-bufs"));
  }
  SUBCASE("refused midway: what is registered already is written directly") {
    Fixture fixture;
    Stream consumer(fixture.device);
    const auto road = fixture.road(1);
    const auto blocks = fixture.destinations();
    std::vector<std::shared_ptr<void>> leases;  // ten or so, each with a registration of its own
    for (size_t i = 0; i < blocks.size(); i += 8) {
      leases.push_back(
          road.direct->prepare(std::span(blocks).subspan(i, std::min<size_t>(8, blocks.size() - i))));
    }
    // The second export is the one that fails.
    fixture.gpu.fail_call("cuMemGetHandleForAddressRange", 2, cuda::kOutOfMemory);
    REQUIRE(fixture.read_all(road, consumer));
    CHECK(fixture.is_complete(consumer));
    CHECK(road.direct->path() == "resp-rdma+direct-gpu+resp-rdma+staged-gpu");
    CHECK(mentions(road.direct->fallback_reason(), "CUDA_ERROR_OUT_OF_MEMORY"));
    CHECK(fixture.gpu.state().card_writes > 0);
  }
  SUBCASE("memory that was not announced") {
    Fixture fixture;
    Stream consumer(fixture.device);
    const auto road = fixture.road();
    REQUIRE(fixture.read_all(road, consumer));
    CHECK(fixture.is_complete(consumer));
    CHECK(road.direct->path() == "resp-rdma+staged-gpu");
  }
}

TEST_CASE("from a Valkey GPU memory is filled through page-locked memory") {
  Fixture fixture(1, false);
  Stream consumer(fixture.device);
  const auto road = fixture.road();
  const auto blocks = fixture.destinations();
  const auto lease = road.direct->prepare(blocks);
  REQUIRE(fixture.read_all(road, consumer));
  CHECK(fixture.is_complete(consumer));
  CHECK(road.direct->path() == "resp-rdma+staged-gpu");
  CHECK(mentions(road.direct->fallback_reason(), "framing"));
  CHECK(mentions(road.direct->fallback_reason(), "every value is staged there and copied"));
}

TEST_CASE("without kernels nothing could be verified on the GPU, so checksums keep to the host") {
  Fixture fixture;
  Device plain(fixture.gpu.driver, 0);
  plain.copy_stream();
  Stream consumer(fixture.device);
  const auto made = fixture.road();
  // At the next two looks for them, which are the constructors'.
  fixture.gpu.fail_call("cuModuleLoadDataEx", 1, cuda::kNotSupported);
  auto staged = std::make_shared<StagedTransport>(made.network, plain, StagingOptions{kChunk, 8 * kChunk});
  fixture.gpu.fail_call("cuModuleLoadDataEx", 1, cuda::kNotSupported);
  const Fixture::Road road{made.network, staged,
                           std::make_shared<DeviceTransport>(made.network, staged, plain)};
  const auto blocks = fixture.destinations();
  const auto lease = road.direct->prepare(blocks);
  for (size_t i = 0; i < fixture.reads.size(); i += 2) fixture.reads[i]->checksum = false;
  REQUIRE(fixture.read_all(road, consumer));
  for (size_t i = 0; i < fixture.reads.size(); i += 2) fixture.reads[i]->crc = crc32c(0, fixture.chunk(i));
  CHECK(fixture.is_complete(consumer));
  CHECK(mentions(road.direct->path(), "resp-rdma+direct-gpu"));
  CHECK_MESSAGE(mentions(road.direct->fallback_reason(), "no kernels"), road.direct->fallback_reason());
}

TEST_CASE("a way that dies mid-load leaves the rest to TCP, through page-locked memory") {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    CAPTURE(seed);
    Fixture fixture(seed);
    Stream consumer(fixture.device);
    const auto road = fixture.road(2, true);
    const auto blocks = fixture.destinations();
    const auto lease = road.direct->prepare(blocks);
    std::atomic<int> answered{0};
    fixture.server.hook([&](const Command& command) -> std::optional<std::string> {
      if (command[0] == "RDMALOAD.READ" && command[2] != "0" && ++answered == 8) {
        fixture.network.set([](FakeFaults& faults) { faults.no_device = true; });
        fixture.network.cut();
      }
      return std::nullopt;
    });
    REQUIRE(fixture.read_all(road, consumer, true));
    CHECK(fixture.is_complete(consumer));
    CHECK(mentions(road.direct->path(), "+staged-gpu"));
    CHECK(mentions(road.direct->fallback_reason(), "RDMA"));
    CHECK(fixture.network.deliver(10'000) == 0);
  }
}

TEST_CASE("where there is no RDMA at all everything goes over TCP and through page-locked memory") {
  Fixture fixture;
  fixture.network.set([](FakeFaults& faults) { faults.no_device = true; });
  Stream consumer(fixture.device);
  const auto road = fixture.road(2, true);
  const auto blocks = fixture.destinations();
  const auto lease = road.direct->prepare(blocks);
  REQUIRE(fixture.read_all(road, consumer));
  CHECK(fixture.is_complete(consumer));
  CHECK(road.direct->path() == "memory+staged-gpu");
  CHECK(mentions(road.direct->fallback_reason(), "no RDMA: this machine has no RDMA device"));
  CHECK(!mentions(road.direct->fallback_reason(), "page-locked"));  // said once
}

TEST_CASE("memory is deregistered with its lease, which has one for an allocation, and nothing lands later") {
  Fixture fixture;
  Stream consumer(fixture.device);
  auto road = fixture.road(1);
  const auto blocks = fixture.destinations();
  auto lease = road.direct->prepare(blocks);
  REQUIRE(fixture.read_all(road, consumer));
  const uint64_t bytes = fixture.network.registered_bytes();
  const uint64_t registrations = fixture.network.registrations();
  lease.reset();
  // From the first to the last byte that is wanted of the one allocation.
  const auto [first, last] = std::minmax_element(
      blocks.begin(), blocks.end(), [](const auto& a, const auto& b) { return a.data() < b.data(); });
  CHECK(bytes - fixture.network.registered_bytes() ==
        static_cast<uint64_t>(last->data() + last->size() - first->data()));
  CHECK(registrations - fixture.network.registrations() == 1);
  fixture.memory.reset();
  fixture.network.deliver(10'000);
  CHECK(fixture.gpu.state().late_writes == 0);
}

TEST_CASE("whoever goes while reads are under way waits until nothing can land any more") {
  for (const bool by_cancel : {true, false}) {
    CAPTURE(by_cancel);
    Fixture fixture;
    Stream consumer(fixture.device);
    auto road = fixture.road(2);
    const auto blocks = fixture.destinations();
    auto lease = road.direct->prepare(blocks);
    std::atomic<bool> stalled{false};
    fixture.server.hook([&](const Command& command) -> std::optional<std::string> {
      if (command[0] == "RDMALOAD.READ" && command[2] != "0" && !stalled.exchange(true)) {
        fixture.network.set([](FakeFaults& faults) { faults.held = true; });
      }
      return std::nullopt;
    });
    road.direct->follow(consumer.handle());
    for (const auto& read : fixture.reads) road.direct->submit(*read);
    while (!stalled) std::this_thread::yield();
    if (by_cancel) {
      fixture.owner.set_cancelled();
      road.direct->cancel(fixture.owner);
    } else {
      road.direct.reset();
    }
    REQUIRE(fixture.owner.wait_for(fixture.reads.size()));
    for (const auto& read : fixture.reads) CHECK(fixture.owner.count_of(*read) == 1);
    road = {};
    lease.reset();
    fixture.memory.reset();
    fixture.network.deliver(10'000);
    CHECK(fixture.gpu.state().late_writes == 0);
  }
}

TEST_CASE("a device that fails while it verifies fails the reads and not more") {
  for (const char* call : {"cuLaunchKernel", "cuFlushGPUDirectRDMAWrites", "cuMemsetD32Async"}) {
    CAPTURE(call);
    Fixture fixture;
    Stream consumer(fixture.device);
    const auto road = fixture.road(1);
    const auto blocks = fixture.destinations();
    const auto lease = road.direct->prepare(blocks);
    fixture.gpu.fail_call(call, 1, cuda::kInvalidValue);
    REQUIRE(fixture.read_all(road, consumer));
    size_t failed = 0;
    for (const auto& read : fixture.reads) {
      const Status status = fixture.owner.status_of(*read);
      if (!status.ok()) {
        ++failed;
        CHECK(status.code() == ErrorCode::kDevice);
        CHECK(mentions(status.message(), "CUDA_ERROR_INVALID_VALUE"));
      }
    }
    CHECK(failed > 0);
  }
}

}  // namespace
}  // namespace rdmaload::rdma
