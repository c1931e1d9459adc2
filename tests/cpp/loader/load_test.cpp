#include "loader/load.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "support/fake_transport.h"
#include "support/models.h"

namespace rdmaload {
namespace {

using testing::AnsweringTransport;
using testing::deliver;
using testing::finish;
using testing::kSoon;
using testing::ManualTransport;
using testing::Model;

constexpr uint64_t kChunk = 100;

Deadline soon() { return Deadline::after(kSoon); }
Deadline now() { return Deadline::after(std::chrono::seconds(0)); }

// A model of chunks of 100 bytes with checksums, a plan for all of it (a tensor and a region for every chunk,
// unless said otherwise), its destinations and a Load.
struct Fixture {
  explicit Fixture(uint64_t chunks, uint64_t tensor_bytes = kChunk, bool with_crcs = true) {
    model.add_blocks(chunks * kChunk, tensor_bytes, chunks);
    model.divide(kChunk, true, with_crcs);
    std::vector<uint32_t> selection(model.index.tensors().size());
    std::iota(selection.begin(), selection.end(), 0u);
    plan = std::make_shared<LoadPlan>(plan_into_tensors(model.index, model.layout, selection, {}));
    for (const uint64_t bytes : plan->region_bytes) memory.emplace_back(bytes);
  }

  void make(std::shared_ptr<Transport> transport, LoadOptions options = {}) {
    std::vector<Region> regions;
    for (auto& region : memory) regions.push_back({region, nullptr});
    load.emplace(std::move(transport), std::make_shared<StoreLayout>(model.layout), plan, regions, options);
  }
  // Delivers what the read asks for and completes it.
  void serve(Read* read) const {
    deliver(*read, model.object(read->object));
    finish(read);
  }
  bool holds_everything() const {
    for (const Placement& placement : plan->placements) {
      const auto bytes = model.bytes_of_tensor(placement.tensor);
      if (!std::equal(bytes.begin(), bytes.end(), memory[placement.region].begin())) return false;
    }
    return true;
  }
  Status status() const {
    try {
      load->throw_if_failed();
    } catch (const Error& error) {
      return Status::from(error);
    }
    return Status();
  }

