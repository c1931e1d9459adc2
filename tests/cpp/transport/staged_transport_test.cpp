// The road to a GPU on the fake driver: right bytes whatever the order of things, and what happens when it
// breaks.
#include "transport/staged_transport.h"

#include <doctest/doctest.h>
#include <fcntl.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <thread>

#include "loader/load.h"
#include "support/fake_gpu.h"
#include "support/fake_transport.h"
#include "support/models.h"
#include "support/reads.h"
#include "support/temp_dir.h"
#include "transport/file_transport.h"

namespace rdmaload {
namespace {

using testing::AnsweringTransport;
using testing::deliver;
using testing::FakeGpu;
using testing::kSoon;
using testing::ManualTransport;
using testing::Model;

Deadline soon() { return Deadline::after(kSoon); }

// A model of small and large tensors in chunks, and loads of all of it into device memory of their own.
struct Fixture {
  explicit Fixture(uint64_t seed = 1, int ordinal = 0, bool checksums = true)
      : gpu(seed), device(gpu.device(ordinal)) {
    std::vector<int64_t> sizes;
    std::mt19937_64 random(seed);
    for (int i = 0; i < 60; ++i)
      sizes.push_back(static_cast<int64_t>(testing::pick(random, 0, i % 10 ? 900 : 90'000)));
    model.add_file(sizes, seed);
    model.add_blocks(200'000, 50'000, seed + 1);
    model.divide(kChunk, true, checksums);
    std::vector<uint32_t> selection(model.index.tensors().size());
    std::iota(selection.begin(), selection.end(), 0u);
    plan = std::make_shared<LoadPlan>(plan_into_tensors(model.index, model.layout, selection, {}));
  }

  StagingOptions options(size_t slots = 3) const {
    StagingOptions options;
    options.read_bytes = kChunk;
    options.staging_bytes = slots * (kChunk + 8192);
    return options;
  }
  // Reads that are answered rightly by threads.
  std::shared_ptr<Transport> source(int threads = 3) {
    return std::make_shared<AnsweringTransport>(threads, [this](Read& read) {
      ++reads;
      deliver(read, model.object(read.object));
      return Status();
    });
  }

  // Destinations of one load, in device memory.
  struct Target {
    Target(const Device& device, const LoadPlan& plan) {
      uint64_t total = 0;
      for (const uint64_t bytes : plan.region_bytes) {
        offsets.push_back(total);
        total += (bytes + 255) / 256 * 256;
      }
      buffer = std::make_unique<DeviceBuffer>(device, total + 256);
      for (size_t i = 0; i < plan.region_bytes.size(); ++i) {
        auto* data = reinterpret_cast<std::byte*>(buffer->data() + offsets[i]);
        regions.push_back({{data, plan.region_bytes[i]}, nullptr});
      }
    }
    std::unique_ptr<DeviceBuffer> buffer;
    std::vector<uint64_t> offsets;
    std::vector<Region> regions;
  };

  std::unique_ptr<Load> load(std::shared_ptr<Transport> transport, const Target& target) const {
    return std::make_unique<Load>(std::move(transport), std::make_shared<StoreLayout>(model.layout), plan,
                                  target.regions, LoadOptions{});
  }
  // Whether work of `consumer` that is enqueued now sees every byte of every tensor.
  bool sees(const Target& target, cuda::Stream consumer) const {
    const auto seen = gpu.read(device, target.buffer->data(), target.buffer->size(), consumer);
    for (const Placement& placement : plan->placements) {
      const auto bytes = model.bytes_of_tensor(placement.tensor);
      const auto from = seen.begin() + static_cast<ptrdiff_t>(target.offsets[placement.region]);
      if (!std::equal(bytes.begin(), bytes.end(), from)) return false;
    }
    return true;
  }

  static constexpr uint64_t kChunk = 8192;
  FakeGpu gpu;
  Device& device;
  Model model;
  std::shared_ptr<LoadPlan> plan;
  std::atomic<int> reads{0};
};

Status status_of(const Load& load) {
  try {
    load.throw_if_failed();
  } catch (const Error& error) {
    return Status::from(error);
  }
  return Status();
}

void check_all_given_back(const FakeCudaState& before, const FakeGpu& gpu) {
  PinnedPool::process().release();
  const FakeCudaState after = gpu.state();
  CHECK(after.registrations == before.registrations);
  CHECK(after.device_allocations == before.device_allocations);
  CHECK(after.host_allocations == before.host_allocations);
  CHECK(after.events == before.events);
  CHECK(after.streams == before.streams);
}

TEST_CASE("every byte arrives, with few buffers, by copies or by kernels, on either device") {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    CAPTURE(seed);
    Fixture fixture(seed, static_cast<int>(seed % 2));
    StagingOptions options = fixture.options(2 + seed % 3);
    options.scatter_pieces = seed % 4 < 2 ? 3 : SIZE_MAX;
    options.verify_device = seed % 3 == 0;
    const FakeCudaState before = fixture.gpu.state();
    {
      const Fixture::Target target(fixture.device, *fixture.plan);
      const Stream consumer(fixture.device);
      const auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, options);
      CHECK(staged->path() == "answering+staged-gpu");
      staged->follow(consumer.handle());
      const auto load = fixture.load(staged, target);
      load->start();
      REQUIRE(load->wait(soon()));
      CAPTURE(status_of(*load).message());
      REQUIRE(status_of(*load).ok());
      staged->lead(consumer.handle());
      CHECK(fixture.sees(target, consumer.handle()));
      CHECK(load->counters().copied_bytes == 0);
      CHECK(load->counters().verified_bytes == fixture.plan->read_bytes);
      const StagingCounters counters = staged->counters();
      CHECK(counters.copied_bytes >= fixture.plan->wanted_bytes);
      CHECK((counters.scattered_pieces > 0) == (options.scatter_pieces == 3 || options.verify_device));
      CHECK(counters.verified_bytes == (options.verify_device ? fixture.plan->read_bytes : 0));
      CHECK(fixture.gpu.state().host_bytes - before.host_bytes == counters.staging_bytes);
      CHECK(counters.staging_bytes <= std::max(options.staging_bytes, 2 * (Fixture::kChunk + 8192)));
    }
    check_all_given_back(before, fixture.gpu);
  }
}

TEST_CASE("what a consumer still does with memory does not come after the load's writes into it") {
  Fixture fixture;
  const Fixture::Target target(fixture.device, *fixture.plan);
  const Stream consumer(fixture.device);
  const auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, fixture.options(4));
  {  // torch gave the memory out again while its last user's work is still queued
    const DeviceGuard guard(fixture.device);
    for (int i = 0; i < 30; ++i) {
      fixture.gpu.driver.check(
          "fill", fixture.gpu.driver.fill_words(target.buffer->data(), 0xdeadbeef, target.buffer->size() / 4,
                                                consumer.handle()));
    }
  }
  staged->follow(consumer.handle());
  const auto load = fixture.load(staged, target);
  load->start();
  REQUIRE(load->wait(soon()));
  staged->lead(consumer.handle());
  CHECK(fixture.sees(target, consumer.handle()));
}

TEST_CASE("what was enqueued is done before what a consumer enqueues after lead()") {
  Fixture fixture;
  const auto bytes = testing::random_bytes(50'000, 3);
  const PinnedBuffer pinned(fixture.device, bytes.size());
  std::memcpy(pinned.span().data(), bytes.data(), bytes.size());
  const DeviceBuffer target(fixture.device, bytes.size());
  const Stream consumer(fixture.device);
  StagedTransport staged(fixture.source(), fixture.device, fixture.options());
  {  // late work of the copy stream, which no host has waited for
    const DeviceGuard guard(fixture.device);
    for (int i = 0; i < 30; ++i) {
      fixture.gpu.driver.check("fill", fixture.gpu.driver.fill_words(target.data(), 0xdeadbeef,
                                                                     target.size() / 4, staged.stream()));
    }
    fixture.gpu.driver.check("copy", fixture.gpu.driver.copy_to_device(target.data(), pinned.span().data(),
                                                                       bytes.size(), staged.stream()));
  }
  staged.lead(consumer.handle());
  CHECK(fixture.gpu.read(fixture.device, target.data(), bytes.size(), consumer.handle()) == bytes);
}

TEST_CASE("a load leaves a CUDA graph that is captured meanwhile whole, and does not become a part of one") {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    CAPTURE(seed);
    Fixture fixture(seed);
    const Fixture::Target target(fixture.device, *fixture.plan);
    const Stream consumer(fixture.device), captured(fixture.device);
    StagingOptions options = fixture.options(3);
    options.scatter_pieces = 3;
    options.verify_device = seed % 2 == 0;
    fixture.gpu.begin_capture(captured.handle());
    {
      const auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, options);
      CHECK_THROWS_WITH_AS(staged->follow(captured.handle()), doctest::Contains("captures a CUDA graph"),
                           Error);
      staged->follow(consumer.handle());
      const auto load = fixture.load(staged, target);
      load->start();
      REQUIRE(load->wait(soon()));
      CAPTURE(status_of(*load).message());
      CHECK(status_of(*load).ok());
      staged->lead(consumer.handle());
      CHECK(fixture.sees(target, consumer.handle()));
    }
    PinnedPool::process().release();
    CHECK(fixture.gpu.end_capture());
  }
}

TEST_CASE("a load is not over before its copies are") {
  Fixture fixture;
  const Fixture::Target target(fixture.device, *fixture.plan);
  const auto staged =
      std::make_shared<StagedTransport>(fixture.source(), fixture.device, fixture.options(200));
  fixture.gpu.hold(true);
  const auto load = fixture.load(staged, target);
  load->start();
  CHECK_FALSE(load->wait(Deadline::after(std::chrono::milliseconds(100))));
  CHECK(load->counters().done_bytes == 0);
  fixture.gpu.hold(false);
  REQUIRE(load->wait(soon()));
  const Stream unordered(fixture.device);  // no lead(): the host has waited for everything
  CHECK(fixture.sees(target, unordered.handle()));
}

TEST_CASE("a full ring stops the source, and loads share it in their order") {
  Fixture fixture;
  const Fixture::Target one(fixture.device, *fixture.plan), two(fixture.device, *fixture.plan);
  const auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, fixture.options(3));
  const size_t slots = staged->counters().staging_bytes / (Fixture::kChunk + 8192);
  fixture.gpu.hold(true);
  const auto first = fixture.load(staged, one), second = fixture.load(staged, two);
  first->start();
  second->start();
  CHECK_FALSE(first->wait(Deadline::after(std::chrono::milliseconds(100))));
  CHECK(fixture.reads.load() == static_cast<int>(slots));
  fixture.gpu.hold(false);
  REQUIRE(first->wait(soon()));
  REQUIRE(second->wait(soon()));
  CHECK(first->counters().elapsed <= second->counters().elapsed);
  CHECK(fixture.sees(one, fixture.device.copy_stream()));
  CHECK(fixture.sees(two, fixture.device.copy_stream()));
}

