// Files straight to a GPU on the fake cuFile: right bytes at right places whatever the ranges, what is read
// which way, and what happens where cuFile cannot.
#include "transport/gds_transport.h"

#include <doctest/doctest.h>
#include <fcntl.h>

#include <memory>
#include <numeric>
#include <string>

#include "core/crc32c.h"
#include "loader/load.h"
#include "support/fake_gpu.h"
#include "support/models.h"
#include "support/reads.h"
#include "support/temp_dir.h"

namespace rdmaload {
namespace {

using testing::FakeGpu;
using testing::kSoon;
using testing::Model;
using testing::RecordingOwner;
using testing::TempDir;
using testing::TestRead;

Deadline soon() { return Deadline::after(kSoon); }

Status status_of(const Load& load) {
  try {
    load.throw_if_failed();
  } catch (const Error& error) {
    return Status::from(error);
  }
  return Status();
}

// Files on a disk that seems cold, and loads of all of them into device memory.
struct Fixture {
  explicit Fixture(uint64_t seed = 1, bool checksums = true, int ordinal = 0)
      : gpu(seed), device(gpu.device(ordinal)) {
    std::vector<int64_t> sizes;
    std::mt19937_64 random(seed);
    for (int i = 0; i < 40; ++i)
      sizes.push_back(static_cast<int64_t>(testing::pick(random, 0, i % 10 ? 900 : 90'000)));
    model.add_file(sizes, seed);
    model.add_blocks(100'000, 30'000, seed + 1);
    model.divide(checksums ? kChunk : 0, false, checksums);
    for (size_t i = 0; i < model.layout.files.size(); ++i)
      model.layout.files[i].object = "file-" + std::to_string(i);
    for (const auto& file : model.layout.files) directory.write(file.object, model.object(file.object));
    std::vector<uint32_t> selection(model.index.tensors().size());
    std::iota(selection.begin(), selection.end(), 0u);
    PlanLimits limits;
    limits.read_bytes = kChunk;
    plan = std::make_shared<LoadPlan>(plan_into_tensors(model.index, model.layout, selection, limits));
  }

  FileOptions file_options() {
    FileOptions options;
    options.smallest_direct_bytes = 1000;
    options.calls.open = [](const char* path, int flags) { return ::open(path, flags & ~O_DIRECT); };
    options.calls.direct_alignment = [](int) { return DirectAlignment{512, 512}; };
    options.calls.cached_fraction = [this](int, uint64_t) -> std::optional<double> { return cached; };
    return options;
  }

  // The way there, as the bindings put it together.
  struct Road {
    std::shared_ptr<FileTransport> files;
    std::shared_ptr<StagedTransport> staged;
    std::shared_ptr<GdsTransport> gds;
  };
  Road road(const CuFile& cufile, int workers = 3, bool verify_device = false) {
    Road made;
    made.files = std::make_shared<FileTransport>(directory.path().string(), file_options());
    StagingOptions staging;
    staging.read_bytes = kChunk;
    staging.staging_bytes = 200'000;
    staging.verify_device = verify_device;
    made.staged = std::make_shared<StagedTransport>(made.files, device, staging);
    GdsOptions options;
    options.read_bytes = kChunk;
    options.workers = workers;
    options.scatter_pieces = 3;
    options.verify_device = verify_device;
    made.gds = std::make_shared<GdsTransport>(made.files, made.staged, device, cufile, options);
    return made;
  }

  struct Target {
    Target(const Device& device, const LoadPlan& plan) {
      uint64_t total = 1;  // so that nothing is aligned
      for (const uint64_t bytes : plan.region_bytes) {
        offsets.push_back(total);
        total += bytes;
      }
      buffer = std::make_unique<DeviceBuffer>(device, total + 256);
      for (size_t i = 0; i < plan.region_bytes.size(); ++i) {
        regions.push_back(
            {{reinterpret_cast<std::byte*>(buffer->data() + offsets[i]), plan.region_bytes[i]}, nullptr});
      }
    }
    std::unique_ptr<DeviceBuffer> buffer;
    std::vector<uint64_t> offsets;
    std::vector<Region> regions;
  };

  // Loads everything; its status, and whether a consumer then saw every byte.
  std::pair<Status, bool> load(Road& road) {
    const Target target(device, *plan);
    const Stream consumer(device);
    {  // what the memory's last user still has to do
      const DeviceGuard guard(device);
      for (int i = 0; i < 20; ++i) {
        gpu.driver.check("fill", gpu.driver.fill_words(target.buffer->data(), 0xdeadbeef,
                                                       target.buffer->size() / 4, consumer.handle()));
      }
    }
    road.staged->follow(consumer.handle());
    Load load(road.gds, std::make_shared<StoreLayout>(model.layout), plan, target.regions, LoadOptions{});
    load.start();
    REQUIRE(load.wait(soon()));
    verified = load.counters().verified_bytes;
    retries = load.counters().retries;
    road.staged->lead(consumer.handle());
    const auto seen = gpu.read(device, target.buffer->data(), target.buffer->size(), consumer.handle());
    bool right = true;
    for (const Placement& placement : plan->placements) {
      const auto bytes = model.bytes_of_tensor(placement.tensor);
      right = right && std::equal(bytes.begin(), bytes.end(),
                                  seen.begin() + static_cast<ptrdiff_t>(target.offsets[placement.region]));
    }
    return {status_of(load), right};
  }

  static constexpr uint64_t kChunk = 12'345;  // chunks begin within pages
  FakeGpu gpu;
  Device& device;
  TempDir directory;
  Model model;
  std::shared_ptr<LoadPlan> plan;
  double cached = 0;
  uint64_t verified = 0;
  uint64_t retries = 0;
};

TEST_CASE("every byte arrives, checksummed on the device, on either device and in whatever order") {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    CAPTURE(seed);
    Fixture fixture(seed, seed % 3 != 0, static_cast<int>(seed % 2));
    const FakeCudaState before = fixture.gpu.state();
    {
      const CuFile cufile(RDMALOAD_FAKE_CUDA);
      CHECK(fixture.gpu.cufile_state().compat_mode == 0);
      Fixture::Road road = fixture.road(cufile, 1 + static_cast<int>(seed % 3));
      const auto [status, right] = fixture.load(road);
      CAPTURE(status.message());
      CHECK(status.ok());
      CHECK(right);
      CHECK(road.gds->path() == "file-gds");
      CHECK(road.gds->fallback_reason() == "");
      CHECK(fixture.verified == (seed % 3 != 0 ? fixture.plan->read_bytes : 0));
      CHECK(fixture.gpu.cufile_state().read_bytes >= fixture.plan->read_bytes);
      CHECK(road.staged->counters().copied_bytes == 0);
      CHECK(fixture.gpu.cufile_state().handles == fixture.model.layout.files.size());
    }
    CHECK(fixture.gpu.cufile_state().handles == 0);
    CHECK(fixture.gpu.cufile_state().buffers == 0);
    PinnedPool::process().release();
    const FakeCudaState after = fixture.gpu.state();
    CHECK(after.device_allocations == before.device_allocations);
    CHECK(after.host_bytes == before.host_bytes);
    CHECK(after.events == before.events);
  }
}

TEST_CASE("a load by cuFile leaves a CUDA graph that is captured meanwhile whole") {
  Fixture fixture;
  const CuFile cufile(RDMALOAD_FAKE_CUDA);
  const Stream captured(fixture.device);
  fixture.gpu.begin_capture(captured.handle());
  {
    Fixture::Road road = fixture.road(cufile);
    const auto [status, right] = fixture.load(road);
    CAPTURE(status.message());
    CHECK(status.ok());
    CHECK(right);
    CHECK(road.gds->path() == "file-gds");
  }
  PinnedPool::process().release();
  CHECK(fixture.gpu.end_capture());
}

TEST_CASE("with verify_device, what has no checksum to compare with goes through the ring, which checks it") {
  for (const bool checksums : {true, false}) {
    CAPTURE(checksums);
    Fixture fixture(1, checksums);
    const CuFile cufile(RDMALOAD_FAKE_CUDA);
    Fixture::Road road = fixture.road(cufile, 3, true);
    if (!checksums) fixture.gpu.corrupt_copy(1);  // the first is of bytes, not of a table of pieces
    const auto [status, right] = fixture.load(road);
    CAPTURE(status.message());
    CHECK(status.ok());
    CHECK(right);
    CHECK(road.gds->path() == (checksums ? "file-gds" : "file-direct+staged-gpu"));
    CHECK((road.gds->fallback_reason().find("verify_device") == 0) == !checksums);
    CHECK(fixture.retries == (checksums ? 0 : 1));
    CHECK(road.staged->counters().verified_bytes == (checksums ? 0 : fixture.plan->read_bytes));
  }
}

TEST_CASE("without kernels, what has checksums goes through the ring, and the rest by cuFile") {
  for (const bool checksums : {true, false}) {
    CAPTURE(checksums);
    Fixture fixture(1, checksums);
    fixture.gpu.set_module_result(cuda::kNoBinaryForGpu);
    Device device(fixture.gpu.driver, 0);
    const CuFile cufile(RDMALOAD_FAKE_CUDA);
    Fixture::Road road = fixture.road(cufile);
    GdsOptions options;
    options.read_bytes = Fixture::kChunk;
    road.gds = std::make_shared<GdsTransport>(road.files, road.staged, device, cufile, options);
    const auto [status, right] = fixture.load(road);
    CHECK(status.ok());
    CHECK(right);
    CHECK(road.gds->path() == (checksums ? "file-direct+staged-gpu" : "file-gds"));
    CHECK((road.gds->fallback_reason().find("CUDA_ERROR_NO_BINARY_FOR_GPU") != std::string::npos) ==
          checksums);
  }
}

TEST_CASE("answers that stop short are continued") {
  for (const size_t longest : {4096, 4097, 10'000}) {
    CAPTURE(longest);
    Fixture fixture;
    const CuFile cufile(RDMALOAD_FAKE_CUDA);
    Fixture::Road road = fixture.road(cufile);
    fixture.gpu.set_cufile_longest(longest);
    const auto [status, right] = fixture.load(road);
    CAPTURE(status.message());
    CHECK(status.ok());
    CHECK(right);
  }
}

TEST_CASE("what is cached is read through the cache and the ring") {
  Fixture fixture;
  fixture.cached = 1;
  const CuFile cufile(RDMALOAD_FAKE_CUDA);
  Fixture::Road road = fixture.road(cufile);
  const auto [status, right] = fixture.load(road);
  CHECK(status.ok());
  CHECK(right);
  CHECK(road.gds->path() == "file-buffered+staged-gpu");
  CHECK(road.gds->fallback_reason() == "");
  CHECK(fixture.gpu.cufile_state().reads == 0);
}

TEST_CASE("where cuFile will not, files go past the page cache into the ring, and why is said") {
  struct Case {
    int handle, buffer, fail_read, result, error;
    const char* reason;
  };
  for (const Case& refused :
       {Case{cufile::kIoNotSupported, 0, 0, 0, 0, "file system"},
        Case{0, cufile::kGpuMemoryPinningFailed, 0, 0, 0, "pinned"},
        Case{0, 0, 1, -cufile::kIoError, 0, "cuFileRead"}, Case{0, 0, 5, -1, EINVAL, "cuFileRead"}}) {
    CAPTURE(refused.reason);
    Fixture fixture;
    const FakeCudaState before = fixture.gpu.state();
    {
      const CuFile cufile(RDMALOAD_FAKE_CUDA);
      fixture.gpu.set_cufile_results(0, refused.handle, refused.buffer);
      if (refused.fail_read != 0)
        fixture.gpu.fail_cufile_read(refused.fail_read, refused.result, refused.error);
      Fixture::Road road = fixture.road(cufile);
      const auto [status, right] = fixture.load(road);
      CAPTURE(status.message());
      CHECK(status.ok());
      CHECK(right);
      CHECK(std::string(road.gds->path()).find("file-direct+staged-gpu") != std::string::npos);
      CHECK(road.gds->fallback_reason().find("no GPUDirect Storage") == 0);
      CHECK(road.gds->fallback_reason().find(refused.reason) != std::string::npos);
    }
    PinnedPool::process().release();
    CHECK(fixture.gpu.state().device_allocations == before.device_allocations);
    CHECK(fixture.gpu.cufile_state().buffers == 0);
    CHECK(fixture.gpu.cufile_state().handles == 0);
  }
}

TEST_CASE(
    "a disk's bit flips are found by the checksum on the device and read again; lasting ones are errors") {
  Fixture fixture;
  const std::string object = fixture.model.layout.files[0].object;
  const auto stored = fixture.model.object(object);
  std::vector<std::byte> bytes(stored.begin(), stored.end());
  bytes[bytes.size() / 2] ^= std::byte{1};
  fixture.directory.write(object, bytes);
  const CuFile cufile(RDMALOAD_FAKE_CUDA);
  Fixture::Road road = fixture.road(cufile);
  const auto [status, right] = fixture.load(road);
  CHECK(status.code() == ErrorCode::kIntegrity);
  CHECK(status.message().find("CRC32C") != std::string::npos);
  CHECK(fixture.retries == 2);
}

TEST_CASE("files that were cut or have grown are refused, other errors of the file system are told") {
  for (const int change : {-1, 1, 0}) {
    CAPTURE(change);
    Fixture fixture(1, false);
    const std::string object = fixture.model.layout.files[0].object;
    const auto stored = fixture.model.object(object);
    std::vector<std::byte> bytes(stored.begin(), stored.end());
    if (change != 0) bytes.resize(change > 0 ? bytes.size() + 1 : bytes.size() - 10'000);
    fixture.directory.write(object, bytes);
    const CuFile cufile(RDMALOAD_FAKE_CUDA);
    Fixture::Road road = fixture.road(cufile);
    if (change == 0) fixture.gpu.fail_cufile_read(2, -1, EACCES);
    const auto [status, right] = fixture.load(road);
    CHECK_FALSE(status.ok());
    const char* const expected = change < 0   ? "truncated"
                                 : change > 0 ? "changed"
                                              : "failed: Permission denied";
    CHECK(status.message().find(expected) != std::string::npos);
  }
}

TEST_CASE("a driver error in the middle ends the load, and leaves nothing") {
  for (const char* call : {"cuMemcpyDtoDAsync_v2", "cuLaunchKernel", "cuEventRecord", "cuEventSynchronize"}) {
    CAPTURE(call);
    Fixture fixture;
    const FakeCudaState before = fixture.gpu.state();
    const CuFile cufile(RDMALOAD_FAKE_CUDA);
    for (const bool failing : {true, false}) {
      Fixture::Road road = fixture.road(cufile);
      // A copy of a piece happens only where pieces are few.
      if (failing) fixture.gpu.fail_call(call, 2, cuda::kOutOfMemory);
      const auto [status, right] = fixture.load(road);
      if (failing) {
        // order_streams may have had the failing call's turn: then the test's own call threw
        CHECK(status.code() == ErrorCode::kDevice);
        CHECK(status.message().find("CUDA_ERROR_OUT_OF_MEMORY") != std::string::npos);
      } else {
        CHECK(status.ok());
        CHECK(right);
      }
    }
    PinnedPool::process().release();
    CHECK(fixture.gpu.state().device_allocations == before.device_allocations);
    CHECK(fixture.gpu.state().events == before.events);
  }
}

TEST_CASE("cuFile is used without its compatibility mode or not at all") {
  const FakeGpu gpu;
  const auto refusal = [] {
    try {
      const CuFile cufile(RDMALOAD_FAKE_CUDA);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kNotSupported);
      return std::string(error.what());
    }
    return std::string();
  };
  gpu.set_cufile_results(cufile::kDriverNotInitialized, 0, 0);
  CHECK(refusal().find("nvidia-fs") != std::string::npos);
  CHECK(gpu.cufile_state().compat_mode == 1);  // as it was, for others in the process
  gpu.set_cufile_results(0, 0, 0);
  // Somebody else opened it, with the mode on.
  reinterpret_cast<cufile::Error (*)()>(dlsym(dlopen(RDMALOAD_FAKE_CUDA, RTLD_NOW), "cuFileDriverOpen"))();
  CHECK(refusal().find("CUFILE_ALLOW_COMPAT_MODE") != std::string::npos);
  try {
    const CuFile missing("libno-such-cufile.so.0");
    FAIL("opened");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kNotSupported);
    CHECK(std::string(error.what()).find("libno-such-cufile.so.0") != std::string::npos);
  }
}

TEST_CASE("without room for a block there is no such transport") {
  Fixture fixture;
  const CuFile cufile(RDMALOAD_FAKE_CUDA);
  Fixture::Road road = fixture.road(cufile);
  CHECK(road.gds->block_bytes() <= 128 << 20);
  GdsOptions options;
  options.device_bytes = 1 << 20;
  CHECK_THROWS_AS(GdsTransport(road.files, road.staged, fixture.device, cufile, options), Error);
}

}  // namespace
}  // namespace rdmaload