  Model model;
  std::shared_ptr<LoadPlan> plan;
  std::vector<std::vector<std::byte>> memory;
  std::optional<Load> load;
};

bool mentions(const Status& status, std::string_view text) {
  return status.message().find(text) != std::string::npos;
}

TEST_CASE("a load through many threads delivers every byte and counts exactly") {
  for (const uint64_t tensor_bytes : {kChunk, uint64_t{7}, uint64_t{1000}, uint64_t{100000}}) {
    CAPTURE(tensor_bytes);
    Fixture fixture(500, tensor_bytes);
    LoadOptions options;
    options.queued_reads = 16;
    fixture.make(std::make_shared<AnsweringTransport>(4,
                                                      [&](Read& read) {
                                                        deliver(read, fixture.model.object(read.object));
                                                        read.copied_bytes = 2;
                                                        read.checksum_time = std::chrono::nanoseconds(3);
                                                        return Status();
                                                      }),
                 options);
    fixture.load->start();
    REQUIRE(fixture.load->wait(soon()));
    CHECK(fixture.status().ok());
    CHECK(fixture.holds_everything());
    const LoadCounters counters = fixture.load->counters();
    CHECK(counters.done_bytes == 500 * kChunk);
    CHECK(counters.verified_bytes == 500 * kChunk);
    CHECK(counters.unverified_bytes == 0);
    CHECK(counters.copied_bytes == 1000);
    CHECK(counters.checksum_time.count() == 1500);
    CHECK(counters.retries == 0);
    CHECK(counters.elapsed.count() > 0);
    CHECK(fixture.load->counters().elapsed == counters.elapsed);  // the clock stands
    CHECK(fixture.load->unfinished_regions().empty());
    CHECK(fixture.load->failed_object().empty());
  }
}

// Says what it was told of destinations.
class PreparedTransport final : public ManualTransport {
 public:
  std::shared_ptr<void> prepare(std::span<const std::span<std::byte>> destinations) override {
    prepared.assign(destinations.begin(), destinations.end());
    ++held;
    return std::shared_ptr<void>(&held, [](int* count) { --*count; });
  }
  std::vector<std::span<std::byte>> prepared;
  int held = 0;
};

TEST_CASE("the transport knows the destinations before the first read, and until all have ended") {
  Fixture fixture(2, 1000);
  const auto transport = std::make_shared<PreparedTransport>();
  fixture.make(transport, {});
  REQUIRE(transport->prepared.size() == fixture.memory.size());
  for (size_t i = 0; i < fixture.memory.size(); ++i) {
    CHECK(transport->prepared[i].data() == fixture.memory[i].data());
  }
  fixture.load->start();
  while (Read* read = transport->waiting() > 0 ? transport->take() : nullptr) {
    CHECK(transport->held == 1);
    CHECK_FALSE(fixture.load->wait(Deadline::after(std::chrono::seconds(0))));
    deliver(*read, fixture.model.object(read->object));
    finish(read);
  }
  REQUIRE(fixture.load->wait(soon()));
  CHECK(transport->held == 0);  // though the load still exists
}

TEST_CASE("reads say what the store has to give: object, size, range, segments, checksum") {
  Model model;
  model.add_blocks(250, 60, 1);  // the last chunk is shorter
  const auto transport = std::make_shared<ManualTransport>();
  for (const bool object_per_chunk : {true, false}) {
    model.divide(kChunk, object_per_chunk, true);
    const auto plan = std::make_shared<LoadPlan>(plan_into_arenas(model.index, model.layout, {4}, {}));
    std::vector<std::byte> memory(10);
    auto owner = std::make_shared<int>(1);
    Load load(transport, std::make_shared<StoreLayout>(model.layout), plan, {{memory, owner}}, {});
    load.start();
    Read* read = transport->take();
    REQUIRE(read != nullptr);
    CHECK(read->object == (object_per_chunk ? "model/0/2" : "model/0/"));
    CHECK(read->object_bytes == (object_per_chunk ? 50 : 250));
    CHECK(read->offset == (object_per_chunk ? 0 : 200));
    CHECK(read->length == 50);
    CHECK(read->checksum);
    REQUIRE(read->segments.size() == 2);
    CHECK(read->segments[0].data == nullptr);
    CHECK(read->segments[0].size == 40);
    CHECK(read->segments[1].data == memory.data());
    CHECK(read->segments[1].size == 10);
    deliver(*read, model.object(read->object));
    finish(read);
    REQUIRE(load.wait(soon()));
    CHECK(std::equal(memory.begin(), memory.end(), model.bytes_of_tensor(4).begin()));
  }
}

TEST_CASE("an earlier load goes before a later one") {
  const auto transport = std::make_shared<ManualTransport>();
  Fixture first(1), second(1);
  first.make(transport);
  second.make(transport);
  second.load->start();
  first.load->start();
  Read* of_second = transport->take();
  Read* of_first = transport->take();
  REQUIRE((of_first && of_second));
  CHECK(of_first->priority < of_second->priority);
  first.serve(of_first);
  second.serve(of_second);
}

TEST_CASE("what is not verified is counted as such") {
  for (const bool with_crcs : {false, true}) {
    Fixture fixture(3, kChunk, with_crcs);
    LoadOptions options;
    options.verify = !with_crcs;  // no checksums known, or none wanted
    fixture.make(std::make_shared<AnsweringTransport>(1,
                                                      [&](Read& read) {
                                                        if (read.checksum)
                                                          return Status(ErrorCode::kInvalid, "");
                                                        deliver(read, fixture.model.object(read.object));
                                                        return Status();
                                                      }),
                 options);
    fixture.load->start();
    REQUIRE(fixture.load->wait(soon()));
    CHECK(fixture.status().ok());
    CHECK(fixture.load->counters().verified_bytes == 0);
    CHECK(fixture.load->counters().unverified_bytes == 3 * kChunk);
  }
}

TEST_CASE("a plan with nothing to read ends at once") {
  Fixture fixture(0);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  CHECK(fixture.load->wait(now()));
  fixture.load->start();
  CHECK(fixture.load->wait(now()));
  CHECK(fixture.status().ok());
  fixture.load->cancel();  // too late to matter
  CHECK(fixture.status().ok());
  CHECK(transport->waiting() == 0);
}

TEST_CASE("destinations that are not those of the plan are refused") {
  Fixture fixture(3);
  fixture.memory.pop_back();
  CHECK_THROWS_AS(fixture.make(std::make_shared<ManualTransport>()), Error);
  fixture.memory.emplace_back(kChunk - 1);
  CHECK_THROWS_AS(fixture.make(std::make_shared<ManualTransport>()), Error);
}

TEST_CASE("queued reads and bytes stay within their bounds, and fill them") {
  for (const bool by_bytes : {false, true}) {
    Fixture fixture(50);
    const auto transport = std::make_shared<ManualTransport>();
    LoadOptions options;
    if (by_bytes) {
      options.queued_bytes = 8 * kChunk + 99;
    } else {
      options.queued_reads = 8;
    }
    fixture.make(transport, options);
    fixture.load->start();
    std::deque<Read*> taken;
    for (size_t served = 0; served < 50; ++served) {
      CHECK(transport->waiting() + taken.size() == std::min<size_t>(8, 50 - served));
      for (size_t i = 0; i <= served % 3 && transport->waiting() > 0; ++i) taken.push_back(transport->take());
      REQUIRE_FALSE(taken.empty());
      fixture.serve(taken.front());
      taken.pop_front();
    }
    CHECK(fixture.load->wait(now()));
    CHECK(fixture.holds_everything());
  }
}

TEST_CASE("a read larger than the bound goes alone, and behind it the queue fills again") {
  Model model;
  model.add_blocks(1000, 1000, 1);
  for (int i = 0; i < 20; ++i) model.add_blocks(10, 10, 2);
  std::vector<uint32_t> selection(21);
  std::iota(selection.begin(), selection.end(), 0u);
  const auto plan = std::make_shared<LoadPlan>(plan_into_arenas(model.index, model.layout, selection, {}));
  REQUIRE(plan->reads.size() == 21);
  std::vector<std::byte> memory(plan->region_bytes[0]);
  const auto transport = std::make_shared<ManualTransport>();
  LoadOptions options;
  options.queued_bytes = 100;
  Load load(transport, std::make_shared<StoreLayout>(model.layout), plan, {{memory, nullptr}}, options);
  load.start();
  CHECK(transport->waiting() == 1);
  size_t most = 0;
  for (int i = 0; i < 21; ++i) {
    Read* read = transport->take();
    REQUIRE(read != nullptr);
    deliver(*read, model.object(read->object));
    finish(read);
    most = std::max(most, transport->waiting());
  }
  CHECK(load.wait(now()));
  CHECK(most == 10);
}

TEST_CASE("every connection has a read, however large they are") {
  Fixture fixture(50);
  const auto transport = std::make_shared<ManualTransport>(6);
  LoadOptions options;
  options.queued_bytes = 1;
  fixture.make(transport, options);
  fixture.load->start();
  for (size_t served = 0; served < 50; ++served) {
    CHECK(transport->waiting() == std::min<size_t>(6, 50 - served));
    fixture.serve(transport->take());
  }
  CHECK(fixture.load->wait(now()));
}

TEST_CASE("what a failed attempt received is handed back, unless some of it was wrong") {
  for (const ErrorCode code :
       {ErrorCode::kUnavailable, ErrorCode::kTimeout, ErrorCode::kIntegrity, ErrorCode::kFormat}) {
    Fixture fixture(2);
    const auto transport = std::make_shared<ManualTransport>();
    fixture.make(transport);
    fixture.load->start();
    Read* first = transport->take();
    Read* second = transport->take();
    REQUIRE(second != nullptr);
    CHECK(first->received == 0);
    first->received = 60;
    first->reissues = 3;
    finish(first, Status(code, "cut"));
    Read* again = transport->take();
    REQUIRE(again == first);
    CHECK(again->received == (code == ErrorCode::kUnavailable || code == ErrorCode::kTimeout ? 60 : 0));
    again->reissues = 0;
    again->received = kChunk;
    fixture.serve(again);
    fixture.serve(second);
    CHECK(fixture.load->wait(now()));
    CHECK(fixture.load->counters().retries == 4);
  }
}

TEST_CASE(
    "a whole read with a wrong checksum is read again from its beginning, and the next read begins at its "
    "own") {
  Fixture fixture(3);
  const auto transport = std::make_shared<ManualTransport>();
  LoadOptions options;
  options.queued_reads = 1;
  fixture.make(transport, options);
  fixture.load->start();
  Read* first = transport->take();
  deliver(*first, fixture.model.object(first->object));
  first->received = kChunk;
  first->crc ^= 1;
  finish(first);
  for (int i = 0; i < 3; ++i) {
    Read* read = transport->take();
    REQUIRE(read != nullptr);
    CHECK(read->received == 0);
    read->received = kChunk;
    fixture.serve(read);
  }
  CHECK(fixture.load->wait(now()));
  CHECK(fixture.holds_everything());
}

TEST_CASE("a read is not tried again before the server wants to be asked") {
  Fixture fixture(1);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  fixture.load->start();
  Read* read = transport->take();
  read->retry_after = std::chrono::seconds(7);
  const auto before = Clock::now();
  finish(read, Status(ErrorCode::kUnavailable, "SlowDown"));
  const auto [again, not_before] = transport->take_timed();
  CHECK(not_before >= before + std::chrono::seconds(7));
  fixture.serve(again);
  CHECK(fixture.load->wait(now()));
}

TEST_CASE("bytes of an unfinished read are progress, which restarts the retry time-out") {
  Fixture fixture(1);
  const auto transport = std::make_shared<ManualTransport>();
  LoadOptions options;
  options.retry_timeout = std::chrono::milliseconds(50);
  fixture.make(transport, options);
  fixture.load->start();
  const auto begin = Clock::now();
  uint64_t received = 0;
  while (Clock::now() - begin < std::chrono::milliseconds(200) && received < kChunk - 1) {
    Read* read = transport->take();
    REQUIRE(read != nullptr);
    read->received = ++received;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    finish(read, Status(ErrorCode::kUnavailable, "cut"));
  }
  fixture.serve(transport->take());
  CHECK(fixture.load->wait(now()));
  CHECK(fixture.status().ok());
}

TEST_CASE("kUnavailable and kTimeout are tried again, later and later, until they pass") {
  Fixture fixture(2);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  fixture.load->start();
  Read* other = nullptr;
  Read* failing = transport->take();
  REQUIRE((other = transport->take()) != nullptr);
  double shortest = 10;  // milliseconds: half of the first pause
  for (int attempt = 1; attempt <= 12; ++attempt) {
    const auto failed_at = Clock::now();
    finish(failing, Status(attempt % 2 == 0 ? ErrorCode::kTimeout : ErrorCode::kUnavailable, "not now"));
    const auto [again, not_before] = transport->take_timed();
    REQUIRE(again == failing);
    const std::chrono::duration<double, std::milli> pause = not_before - failed_at;
    CHECK(pause.count() >= shortest);
    CHECK(pause.count() <= 2 * shortest + 500);  // the rest is this machine being slow
    shortest = std::min(1000.0, 2 * shortest);
    CHECK(fixture.load->counters().retries == static_cast<uint64_t>(attempt));
    CHECK(fixture.load->unfinished_regions() == std::vector<uint32_t>{0, 1});
  }
  fixture.serve(failing);
  CHECK(fixture.load->unfinished_regions() == std::vector<uint32_t>{1});
  CHECK(fixture.load->finished_files().empty());
  CHECK_FALSE(fixture.load->wait(now()));
  fixture.serve(other);
  REQUIRE(fixture.load->wait(soon()));
  CHECK(fixture.load->finished_files() == std::vector<uint32_t>{0});
  CHECK(fixture.status().ok());
  CHECK(fixture.holds_everything());
  CHECK(fixture.load->counters().done_bytes == 2 * kChunk);
}

TEST_CASE("an attempt that brings bytes begins the pauses anew") {
  Fixture fixture(1);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  fixture.load->start();
  Read* read = transport->take();
  const auto pause_after = [&](uint64_t bytes) {
    read->received += bytes;
    const auto failed_at = Clock::now();
    finish(read, Status(ErrorCode::kUnavailable, "cut off"));
    const auto [again, not_before] = transport->take_timed();
    REQUIRE(again == read);
    return std::chrono::duration<double, std::milli>(not_before - failed_at).count();
  };
  for (int attempt = 0; attempt < 8; ++attempt) CHECK(pause_after(0) >= 0);
  CHECK(pause_after(0) >= 1000);
  for (int attempt = 0; attempt < 20; ++attempt)
    CHECK(pause_after(1) < 20 + 500);  // 500: this machine being slow
  CHECK(pause_after(0) >= 20);         // and later and later again
  fixture.serve(read);
  REQUIRE(fixture.load->wait(soon()));
  CHECK(fixture.status().ok());
  CHECK(fixture.holds_everything());
}

TEST_CASE("retries end when nothing has arrived for the retry time-out") {
  Fixture fixture(4);
  LoadOptions options;
  options.retry_timeout = std::chrono::milliseconds(200);
  std::atomic<int> asked{0};
  fixture.make(std::make_shared<AnsweringTransport>(2,
                                                    [&](Read& read) {
                                                      ++asked;
                                                      if (read.object == "model/0/0") {
                                                        deliver(read, fixture.model.object(read.object));
                                                        return Status();
                                                      }
                                                      return Status(ErrorCode::kUnavailable,
                                                                    "refused " + read.object);
                                                    }),
               options);
  const auto begin = Clock::now();
  fixture.load->start();
  REQUIRE(fixture.load->wait(soon()));
  CHECK(Clock::now() - begin >= std::chrono::milliseconds(200));
  const Status status = fixture.status();
  CHECK(status.code() == ErrorCode::kUnavailable);
  CHECK(mentions(status, "refused model/0/"));
  CHECK(mentions(status, "offset 0, 100 bytes, attempt "));
  CHECK(fixture.load->counters().retries > 0);
  CHECK(asked > 4);
  CHECK(fixture.load->failed_object().starts_with("model/0/"));
  CHECK(fixture.load->unfinished_regions() == std::vector<uint32_t>{1, 2, 3});
}

TEST_CASE("progress restarts the retry time-out") {
  // Each chunk fails for a while; the whole takes longer than the time-out, no silence does.
  Fixture fixture(8);
  LoadOptions options;
  options.retry_timeout = std::chrono::milliseconds(300);
  options.queued_reads = 1;
  std::map<std::string, int> attempts;  // only on the one thread
  fixture.make(std::make_shared<AnsweringTransport>(1,
                                                    [&](Read& read) {
                                                      if (++attempts[read.object] <= 2) {
                                                        return Status(ErrorCode::kUnavailable, "not now");
                                                      }
                                                      deliver(read, fixture.model.object(read.object));
                                                      return Status();
                                                    }),
               options);
  const auto begin = Clock::now();
  fixture.load->start();
  REQUIRE(fixture.load->wait(soon()));
  CHECK(fixture.status().ok());
  CHECK(Clock::now() - begin > std::chrono::milliseconds(8 * 30 - 1));
  CHECK(fixture.load->counters().retries == 16);
}

TEST_CASE("a flipped bit is read again and then delivered right") {
  Fixture fixture(3);
  std::atomic<int> times{0};
  fixture.make(std::make_shared<AnsweringTransport>(1, [&](Read& read) {
    const auto object = fixture.model.object(read.object);
    std::vector<std::byte> bytes(object.begin(), object.end());
    if (read.object == "model/0/1" && times++ < 2) bytes[50] ^= std::byte{1};
    deliver(read, bytes);
    return Status();
  }));
  fixture.load->start();
  REQUIRE(fixture.load->wait(soon()));
  CHECK(fixture.status().ok());
  CHECK(times == 3);
  CHECK(fixture.holds_everything());
  const LoadCounters counters = fixture.load->counters();
  CHECK(counters.retries == 2);
  CHECK(counters.verified_bytes == 3 * kChunk);
}

TEST_CASE(
    "bytes that stay wrong end the load after the limit, with chunk, object, offset and both checksums") {
  for (const int limit : {1, 3}) {
    Fixture fixture(3);
    LoadOptions options;
    options.max_integrity_attempts = limit;
    std::atomic<int> times{0};
    uint32_t wrong = 0;
    fixture.make(std::make_shared<AnsweringTransport>(1,
                                                      [&](Read& read) {
                                                        const auto object = fixture.model.object(read.object);
                                                        std::vector<std::byte> bytes(object.begin(),
                                                                                     object.end());
                                                        if (read.object == "model/0/1") {
                                                          ++times;
                                                          bytes[99] ^= std::byte{0x80};
                                                          wrong = crc32c(0, bytes);
                                                        }
                                                        deliver(read, bytes);
                                                        return Status();
                                                      }),
                 options);
    fixture.load->start();
    REQUIRE(fixture.load->wait(soon()));
    const Status status = fixture.status();
    CHECK(status.code() == ErrorCode::kIntegrity);
    CHECK(times == limit);
    char text[11];
    std::snprintf(text, sizeof(text), "0x%08x", wrong);
    CHECK(mentions(status, "chunk 1 "));
    CHECK(mentions(status, "model/0/1"));
    CHECK(mentions(status, text));
    std::snprintf(text, sizeof(text), "0x%08x", fixture.model.layout.crcs[1]);
    CHECK(mentions(status, text));
    CHECK(mentions(status, "attempt " + std::to_string(limit)));
    CHECK(fixture.load->failed_object() == "model/0/1");
    const auto unfinished = fixture.load->unfinished_regions();
    CHECK(std::count(unfinished.begin(), unfinished.end(), 1u) == 1);
    CHECK(fixture.load->counters().retries == static_cast<uint64_t>(limit - 1));
  }
}

TEST_CASE("every read has its own count of attempts") {
  Fixture fixture(5);
  LoadOptions options;
  options.queued_reads = 1;
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport, options);
  fixture.load->start();
  for (int chunk = 0; chunk < 4; ++chunk) {
    for (int attempt = 0; attempt < 2; ++attempt)
      finish(transport->take(), Status(ErrorCode::kIntegrity, "bad"));
    Read* read = transport->take();
    REQUIRE(read != nullptr);
    fixture.serve(read);
  }
  CHECK(fixture.load->counters().retries == 8);
  finish(transport->take(), Status(ErrorCode::kNotFound, "gone"));
  REQUIRE(fixture.load->wait(now()));
  CHECK(mentions(fixture.status(), "attempt 1)"));
}

TEST_CASE("kFormat counts against the same limit as wrong bytes, network failures do not") {
  Fixture fixture(1);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  fixture.load->start();
  for (const ErrorCode code : {ErrorCode::kIntegrity, ErrorCode::kUnavailable, ErrorCode::kFormat,
                               ErrorCode::kTimeout, ErrorCode::kFormat}) {
    Read* read = transport->take();
    REQUIRE(read != nullptr);
    finish(read, Status(code, "bad"));
  }
  REQUIRE(fixture.load->wait(now()));
  CHECK(fixture.status().code() == ErrorCode::kFormat);
  CHECK(mentions(fixture.status(), "attempt 5"));
}

TEST_CASE("a final error is not tried again") {
  for (const ErrorCode code : {ErrorCode::kNotFound, ErrorCode::kAuthentication, ErrorCode::kNotSupported,
                               ErrorCode::kInvalid, ErrorCode::kDevice, ErrorCode::kCancelled}) {
    Fixture fixture(1);
    const auto transport = std::make_shared<ManualTransport>();
    fixture.make(transport);
    fixture.load->start();
    finish(transport->take(), Status(code, "no"));
    CHECK(fixture.load->wait(now()));
    CHECK(fixture.status().code() == code);
    CHECK(fixture.load->counters().retries == 0);
    CHECK(transport->waiting() == 0);
  }
}

TEST_CASE(
    "the first error wins; others neither replace it nor are tried again, and nothing more is started") {
  Fixture fixture(20);
  const auto transport = std::make_shared<ManualTransport>();
  LoadOptions options;
  options.queued_reads = 5;
  fixture.make(transport, options);
  fixture.load->start();
  std::vector<Read*> taken;
  for (int i = 0; i < 5; ++i) taken.push_back(transport->take());
  finish(taken[3], Status(ErrorCode::kNotFound, "first"));
  CHECK(transport->waiting() == 0);
  CHECK(taken[0]->owner->cancelled());  // the transport may give up the others
  finish(taken[1], Status(ErrorCode::kAuthentication, "second"));
  finish(taken[0], Status(ErrorCode::kUnavailable, "third"));
  finish(taken[2], Status(ErrorCode::kCancelled, "fourth"));
  CHECK(transport->waiting() == 0);
  CHECK_FALSE(fixture.load->wait(now()));  // one may still write
  fixture.serve(taken[4]);
  REQUIRE(fixture.load->wait(now()));
  CHECK(transport->waiting() == 0);
  CHECK(fixture.status().code() == ErrorCode::kNotFound);
  CHECK(mentions(fixture.status(), "first (offset 0, 100 bytes, attempt 1)"));
  CHECK(fixture.load->failed_object() == "model/0/3");
  const auto unfinished = fixture.load->unfinished_regions();
  CHECK(unfinished.size() == 19);
  CHECK(std::count(unfinished.begin(), unfinished.end(), 4u) == 0);
  CHECK(fixture.load->counters().done_bytes == kChunk);
}

TEST_CASE("unfinished regions are those that some read has not filled, each once") {
  // Tensors of 150 bytes over chunks of 100: chunk 1 holds parts of two tensors.
  Fixture fixture(3, 150);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  fixture.load->start();
  std::map<std::string, Read*> reads;
  for (int i = 0; i < 3; ++i) {
    Read* read = transport->take();
    REQUIRE(read != nullptr);
    reads[read->object] = read;
  }
  CHECK(fixture.load->unfinished_regions() == std::vector<uint32_t>{0, 1});
  fixture.serve(reads["model/0/0"]);
  CHECK(fixture.load->unfinished_regions() == std::vector<uint32_t>{0, 1});
  fixture.serve(reads["model/0/1"]);
  CHECK(fixture.load->unfinished_regions() == std::vector<uint32_t>{1});
  fixture.serve(reads["model/0/2"]);
  CHECK(fixture.load->unfinished_regions().empty());
  CHECK(fixture.holds_everything());
}

TEST_CASE("a trace has every attempt in order, with its times, and nothing is kept unasked") {
  for (const bool trace : {false, true}) {
    Fixture fixture(2);
    const auto transport = std::make_shared<ManualTransport>();
    LoadOptions options;
    options.trace = trace;
    fixture.make(transport, options);
    fixture.load->start();
    Read* first = transport->take();
    Read* second = transport->take();
    first->times.thread = 7;
    finish(first, Status(ErrorCode::kUnavailable, "gone"));
    fixture.serve(second);
    fixture.serve(transport->take());
    REQUIRE(fixture.load->wait(soon()));
    const std::vector<ReadTrace> events = fixture.load->trace();
    if (!trace) {
      CHECK(events.empty());
      continue;
    }
    REQUIRE(events.size() == 3);
    CHECK((!events[0].ok && events[1].ok && events[2].ok));
    CHECK((events[0].attempt == 1 && events[1].attempt == 1 && events[2].attempt == 2));
    CHECK(events[0].times.thread == 7);
    CHECK(events[2].times.thread == 0);  // of its own attempt
    CHECK(events[2].bytes == kChunk);
    CHECK(events[2].submitted > events[0].done);  // it was tried again later
    CHECK((events[0].submitted <= events[0].done && events[1].submitted <= events[1].done));
  }
}

TEST_CASE("cancel ends what is queued at once and waits for what is in flight") {
  Fixture fixture(20);
  const auto transport = std::make_shared<ManualTransport>();
  LoadOptions options;
  options.queued_reads = 5;
  fixture.make(transport, options);
  fixture.load->start();
  Read* in_flight = transport->take();
  CHECK(transport->waiting() == 4);
  fixture.load->cancel();
  CHECK(transport->waiting() == 0);
  CHECK(in_flight->owner->cancelled());
  CHECK_FALSE(fixture.load->wait(Deadline::after(std::chrono::milliseconds(20))));
  finish(in_flight, Status(ErrorCode::kUnavailable, "lost"));
  CHECK(transport->waiting() == 0);  // it is not tried again
  CHECK(fixture.load->wait(now()));
  CHECK(fixture.status().code() == ErrorCode::kCancelled);
  CHECK(fixture.load->failed_object().empty());
  CHECK(fixture.load->unfinished_regions().size() == 20);
}

TEST_CASE("cancel before start starts nothing, and again changes nothing") {
  Fixture fixture(3);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  fixture.load->cancel();
  fixture.load->start();
  fixture.load->cancel();
  CHECK(transport->waiting() == 0);
  CHECK(fixture.load->wait(now()));
  CHECK(fixture.status().code() == ErrorCode::kCancelled);
}

TEST_CASE("the destructor cancels and waits until nothing can write any more") {
  Fixture fixture(10);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  fixture.load->start();
  Read* in_flight = transport->take();
  std::atomic<bool> delivered{false}, destroyed_before{false};
  {
    std::jthread late([&] {
      transport->wait_for_cancel();
      delivered = true;
      fixture.serve(in_flight);
    });
    fixture.load.reset();
    destroyed_before = !delivered;
  }
  CHECK(delivered);
  CHECK_FALSE(destroyed_before);
}

TEST_CASE("a load that was never started is destroyed at once") {
  Fixture fixture(3);
  fixture.make(std::make_shared<ManualTransport>());
  fixture.load.reset();
}

TEST_CASE(
    "the whole time-out ends the load, says how far it came, and still waits for the memory to be quiet") {
  Fixture fixture(10);
  const auto transport = std::make_shared<ManualTransport>();
  LoadOptions options;
  options.timeout = std::chrono::milliseconds(50);
  fixture.make(transport, options);
  const auto begin = Clock::now();
  fixture.load->start();
  fixture.serve(transport->take());
  Read* in_flight = transport->take();
  CHECK_FALSE(fixture.load->wait(Deadline::after(std::chrono::milliseconds(80))));
  CHECK(transport->waiting() == 0);
  finish(in_flight, Status(ErrorCode::kCancelled, "gave up"));
  REQUIRE(fixture.load->wait(soon()));
  CHECK(Clock::now() - begin >= std::chrono::milliseconds(50));
  CHECK(fixture.status().code() == ErrorCode::kTimeout);
  CHECK(mentions(fixture.status(), "100 of 1000 bytes"));
  CHECK(fixture.load->failed_object().empty());
}

TEST_CASE("wait returns at its own deadline while the load goes on") {
  Fixture fixture(1);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  fixture.load->start();
  const auto begin = Clock::now();
  CHECK_FALSE(fixture.load->wait(Deadline::after(std::chrono::milliseconds(30))));
  CHECK(Clock::now() - begin >= std::chrono::milliseconds(30));
  fixture.serve(transport->take());
  CHECK(fixture.load->wait(Deadline::never()));
  CHECK(fixture.status().ok());
}

TEST_CASE("a transport that is destroyed under a load ends it") {
  Fixture fixture(3);
  const auto transport = std::make_shared<ManualTransport>();
  fixture.make(transport);
  fixture.load->start();
  while (transport->waiting() > 0)
    finish(transport->take(), Status(ErrorCode::kCancelled, "the transport was closed"));
  CHECK(fixture.load->wait(now()));
  CHECK(fixture.status().code() == ErrorCode::kCancelled);
}

TEST_CASE("completions, retries, waits and questions from many threads agree") {
  Fixture fixture(2000);
  LoadOptions options;
  options.queued_reads = 32;
  options.max_integrity_attempts = 1000;
  std::atomic<uint64_t> attempts{0}, failures{0};
  fixture.make(std::make_shared<AnsweringTransport>(4,
                                                    [&](Read& read) {
                                                      const uint64_t number = attempts++;
                                                      deliver(read, fixture.model.object(read.object));
                                                      if (number % 101 == 100) {
                                                        ++failures;
                                                        return Status(ErrorCode::kUnavailable, "not now");
                                                      }
                                                      if (number % 103 == 102) {
                                                        ++failures;
                                                        read.crc ^= 1;
                                                      }
                                                      return Status();
                                                    }),
               options);
  fixture.load->start();
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back([&] {
        while (!fixture.load->wait(Deadline::after(std::chrono::milliseconds(1)))) {
          fixture.load->counters();
          fixture.load->unfinished_regions();
        }
      });
    }
  }
  REQUIRE(fixture.load->wait(soon()));
  CHECK(fixture.status().ok());
  CHECK(fixture.holds_everything());
  CHECK(failures > 0);
  CHECK(fixture.load->counters().retries == failures);
  CHECK(fixture.load->counters().verified_bytes == 2000 * kChunk);
}

TEST_CASE("loads that are destroyed at any moment leave nothing behind") {
  Fixture fixture(200);
  for (int round = 0; round < 100; ++round) {
    LoadOptions options;
    options.queued_reads = 8;
    std::atomic<int> served{0};
    fixture.make(std::make_shared<AnsweringTransport>(3,
                                                      [&](Read& read) {
                                                        deliver(read, fixture.model.object(read.object));
                                                        ++served;
                                                        return Status();
                                                      }),
                 options);
    fixture.load->start();
    while (served < round * 2) std::this_thread::yield();
    fixture.load.reset();  // asan and tsan look at what happens after
  }
}

}  // namespace
}  // namespace rdmaload