TEST_CASE("a cancelled load ends only when nothing is written any more") {
  Fixture fixture;
  const FakeCudaState before = fixture.gpu.state();
  auto target = std::make_unique<Fixture::Target>(fixture.device, *fixture.plan);
  auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, fixture.options(5));
  fixture.gpu.hold(true);
  auto load = fixture.load(staged, *target);
  load->start();
  while (fixture.reads.load() < 5) std::this_thread::yield();
  load->cancel();
  CHECK_FALSE(load->wait(
      Deadline::after(std::chrono::milliseconds(100))));  // copies that are queued cannot be called back
  fixture.gpu.hold(false);
  REQUIRE(load->wait(soon()));
  target.reset();  // a copy into it now would break the context
  load.reset();
  staged.reset();
  const DeviceGuard guard(fixture.device);
  CHECK(fixture.gpu.driver.stream_synchronize(fixture.device.copy_stream()) == cuda::kSuccess);
  check_all_given_back(before, fixture.gpu);
}

TEST_CASE(
    "whichever driver call fails, the load ends with that error, nothing is left, and the next load works") {
  const char* const calls[] = {"cuMemcpyHtoDAsync_v2", "cuEventRecord",  "cuEventSynchronize",
                               "cuCtxPushCurrent_v2",  "cuLaunchKernel", "cuMemcpyDtoHAsync_v2",
                               "cuMemsetD32Async",     "cuEventCreate"};
  for (const char* call : calls) {
    for (const int nth : {1, 2, 7}) {
      CAPTURE(call);
      CAPTURE(nth);
      Fixture fixture(static_cast<uint64_t>(nth));
      StagingOptions options = fixture.options(4);
      options.scatter_pieces = 3;
      options.verify_device = nth == 7;
      const FakeCudaState before = fixture.gpu.state();
      for (const bool failing : {true, false}) {
        const Fixture::Target target(fixture.device, *fixture.plan);
        if (failing) fixture.gpu.fail_call(call, nth, cuda::kOutOfMemory);
        Status status;
        try {
          const auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, options);
          const auto load = fixture.load(staged, target);
          load->start();
          REQUIRE(load->wait(soon()));
          status = status_of(*load);
          fixture.gpu.fail_call(call, 0, 0);  // it may not have come to the nth call
          if (status.ok()) CHECK(fixture.sees(target, fixture.device.copy_stream()));
        } catch (const Error& error) {
          status = Status::from(error);
        }
        if (!status.ok()) {
          CHECK(failing);
          CHECK(status.code() == ErrorCode::kDevice);
          CHECK(status.message().find("CUDA_ERROR_OUT_OF_MEMORY") != std::string::npos);
        }
        fixture.gpu.fail_call(call, 0, 0);
      }
      check_all_given_back(before, fixture.gpu);
    }
  }
}

