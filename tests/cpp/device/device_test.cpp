// The device layer on the fake driver: errors, order, lifetimes, GPUDirect's contract.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include "core/crc32c.h"
#include "core/deadline.h"
#include "device/gpudirect.h"
#include "device/kernels.h"
#include "device/pinned_pool.h"
#include "support/bytes.h"
#include "support/fake_gpu.h"

namespace rdmaload {
namespace {

using testing::FakeGpu;
using testing::random_bytes;

// The message of the Error that `what` throws, and its code.
template <typename What>
std::pair<ErrorCode, std::string> error_of(What what) {
  try {
    what();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  return {ErrorCode::kInvalid, "nothing was thrown"};
}

TEST_CASE("a driver that is not there is named, with what to do") {
  const auto [code, message] = error_of([] { Driver("libno-such-cuda.so.1", {}); });
  CHECK(code == ErrorCode::kNotSupported);
  CHECK(message.find("libno-such-cuda.so.1") != std::string::npos);
}

TEST_CASE("a library that is no CUDA driver is refused") {
  const auto [code, message] = error_of([] { Driver("libc.so.6", {}); });
  CHECK(code == ErrorCode::kNotSupported);
  CHECK(message.find("cuInit") != std::string::npos);
}

TEST_CASE("one process uses one driver") {
  const FakeGpu gpu;
  CHECK(error_of([] { Driver::open_process("libother.so", {}); }).first == ErrorCode::kInvalid);
  CHECK(&Driver::process() == &gpu.driver);
}

TEST_CASE("devices are found, others refused") {
  const FakeGpu gpu;
  CHECK(gpu.device(0).name() == "Fake GPU 0");
  CHECK(gpu.device(1).name() == "Fake GPU 1");
  CHECK(&gpu.device(1) == &gpu.device(1));
  const auto [code, message] = error_of([] { Device::get(2); });
  CHECK(code == ErrorCode::kDevice);
  CHECK(message == "there is no CUDA device 2: the driver sees 2");
}

TEST_CASE("an error carries the driver's own name for it") {
  const FakeGpu gpu;
  CHECK(gpu.driver.describe("cuSomething", cuda::kInvalidValue) ==
        "cuSomething: CUDA_ERROR_INVALID_VALUE (1): invalid argument");
  CHECK(gpu.driver.describe("cuSomething", 12345).find("12345") != std::string::npos);
  gpu.set_memory(1 << 20);
  const auto [code, message] = error_of([&] { DeviceBuffer(gpu.device(), 2 << 20); });
  CHECK(code == ErrorCode::kDevice);
  CHECK(message ==
        "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory; 2097152 bytes were asked for on cuda:0, "
        "which has "
        "1048576 free");
}

TEST_CASE("an error that stays with the context says that this process is done with the device") {
  const FakeGpu gpu;
  for (const cuda::Result lasting :
       {cuda::kIllegalAddress, cuda::kHardwareStackError, cuda::kContextLastError}) {
    CHECK(gpu.driver.describe("call", lasting).find("start another one") != std::string::npos);
  }
  for (const cuda::Result passing :
       {cuda::kOutOfMemory, cuda::kHostMemoryNotRegistered, cuda::kNotSupported}) {
    CHECK(gpu.driver.describe("call", passing).find("start another one") == std::string::npos);
  }
}

TEST_CASE("whatever this layer calls leaves a CUDA graph that is captured elsewhere whole") {
  const FakeGpu gpu;
  const uint64_t before = gpu.state().host_bytes;
  const Stream captured(gpu.device());
  int mode = cuda::kCaptureModeGlobal;
  gpu.begin_capture(captured.handle());
  {
    const DeviceBuffer buffer(gpu.device(), 4096);
    const Stream one(gpu.device()), two(gpu.device());
    const Event event(gpu.device());
    order_streams(gpu.device(), one.handle(), two.handle());
    Device fresh(gpu.driver, 0);
    CHECK(fresh.kernels() != nullptr);
    fresh.memory_info();
    const DmaBuf exported = export_dmabuf(gpu.device(), buffer.data(), 4096);
    set_sync_memops(gpu.device(), buffer.data());
    flush_gpudirect(gpu.device());
    gpu.fail_call("cuMemHostRegister_v2", 1, cuda::kNotSupported);
    const PinnedBuffer allocated(gpu.device(), 4096);
    // What a load leaves is given up by a thread of the pool, seconds later.
    PinnedPool pool(10'000, std::chrono::milliseconds(1));
    pool.take(gpu.device(), 100).reset();
    const Deadline soon = Deadline::after(std::chrono::seconds(60));
    while (pool.kept_bytes() > 0 && !soon.passed()) std::this_thread::yield();
    CHECK(pool.kept_bytes() == 0);
  }
  gpu.driver.check("exchange", gpu.driver.exchange_capture_mode(&mode));
  CHECK(mode == cuda::kCaptureModeGlobal);  // each thread is left in the mode that it had
  gpu.driver.check("exchange", gpu.driver.exchange_capture_mode(&mode));
  CHECK(gpu.end_capture());
  CHECK(gpu.state().host_bytes == before);

  gpu.begin_capture(captured.handle());  // and the fake does notice
  size_t free_bytes = 0, total_bytes = 0;
  gpu.driver.check("push", gpu.driver.context_push(gpu.device().context()));
  CHECK(gpu.driver.memory_info(&free_bytes, &total_bytes) == cuda::kStreamCaptureUnsupported);
  cuda::Context popped = nullptr;
  gpu.driver.check("pop", gpu.driver.context_pop(&popped));
  CHECK_FALSE(gpu.end_capture());
}

TEST_CASE("a stream that is being captured is not waited for, nor made to wait") {
  const FakeGpu gpu;
  const Stream captured(gpu.device()), other(gpu.device());
  gpu.begin_capture(captured.handle());
  for (const bool first : {true, false}) {
    const auto [code, message] = error_of([&] {
      order_streams(gpu.device(), first ? captured.handle() : other.handle(),
                    first ? other.handle() : captured.handle());
    });
    CHECK(code == ErrorCode::kDevice);
    CHECK(message.find("captures a CUDA graph") != std::string::npos);
  }
  CHECK(gpu.end_capture());
}

TEST_CASE("a GPU below what the kernels were built for has none, and the reason names it") {
  const FakeGpu gpu;
  gpu.set_attribute(cuda::kAttributeComputeMajor, 6);
  gpu.set_attribute(cuda::kAttributeComputeMinor, 1);
  for (const cuda::Result refusal : {cuda::kNoBinaryForGpu, cuda::kUnsupportedPtxVersion}) {
    gpu.set_module_result(refusal);
    Device device(gpu.driver, 0);
    std::string why;
    CHECK(device.kernels(&why) == nullptr);
    CHECK(why.find("Fake GPU 0, compute capability 6.1, driver of CUDA 13.0") != std::string::npos);
    CHECK(why.find("(" + std::to_string(refusal) + ")") != std::string::npos);
    gpu.set_module_result(0);
    CHECK(device.kernels() == nullptr);  // not asked again
  }
  gpu.set_module_result(cuda::kOutOfMemory);
  Device device(gpu.driver, 0);
  CHECK(device.kernels() == nullptr);
  gpu.set_module_result(0);
  CHECK(device.kernels() != nullptr);  // this may work another time
}

TEST_CASE("a guard leaves the thread as it was, also when something throws") {
  const FakeGpu gpu;
  CHECK(gpu.state().context_depth == 0);
  {
    const DeviceGuard outer(gpu.device(0));
    CHECK(gpu.state().context_depth == 1);
    gpu.fail_call("cuMemAlloc_v2", 1, cuda::kOutOfMemory);
    CHECK(error_of([&] { DeviceBuffer(gpu.device(1), 64); }).first == ErrorCode::kDevice);
    CHECK(gpu.state().context_depth == 1);
  }
  CHECK(gpu.state().context_depth == 0);
}

TEST_CASE("resources are given back, moved ones once") {
  const FakeGpu gpu;
  const FakeCudaState before = gpu.state();
  {
    Stream stream(gpu.device(1));
    const Stream moved(std::move(stream));
    Event event(gpu.device(1));
    const Event moved_event(std::move(event));
    const PinnedBuffer pinned(gpu.device(), 4096);
    const DeviceBuffer device(gpu.device(), 4096);
    std::vector<std::byte> memory(8192);
    const HostRegistration registration(gpu.device(), memory);
    CHECK(error_of([&] {
            HostRegistration(gpu.device(), memory);
          }).second.find("CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED") != std::string::npos);
    const FakeCudaState during = gpu.state();
    CHECK(during.streams == before.streams + 1);
    CHECK(during.events == before.events + 1);
    CHECK(during.host_bytes == before.host_bytes + 4096 + 8192);
    CHECK(during.device_bytes == before.device_bytes + 4096);
    CHECK(during.registrations == before.registrations + 2);
    CHECK(during.host_allocations == before.host_allocations);
  }
  const FakeCudaState after = gpu.state();
  CHECK(after.streams == before.streams);
  CHECK(after.events == before.events);
  CHECK(after.host_allocations == before.host_allocations);
  CHECK(after.device_allocations == before.device_allocations);
  CHECK(after.registrations == before.registrations);
}

TEST_CASE("page-locked memory goes from one load to the next, bounded, and is freed when nobody comes") {
  const FakeGpu gpu;
  const uint64_t before = gpu.state().host_bytes;
  {
    PinnedPool pool(20'000, std::chrono::hours(1));
    auto first = pool.take(gpu.device(0), 8000);
    const std::byte* const memory = first->span().data();
    CHECK(pool.kept_bytes() == 0);
    first.reset();
    CHECK(pool.kept_bytes() == 8000);
    CHECK(pool.take(gpu.device(1), 8000)->span().data() != memory);  // each device its own
    auto again = pool.take(gpu.device(0), 4000);
    CHECK(again->span().data() == memory);
    CHECK(again->span().size() == 8000);
    CHECK(pool.take(gpu.device(0), 100)->span().size() == 100);  // it would have kept 8000 for 100
    again.reset();
    CHECK(pool.kept_bytes() <= 20'000);
    CHECK(gpu.state().host_bytes - before == pool.kept_bytes());
    pool.take(gpu.device(0), 30'000).reset();  // more than is kept
    CHECK(gpu.state().host_bytes - before == pool.kept_bytes());
    CHECK(pool.kept_bytes() <= 20'000);
    pool.take(gpu.device(0), 5000).reset();
    pool.release();
    CHECK(gpu.state().host_bytes == before);
    pool.take(gpu.device(0), 5000).reset();  // usable after that
    CHECK(pool.kept_bytes() == 5000);
  }
  CHECK(gpu.state().host_bytes == before);
  PinnedPool impatient(10'000, std::chrono::milliseconds(1));
  for (int i = 0; i < 3; ++i) {
    impatient.take(gpu.device(0), 100).reset();
    const Deadline soon = Deadline::after(std::chrono::seconds(60));
    while (gpu.state().host_bytes != before && !soon.passed()) std::this_thread::yield();
    CHECK(gpu.state().host_bytes == before);
  }
}

TEST_CASE("where existing memory cannot be registered, the driver allocates") {
  const FakeGpu gpu;
  const FakeCudaState before = gpu.state();
  {
    gpu.fail_call("cuMemHostRegister_v2", 1, cuda::kNotSupported);
    const PinnedBuffer buffer(gpu.device(), 5000);
    CHECK(buffer.span().size() == 5000);
    CHECK(gpu.state().registrations == before.registrations);
    CHECK(gpu.state().host_allocations == before.host_allocations + 1);
  }
  CHECK(gpu.state().host_allocations == before.host_allocations);
  gpu.fail_call("cuMemHostRegister_v2", 1, cuda::kNotSupported);
  gpu.fail_call("cuMemHostAlloc", 1, cuda::kOutOfMemory);
  const auto [code, message] = error_of([&] { PinnedBuffer(gpu.device(), 5000); });
  CHECK(code == ErrorCode::kDevice);
  CHECK(message.find("lower staging_bytes") != std::string::npos);
}

TEST_CASE("one stream waits for another, and a host for an event") {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const FakeGpu gpu(seed);
    Device& device = gpu.device(1);
    const auto bytes = random_bytes(100'000, seed);
    const PinnedBuffer pinned(device, bytes.size());
    std::memcpy(pinned.span().data(), bytes.data(), bytes.size());
    const DeviceBuffer target(device, bytes.size());
    const Stream copies(device), consumer(device);
    {
      const DeviceGuard guard(device);
      gpu.driver.check("copy", gpu.driver.copy_to_device(target.data(), pinned.span().data(), bytes.size(),
                                                         copies.handle()));
    }
    order_streams(device, copies.handle(), consumer.handle());
    CHECK(gpu.read(device, target.data(), bytes.size(), consumer.handle()) == bytes);
  }
}

TEST_CASE("the fake shows a missing wait: another stream sees old bytes") {
  const FakeGpu gpu;
  Device& device = gpu.device();
  const auto bytes = random_bytes(1000, 1);
  const PinnedBuffer pinned(device, bytes.size());
  std::memcpy(pinned.span().data(), bytes.data(), bytes.size());
  const DeviceBuffer target(device, bytes.size());
  const Stream copies(device), consumer(device);
  const Event never_held(device);
  gpu.hold(true);
  {
    const DeviceGuard guard(device);
    // The copy waits behind an event of the held consumer stream, so the consumer certainly comes first.
    std::vector<std::byte> seen(bytes.size());
    gpu.driver.check("read",
                     gpu.driver.copy_to_host(seen.data(), target.data(), seen.size(), consumer.handle()));
    never_held.record(consumer.handle()).throw_if_failed();
    never_held.make_wait(copies.handle()).throw_if_failed();
    gpu.driver.check("copy", gpu.driver.copy_to_device(target.data(), pinned.span().data(), bytes.size(),
                                                       copies.handle()));
    CHECK_FALSE(never_held.fired());
    gpu.hold(false);
    gpu.driver.check("sync", gpu.driver.stream_synchronize(consumer.handle()));
    gpu.driver.check("sync", gpu.driver.stream_synchronize(copies.handle()));
    CHECK(never_held.fired());
    CHECK(seen != bytes);
  }
  CHECK(gpu.read(device, target.data(), bytes.size(), copies.handle()) == bytes);
}

TEST_CASE("work on freed memory breaks the context, as on a GPU") {
  const FakeGpu gpu;
  Device& device = gpu.device();
  const PinnedBuffer pinned(device, 64);
  auto freed = std::make_unique<DeviceBuffer>(device, 64);
  const cuda::Pointer pointer = freed->data();
  freed.reset();
  const Stream stream(device);
  const DeviceGuard guard(device);
  gpu.driver.check("copy", gpu.driver.copy_to_device(pointer, pinned.span().data(), 64, stream.handle()));
  CHECK(gpu.driver.stream_synchronize(stream.handle()) == cuda::kIllegalAddress);
}

TEST_CASE("a forked process is told that CUDA does not survive that") {
  const FakeGpu gpu;
  const uint64_t before = gpu.state().host_bytes;
  PinnedPool::process().take(gpu.device(), 5000).reset();  // kept
  auto taken = PinnedPool::process().take(gpu.device(1), 5000);
  int result[2];
  REQUIRE(pipe(result) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const auto [code, message] = error_of([&] { DeviceBuffer(gpu.device(), 64); });
    bool good = code == ErrorCode::kDevice && message.find("spawn") != std::string::npos;
    // Page-locked memory that was there before: it cannot be taken, and giving it back or up touches nothing.
    good =
        good && error_of([] { PinnedPool::process().take(Device::get(0), 64); }).first == ErrorCode::kDevice;
    taken.reset();
    PinnedPool::process().release();
    const char answer = good ? 'y' : 'n';
    _exit(write(result[1], &answer, 1) == 1 ? 0 : 1);
  }
  char answer = 0;
  CHECK(read(result[0], &answer, 1) == 1);
  CHECK(answer == 'y');
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  close(result[0]);
  close(result[1]);
  taken.reset();
  PinnedPool::process().release();  // the parent's are as before
  CHECK(gpu.state().host_bytes == before);
}

TEST_CASE("an exported dma-buf covers the range in whole pages") {
  const FakeGpu gpu;
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const DeviceBuffer buffer(gpu.device(), 3 * page + 17);
  const DmaBuf exported = export_dmabuf(gpu.device(), buffer.data() + page + 5, page + 100);
  CHECK(exported.offset() == 5);
  CHECK(exported.bytes() == 2 * page);
  struct stat info{};
  REQUIRE(fstat(exported.fd(), &info) == 0);
  CHECK(static_cast<uint64_t>(info.st_size) == 2 * page);
  const DmaBuf whole = export_dmabuf(gpu.device(), buffer.data(), buffer.size());
  CHECK(whole.offset() == 0);
  CHECK(whole.bytes() == 4 * page);
  CHECK(error_of([&] { export_dmabuf(gpu.device(), buffer.data(), 0); }).first == ErrorCode::kInvalid);
  CHECK(error_of([&] { export_dmabuf(gpu.device(), buffer.data(), UINT64_MAX - 5); }).first ==
        ErrorCode::kInvalid);
  CHECK(error_of([&] { export_dmabuf(gpu.device(), buffer.data() + 64 * page, page); }).first ==
        ErrorCode::kDevice);
  gpu.set_attribute(cuda::kAttributeDmaBufSupported, 0);
  CHECK(error_of([&] { export_dmabuf(gpu.device(), buffer.data(), 1); }).first == ErrorCode::kNotSupported);
}

TEST_CASE("GPUDirect writes are flushed where the device needs it") {
  const FakeGpu gpu;
  const DeviceBuffer buffer(gpu.device(), 64);
  set_sync_memops(gpu.device(), buffer.data());
  CHECK(error_of([&] { set_sync_memops(gpu.device(), 64); }).first == ErrorCode::kDevice);
  gpu.fail_call("cuFlushGPUDirectRDMAWrites", 1, cuda::kInvalidValue);
  CHECK(error_of([&] { flush_gpudirect(gpu.device()); }).first == ErrorCode::kDevice);  // so it is called
  flush_gpudirect(gpu.device());
  gpu.set_attribute(cuda::kAttributeFlushWritesOptions, 0);
  CHECK(error_of([&] { flush_gpudirect(gpu.device()); }).first == ErrorCode::kNotSupported);
  gpu.set_attribute(cuda::kAttributeWritesOrdering, cuda::kOrderingOwner);
  flush_gpudirect(gpu.device());
}

TEST_CASE("kernels are launched with their arguments") {
  const FakeGpu gpu;
  Device& device = gpu.device();
  const Kernels* kernels = device.kernels();
  REQUIRE(kernels != nullptr);
  const auto bytes = random_bytes(10'000, 3);
  const PinnedBuffer pinned(device, bytes.size());
  std::memcpy(pinned.span().data(), bytes.data(), bytes.size());
  const DeviceBuffer block(device, bytes.size()), target(device, bytes.size()), table(device, 1024),
      crc(device, 4);
  const ScatterPiece pieces[] = {{1, target.data() + 100, 33}, {5000, target.data(), 7}};
  const Stream stream(device);
  const auto handle = stream.handle();
  {
    const DeviceGuard guard(device);
    gpu.driver.check("copy",
                     gpu.driver.copy_to_device(block.data(), pinned.span().data(), bytes.size(), handle));
    gpu.driver.check("table", gpu.driver.copy_to_device(table.data(), pieces, sizeof(pieces), handle));
    gpu.driver.check("zero", gpu.driver.fill_words(crc.data(), 0, 1, handle));
    kernels->scatter(block.data(), table.data(), 2, handle).throw_if_failed();
    kernels->crc32c(block.data(), bytes.size(), crc.data(), handle).throw_if_failed();
  }
  const auto scattered = gpu.read(device, target.data(), bytes.size(), handle);
  CHECK(std::memcmp(scattered.data() + 100, bytes.data() + 1, 33) == 0);
  CHECK(std::memcmp(scattered.data(), bytes.data() + 5000, 7) == 0);
  uint32_t computed = 0;
  std::memcpy(&computed, gpu.read(device, crc.data(), 4, handle).data(), 4);
  CHECK(computed == crc32c(0, bytes));
}

}  // namespace
}  // namespace rdmaload