TEST_CASE("a copy that breaks the context is the load's error") {
  Fixture fixture;
  const Fixture::Target target(fixture.device, *fixture.plan);
  {
    const auto staged =
        std::make_shared<StagedTransport>(fixture.source(), fixture.device, fixture.options());
    fixture.gpu.fail_work(5, cuda::kIllegalAddress);
    const auto load = fixture.load(staged, target);
    load->start();
    REQUIRE(load->wait(soon()));
    CHECK(status_of(*load).code() == ErrorCode::kDevice);
    CHECK(status_of(*load).message().find("CUDA_ERROR_ILLEGAL_ADDRESS") != std::string::npos);
    CHECK(status_of(*load).message().find("start another one") != std::string::npos);
  }
  {  // the other device is as ever, and this one refuses at once
    Device& other = fixture.gpu.device(1);
    const Fixture::Target elsewhere(other, *fixture.plan);
    const auto staged = std::make_shared<StagedTransport>(fixture.source(), other, fixture.options());
    const auto load = fixture.load(staged, elsewhere);
    load->start();
    REQUIRE(load->wait(soon()));
    CHECK(status_of(*load).ok());
    CHECK_THROWS_WITH_AS(StagedTransport(fixture.source(), fixture.device, fixture.options()),
                         doctest::Contains("CUDA_ERROR_ILLEGAL_ADDRESS"), Error);
  }
}

TEST_CASE("a bit that flips on the way to the device is found where that is asked for, and read again") {
  for (const bool verify : {true, false}) {
    Fixture fixture;
    const Fixture::Target target(fixture.device, *fixture.plan);
    StagingOptions options = fixture.options();
    options.verify_device = verify;
    const auto staged = std::make_shared<StagedTransport>(fixture.source(1), fixture.device, options);
    fixture.gpu.corrupt_copy(1);
    const auto load = fixture.load(staged, target);
    load->start();
    REQUIRE(load->wait(soon()));
    CAPTURE(status_of(*load).message());
    CHECK(status_of(*load).ok());
    CHECK(load->counters().retries == (verify ? 1 : 0));
    CHECK(fixture.sees(target, fixture.device.copy_stream()) == verify);
  }
}

TEST_CASE("without stored checksums the way to the device is checked against what was received") {
  for (const bool verify : {true, false}) {
    Fixture fixture(3, 0, false);
    const Fixture::Target target(fixture.device, *fixture.plan);
    StagingOptions options = fixture.options();
    options.verify_device = verify;
    const auto staged = std::make_shared<StagedTransport>(fixture.source(1), fixture.device, options);
    fixture.gpu.corrupt_copy(1);
    const auto load = fixture.load(staged, target);
    load->start();
    REQUIRE(load->wait(soon()));
    CHECK(status_of(*load).ok());
    CHECK(load->counters().retries == (verify ? 1 : 0));
    CHECK(fixture.sees(target, fixture.device.copy_stream()) == verify);
    CHECK(staged->counters().verified_bytes == (verify ? fixture.plan->read_bytes : 0));
    CHECK(load->counters().verified_bytes == 0);  // the store vouches for nothing
  }
}

TEST_CASE("without room for blocks on the device, pieces are copied one by one") {
  Fixture fixture;
  const Fixture::Target target(fixture.device, *fixture.plan);
  StagingOptions options = fixture.options(4);
  options.scatter_pieces = 2;
  const auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, options);
  fixture.gpu.set_memory(fixture.gpu.state().device_bytes + 1000);
  const auto load = fixture.load(staged, target);
  load->start();
  REQUIRE(load->wait(soon()));
  CHECK(status_of(*load).ok());
  CHECK(staged->counters().scattered_pieces == 0);
  CHECK(fixture.sees(target, fixture.device.copy_stream()));
}

TEST_CASE("the trace shows reads that are received while others are copied") {
  Fixture fixture;
  const Fixture::Target target(fixture.device, *fixture.plan);
  StagingOptions options = fixture.options(6);
  options.trace = true;
  const auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, options);
  const auto load = fixture.load(staged, target);
  load->start();
  REQUIRE(load->wait(soon()));
  const auto trace = staged->trace();
  CHECK(trace.size() == fixture.plan->reads.size());
  bool overlaps = false;
  uint64_t bytes = 0;
  for (size_t i = 0; i < trace.size(); ++i) {
    CHECK(trace[i].begun <= trace[i].received);
    CHECK(trace[i].received <= trace[i].copied);
    bytes += trace[i].bytes;
    for (size_t j = 0; j < trace.size(); ++j) {
      overlaps = overlaps ||
                 (i != j && trace[j].received > trace[i].received && trace[j].received < trace[i].copied);
    }
  }
  CHECK(bytes == fixture.plan->read_bytes);
  CHECK(overlaps);
}

TEST_CASE("a read that is longer than a buffer is refused, not cut") {
  Fixture fixture;
  StagingOptions options = fixture.options();
  options.read_bytes = Fixture::kChunk - 1;
  const Fixture::Target target(fixture.device, *fixture.plan);
  const auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, options);
  const auto load = fixture.load(staged, target);
  load->start();
  REQUIRE(load->wait(soon()));
  CHECK(status_of(*load).code() == ErrorCode::kInvalid);
}

TEST_CASE("reads lie in their buffers as in the file, so that a disk writes there by itself") {
  FakeGpu gpu;
  testing::TempDir directory;
  const auto bytes = testing::random_bytes(300'000, 7);
  directory.write("file", bytes);
  FileOptions file_options;  // of a disk that wants more of an address than safetensors gives
  file_options.smallest_direct_bytes = 1000;
  file_options.calls.open = [](const char* path, int flags) { return ::open(path, flags & ~O_DIRECT); };
  file_options.calls.direct_alignment = [](int) { return DirectAlignment{4096, 4096}; };
  file_options.calls.cached_fraction = [](int, uint64_t) { return std::optional<double>(0); };
  const auto files = std::make_shared<FileTransport>(directory.path().string(), file_options);
  StagingOptions options;
  options.read_bytes = 100'000;
  StagedTransport staged(files, gpu.device(), options);
  const DeviceBuffer target(gpu.device(), 100'000);
  testing::RecordingOwner owner;
  testing::TestRead read("file", 100'000, owner);
  read.read.offset = 12'347;
  read.read.object_bytes = bytes.size();
  read.read.segments.assign(1, {reinterpret_cast<std::byte*>(target.data()), 100'000});
  staged.submit(read.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.completions()[0].status.ok());
  CHECK(staged.path() == "file-direct+staged-gpu");
  CHECK(read.read.copied_bytes <= 2 * 4096);  // the edges of the range, no more
  const auto seen = gpu.read(gpu.device(), target.data(), 100'000, gpu.device().copy_stream());
  CHECK(std::equal(seen.begin(), seen.end(), bytes.begin() + 12'347));
}

TEST_CASE("without enough device memory for a block none is used, and verification says what it needs") {
  Fixture fixture;
  const Fixture::Target target(fixture.device, *fixture.plan);
  StagingOptions options = fixture.options(4);
  options.scatter_pieces = 2;
  options.block_bytes = 10'000;
  const auto staged = std::make_shared<StagedTransport>(fixture.source(), fixture.device, options);
  CHECK(staged->block_bytes() == 0);
  const FakeCudaState before = fixture.gpu.state();
  const auto load = fixture.load(staged, target);
  load->start();
  REQUIRE(load->wait(soon()));
  CHECK(fixture.sees(target, fixture.device.copy_stream()));
  CHECK(fixture.gpu.state().device_bytes == before.device_bytes);
  options.verify_device = true;
  CHECK_THROWS_WITH_AS(StagedTransport(fixture.source(), fixture.device, options),
                       doctest::Contains("raise device_extra_bytes"), Error);
}

TEST_CASE("without kernels, verification copies back what it copied to the device") {
  for (const bool flips : {false, true}) {
    CAPTURE(flips);
    Fixture fixture(3, 0, false);
    fixture.gpu.set_module_result(cuda::kNoBinaryForGpu);
    Device device(fixture.gpu.driver, 0);
    const Fixture::Target target(device, *fixture.plan);
    StagingOptions options = fixture.options();
    options.verify_device = true;
    const auto staged = std::make_shared<StagedTransport>(fixture.source(1), device, options);
    CHECK(staged->fallback_reason().find("CUDA_ERROR_NO_BINARY_FOR_GPU") != std::string::npos);
    if (flips) fixture.gpu.corrupt_copy(1);
    const auto load = fixture.load(staged, target);
    load->start();
    REQUIRE(load->wait(soon()));
    CHECK(status_of(*load).ok());
    CHECK(load->counters().retries == (flips ? 1 : 0));
    CHECK(fixture.sees(target, device.copy_stream()));
    CHECK(staged->counters().verified_bytes == fixture.plan->read_bytes);
    CHECK(staged->counters().device_bytes == 0);
  }
}

TEST_CASE("where a GPU cannot run the kernels, pieces are copied one by one, and the reason is said") {
  Fixture fixture;
  fixture.gpu.set_module_result(cuda::kNoBinaryForGpu);
  Device device(fixture.gpu.driver, 0);
  const Fixture::Target target(device, *fixture.plan);
  for (const size_t scatter_pieces : {size_t{3}, SIZE_MAX}) {
    StagingOptions options = fixture.options();
    options.scatter_pieces = scatter_pieces;
    const auto staged = std::make_shared<StagedTransport>(fixture.source(), device, options);
    CHECK(staged->fallback_reason() == "");  // nothing was given up yet
    const auto load = fixture.load(staged, target);
    load->start();
    REQUIRE(load->wait(soon()));
    CHECK(status_of(*load).ok());
    CHECK(fixture.sees(target, device.copy_stream()));
    CHECK(staged->counters().scattered_pieces == 0);
    CHECK((staged->fallback_reason().find("CUDA_ERROR_NO_BINARY_FOR_GPU") != std::string::npos) ==
          (scatter_pieces == 3));
  }
}

TEST_CASE("destroying it completes what is outstanding") {
  Fixture fixture;
  auto manual = std::make_shared<ManualTransport>();
  auto staged = std::make_shared<StagedTransport>(manual, fixture.device, fixture.options(2));
  testing::RecordingOwner owner;
  std::vector<std::unique_ptr<testing::TestRead>> reads;
  for (int i = 0; i < 6; ++i) {
    reads.push_back(std::make_unique<testing::TestRead>("object", 100, owner));
    staged->submit(reads.back()->read);
  }
  CHECK(manual->waiting() == staged->counters().staging_bytes / (Fixture::kChunk + 8192));
  staged.reset();
  CHECK(owner.count() == 6);
  for (const auto& completion : owner.completions()) CHECK(completion.status.code() == ErrorCode::kCancelled);
}

}  // namespace
}  // namespace rdmaload
