// The read contract (transport/transport.h), the same tests for every transport.
#include <doctest/doctest.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <thread>

#include "core/crc32c.h"
#include "support/fake_gpu.h"
#include "support/http_server.h"
#include "support/rdma_server.h"
#include "support/reads.h"
#include "support/resp_server.h"
#include "support/temp_dir.h"
#include "support/tls_server.h"
#include "transport/cache/caching_transport.h"
#include "transport/file_transport.h"
#include "transport/http/http_transport.h"
#include "transport/memory_transport.h"
#include "transport/rdma/devices.h"
#include "transport/rdma/rdma_transport.h"
#include "transport/rdma/verbs_queue_pair.h"
#include "transport/resp/resp_transport.h"
#include "transport/staged_transport.h"

namespace rdmaload {
namespace {

using testing::kSoon;
using testing::pick;
using testing::random_segments;
using testing::RecordingOwner;
using testing::SegmentSpec;
using testing::TestRead;

struct MemoryStore {
  static constexpr size_t kMostCopiedBytes = 0;  // of one read
  static constexpr bool kKnowsSizes = true;      // notices an object that is longer than it should be
  std::map<std::string, std::vector<std::byte>> objects;
  void put(const std::string& object, const std::vector<std::byte>& bytes) { objects[object] = bytes; }
  std::unique_ptr<Transport> open(int threads) {
    auto transport = std::make_unique<MemoryTransport>(threads);
    for (const auto& [object, bytes] : objects) transport->put(object, bytes);
    return transport;
  }
};

template <FileIo kIo>
struct FileStore {
  static constexpr size_t kMostCopiedBytes = kIo == FileIo::kDirect ? SIZE_MAX : 0;  // what is not aligned
  static constexpr bool kKnowsSizes = false;
  testing::TempDir directory;
  void put(const std::string& object, const std::vector<std::byte>& bytes) { directory.write(object, bytes); }
  std::unique_ptr<Transport> open(int threads) {
    FileOptions options;
    options.threads = options.direct_reads = threads;
    options.io = kIo;
    options.smallest_direct_bytes = 1;
    return std::make_unique<FileTransport>(directory.path().string(), options);
  }
};
using AutoFileStore = FileStore<FileIo::kAuto>;
using BufferedFileStore = FileStore<FileIo::kBuffered>;
using DirectFileStore = FileStore<FileIo::kDirect>;

template <int kProtocol>
struct RespStore {
  static constexpr size_t kMostCopiedBytes = 0;
  static constexpr bool kKnowsSizes = true;
  testing::RespStore store;
  testing::RespServer server{[this](testing::RespSession& session, int) { store.serve(session); }};
  void put(const std::string& object, const std::vector<std::byte>& bytes) {
    store.put(object, testing::text_of(bytes));
  }
  std::unique_ptr<Transport> open(int connections) {
    resp::TransportOptions options;
    options.endpoint.host = server.address();
    options.endpoint.port = server.port();
    options.endpoint.protocol = kProtocol;
    options.endpoint.name = "redis://test";
    options.connections = connections;
    return std::make_unique<resp::RespTransport>(options);
  }
};

struct UnixRespStore {
  static constexpr size_t kMostCopiedBytes = 0;
  static constexpr bool kKnowsSizes = true;
  testing::TempDir directory;
  testing::RespStore store;
  testing::RespServer server{[this](testing::RespSession& session, int) { store.serve(session); },
                             (directory.path() / "s").string()};
  void put(const std::string& object, const std::vector<std::byte>& bytes) {
    store.put(object, testing::text_of(bytes));
  }
  std::unique_ptr<Transport> open(int connections) {
    resp::TransportOptions options;
    options.endpoint.socket_path = server.address();
    options.endpoint.name = "redis+unix://test";
    options.connections = connections;
    return std::make_unique<resp::RespTransport>(options);
  }
};

struct TlsRespStore {
  static constexpr size_t kMostCopiedBytes = 0;
  static constexpr bool kKnowsSizes = true;
  testing::TempDir directory;
  testing::Certificate authority = testing::make_certificate({"authority", ""});
  testing::TlsSide side{{testing::make_certificate({}, &authority)}};
  testing::RespStore store;
  testing::RespServer server{[this](testing::RespSession& session, int) { store.serve(session); },
                             "127.0.0.1", side.wrap()};
  void put(const std::string& object, const std::vector<std::byte>& bytes) {
    store.put(object, testing::text_of(bytes));
  }
  std::unique_ptr<Transport> open(int connections) {
    resp::TransportOptions options;
    options.endpoint.host = server.address();
    options.endpoint.port = server.port();
    options.endpoint.name = "rediss://test";
    TlsOptions tls;
    tls.ca_file = testing::write_pem(directory, "ca.pem", authority.x509.get());
    options.endpoint.tls = std::make_shared<TlsContext>(tls);
    options.connections = connections;
    return std::make_unique<resp::RespTransport>(options);
  }
};

struct HttpStore {
  static constexpr size_t kMostCopiedBytes = 1024;  // what comes of the body together with the head
  static constexpr bool kKnowsSizes = true;
  testing::HttpStore store;
  testing::HttpServer server{[this](testing::HttpSession& session, int) { store.serve(session); }};
  void put(const std::string& object, const std::vector<std::byte>& bytes) {
    store.put("/" + object, testing::text_of(bytes));
  }
  std::unique_ptr<Transport> open(int connections) {
    http::TransportOptions options;
    const std::string base = "http://" + server.address() + ":" + std::to_string(server.port()) + "/";
    options.addresses = [base](const std::string& object, bool) {
      return http::Address{base + object, {}, "", "", "", Clock::time_point::max()};
    };
    options.connections = connections;
    options.name = "http://test";
    return std::make_unique<http::HttpTransport>(std::move(options));
  }
};

// What is no whole block of a file passes through; caching_transport_test.cpp has the rest.
struct CachedStore {
  static constexpr size_t kMostCopiedBytes = 0;
  static constexpr bool kKnowsSizes = true;
  testing::TempDir directory;
  MemoryStore store;
  void put(const std::string& object, const std::vector<std::byte>& bytes) { store.put(object, bytes); }
  std::unique_ptr<Transport> open(int threads) {
    CacheOptions options;
    options.directory = directory.path().string();
    options.block_bytes = 7;
    for (const auto& [object, bytes] : store.objects) {
      std::string name;
      for (int i = 0; i < 32; ++i) name += "0f";
      options.files.push_back({object, bytes.size(), 0, {name, object, bytes.size(), options.block_bytes}});
    }
    return std::make_unique<CachingTransport>(store.open(threads), options);
  }
};

struct HttpsStore {
  static constexpr size_t kMostCopiedBytes = 1024;
  static constexpr bool kKnowsSizes = true;
  testing::TempDir directory;
  testing::Certificate authority = testing::make_certificate({"authority", ""});
  testing::TlsSide side{{testing::make_certificate({}, &authority)}};
  testing::HttpStore store;
  testing::HttpServer server{[this](testing::HttpSession& session, int) { store.serve(session); },
                             "127.0.0.1", side.wrap()};
  void put(const std::string& object, const std::vector<std::byte>& bytes) {
    store.put("/" + object, testing::text_of(bytes));
  }
  std::unique_ptr<Transport> open(int connections) {
    http::TransportOptions options;
    const std::string base = "https://" + server.address() + ":" + std::to_string(server.port()) + "/";
    options.addresses = [base](const std::string& object, bool) {
      return http::Address{base + object, {}, "", "", "", Clock::time_point::max()};
    };
    options.connections = connections;
    options.name = "https://test";
    TlsOptions tls;
    tls.ca_file = testing::write_pem(directory, "ca.pem", authority.x509.get());
    options.tls = [context = std::make_shared<const TlsContext>(tls)] { return context; };
    return std::make_unique<http::HttpTransport>(std::move(options));
  }
};

// The address of a card that this machine has; empty: none.
std::string card_address() {
  for (const rdma::Card& card : rdma::list_cards()) {
    if (!card.usable()) continue;
    if (const auto address = rdma::address_of_card(card, "0.0.0.0")) return *address;
  }
  return {};
}

// Over the machine's card, where it has one (tests/rdma/run calls these), else over cards in memory; ours by
// RDMALOAD.READ, else as a Valkey.
template <bool kOurs>
struct RdmaStore {
  static constexpr size_t kMostCopiedBytes = SIZE_MAX;  // nobody says beforehand where reads will go
  static constexpr bool kKnowsSizes = true;
  static rdma::testing::RdmaServer::Options server_options() {
    rdma::testing::RdmaServer::Options options;
    options.ours = kOurs;
    return options;
  }
  static std::shared_ptr<rdma::Fabric> make_fabric(bool has_card) {
    if (has_card) return std::make_shared<rdma::VerbsFabric>();
    return std::make_shared<rdma::testing::FakeNetwork>();
  }
  std::string card = card_address();
  std::string host = card.empty() ? "fake" : card;
  std::shared_ptr<rdma::Fabric> fabric = make_fabric(!card.empty());
  rdma::testing::RdmaServer server{*fabric, server_options(), host};
  void put(const std::string& object, const std::vector<std::byte>& bytes) { server.put(object, bytes); }
  std::unique_ptr<Transport> open(int connections) {
    rdma::TransportOptions options;
    options.endpoint.host = host;
    options.endpoint.port = server.port();
    options.endpoint.name = "rdma://" + host;
    options.connections = connections;
    options.fabric = fabric;
    return std::make_unique<rdma::RdmaTransport>(std::move(options));
  }
};

// Any store behind the road to a GPU, whose memory the fake driver takes the tests' own for. With kernels:
// every read goes as a block that a kernel takes apart and another one checks.
template <typename Source, bool kKernels>
struct StagedStore : Source {
  testing::FakeGpu gpu;
  std::unique_ptr<Transport> open(int threads) {
    gpu.set_lenient();
    StagingOptions options;
    options.read_bytes = 800'000;
    options.staging_bytes = 3'000'000;
    options.scatter_pieces = kKernels ? 1 : SIZE_MAX;
    options.verify_device = kKernels;
    return std::make_unique<StagedTransport>(Source::open(threads), gpu.device(1), options);
  }
};

using StagedMemory = StagedStore<MemoryStore, false>;
using KernelMemory = StagedStore<MemoryStore, true>;
using StagedResp = StagedStore<RespStore<2>, false>;
using StagedRdma = StagedStore<RdmaStore<true>, false>;

#define FOR_EVERY_TRANSPORT(name)                                                                            \
  TEST_CASE_TEMPLATE(name, Store, MemoryStore, AutoFileStore, BufferedFileStore, DirectFileStore,            \
                     RespStore<2>, RespStore<3>, UnixRespStore, TlsRespStore, HttpStore, HttpsStore,         \
                     RdmaStore<true>, RdmaStore<false>, CachedStore, StagedMemory, KernelMemory, StagedResp, \
                     StagedRdma)

Clock::time_point much_later() { return Clock::now() + std::chrono::hours(1); }

FOR_EVERY_TRANSPORT("random ranges in random segments arrive byte for byte, with their checksum") {
  Store store;
  std::map<std::string, std::vector<std::byte>> objects;
  for (const size_t size : {1, 2, 100, 70000, 700001}) {
    const std::string name = "dir/object-" + std::to_string(size);
    objects[name] = testing::random_bytes(size, size);
    store.put(name, objects[name]);
  }
  RecordingOwner owner;
  std::deque<TestRead> reads;
  std::mt19937_64 random(11);
  for (int i = 0; i < 200; ++i) {
    auto at = objects.begin();
    std::advance(at, static_cast<ptrdiff_t>(pick(random, 0, objects.size() - 1)));
    const auto& [name, bytes] = *at;
    uint64_t length = bytes.size(), offset = 0;
    if (pick(random, 0, 3) != 0) {
      length = pick(random, 1, bytes.size());
      offset = pick(random, 0, bytes.size() - length);
    }
    auto& prepared = reads.emplace_back(name, bytes.size(), offset, random_segments(random, length), owner);
    prepared.read.checksum = pick(random, 0, 4) != 0;
  }
  {
    const auto transport = store.open(3);
    for (auto& prepared : reads) transport->submit(prepared.read);
    REQUIRE(owner.wait_for(reads.size()));
  }
  for (const auto& prepared : reads) {
    const Read& read = prepared.read;
    const Status status = owner.status_of(read);
    CAPTURE(status.message());
    const auto& object = objects[read.object];
    REQUIRE(status.ok());
    CHECK(owner.count_of(read) == 1);
    CHECK(prepared.holds(object));
    CHECK(read.copied_bytes <= Store::kMostCopiedBytes);
    if (read.checksum) CHECK(read.crc == crc32c(0, std::span(object).subspan(read.offset, read.length)));
  }
}

FOR_EVERY_TRANSPORT("thousands of segments and nothing but dropped bytes are fine") {
  Store store;
  const auto bytes = testing::random_bytes(600000, 3);
  store.put("o", bytes);
  RecordingOwner owner;
  std::vector<SegmentSpec> many;
  for (int i = 0; i < 3000; ++i) many.push_back({200, i % 7 == 0});
  TestRead fine("o", bytes.size(), 0, many, owner);
  TestRead dropped("o", bytes.size(), 0, {{bytes.size(), true}}, owner);
  const auto transport = store.open(1);
  transport->submit(fine.read);
  transport->submit(dropped.read);
  REQUIRE(owner.wait_for(2));
  CHECK(owner.status_of(fine.read).ok());
  CHECK(fine.holds(bytes));
  CHECK(fine.read.crc == crc32c(0, bytes));
  CHECK(owner.status_of(dropped.read).ok());
  CHECK(dropped.read.crc == crc32c(0, bytes));
}

FOR_EVERY_TRANSPORT(
    "an object that is not there is kNotFound, for a whole read and for a range, and harms no other") {
  Store store;
  const auto bytes = testing::random_bytes(5000, 4);
  store.put("there", bytes);
  RecordingOwner owner;
  TestRead before("there", 5000, owner), whole("gone", 5000, owner), between("there", 5000, owner);
  TestRead range("gone", 5000, 100, {{50}}, owner), after("there", 5000, owner);
  const auto transport = store.open(1);
  transport->submit(before.read);
  transport->submit(whole.read);
  transport->submit(between.read);
  REQUIRE(owner.wait_for(3));
  CHECK(owner.status_of(before.read).ok());
  CHECK(owner.status_of(whole.read).code() == ErrorCode::kNotFound);
  CHECK(owner.status_of(whole.read).message().find("gone") != std::string::npos);
  CHECK(owner.status_of(between.read).ok());
  CHECK(between.holds(bytes));
  transport->submit(range.read);
  REQUIRE(owner.wait_for(4));
  CHECK(owner.status_of(range.read).code() == ErrorCode::kNotFound);
  transport->submit(after.read);
  REQUIRE(owner.wait_for(5));
  CHECK(owner.status_of(after.read).ok());
  CHECK(after.holds(bytes));
}

FOR_EVERY_TRANSPORT("an object of the wrong size is kIntegrity") {
  Store store;
  store.put("o", testing::random_bytes(1000, 5));
  RecordingOwner owner;
  TestRead shorter("o", 1001, owner), range("o", 1500, 900, {{200}}, owner), longer("o", 999, owner);
  const auto transport = store.open(1);
  std::vector<TestRead*> wrong{&shorter, &range};
  if (Store::kKnowsSizes) wrong.push_back(&longer);
  for (size_t i = 0; i < wrong.size(); ++i) {
    transport->submit(wrong[i]->read);
    REQUIRE(owner.wait_for(i + 1));
    CHECK(owner.status_of(wrong[i]->read).code() == ErrorCode::kIntegrity);
  }
}

FOR_EVERY_TRANSPORT("one connection completes reads in the order in which they were submitted, each once") {
  Store store;
  const auto bytes = testing::random_bytes(3000, 6);
  store.put("o", bytes);
  RecordingOwner owner;
  std::deque<TestRead> reads;
  for (int i = 0; i < 500; ++i) reads.emplace_back("o", bytes.size(), owner);
  {
    const auto transport = store.open(1);
    for (auto& prepared : reads) transport->submit(prepared.read);
    REQUIRE(owner.wait_for(reads.size()));
  }
  const auto done = owner.completions();
  REQUIRE(done.size() == reads.size());  // none twice: the transport is gone
  for (size_t i = 0; i < done.size(); ++i) {
    REQUIRE(done[i].status.ok());
    REQUIRE(done[i].read == &reads[i].read);
    REQUIRE(reads[i].holds(bytes));
  }
}

FOR_EVERY_TRANSPORT("a read starts not before its time and holds up no other") {
  Store store;
  const auto bytes = testing::random_bytes(100, 7);
  store.put("o", bytes);
  RecordingOwner owner;
  TestRead far("o", 100, owner), delayed("o", 100, owner), now("o", 100, owner);
  const auto transport = store.open(1);
  const auto time = Clock::now() + std::chrono::milliseconds(40);
  transport->submit(far.read, much_later());
  transport->submit(delayed.read, time);
  transport->submit(now.read, Clock::time_point::min());
  REQUIRE(owner.wait_for(2));
  CHECK(owner.status_of(now.read).ok());
  CHECK(owner.status_of(delayed.read).ok());
  for (const auto& done : owner.completions()) {
    if (done.read == &delayed.read) CHECK(done.when >= time);
  }
  CHECK(owner.count_of(far.read) == 0);
}

FOR_EVERY_TRANSPORT("cancel completes all reads of that owner soon and no others") {
  Store store;
  const auto bytes = testing::random_bytes(20000, 8);
  store.put("o", bytes);
  RecordingOwner owner, other;
  std::deque<TestRead> delayed, running;
  for (int i = 0; i < 20; ++i) delayed.emplace_back("o", bytes.size(), owner);
  for (int i = 0; i < 200; ++i) running.emplace_back("o", bytes.size(), owner);
  TestRead waiting("o", bytes.size(), other), running_other("o", bytes.size(), other);
  {
    const auto transport = store.open(2);
    for (auto& prepared : delayed) transport->submit(prepared.read, much_later());
    transport->submit(waiting.read, much_later());
    for (auto& prepared : running) transport->submit(prepared.read);
    REQUIRE(owner.wait_for(1));
    owner.set_cancelled();
    transport->cancel(owner);
    REQUIRE(owner.wait_for(delayed.size() + running.size()));
    CHECK(other.count() == 0);
    // The transport still serves others; a read that was underway beside the cancelled ones may need another
    // try.
    for (size_t attempt = 1; attempt < 4; ++attempt) {
      transport->submit(running_other.read);
      REQUIRE(other.wait_for(attempt));
      if (other.status_of(running_other.read).ok()) break;
    }
    CHECK(running_other.holds(bytes));
  }
  CHECK(owner.count() == delayed.size() + running.size());
  for (auto& prepared : delayed) CHECK(owner.status_of(prepared.read).code() == ErrorCode::kCancelled);
  for (auto& prepared : running) {
    const Status status = owner.status_of(prepared.read);
    CHECK((status.ok() || status.code() == ErrorCode::kCancelled));
    if (status.ok()) CHECK(prepared.holds(bytes));
  }
}

FOR_EVERY_TRANSPORT("reads of an owner that gave up complete with kCancelled without being read") {
  Store store;
  store.put("o", testing::random_bytes(1000, 9));
  RecordingOwner owner;
  owner.set_cancelled();
  std::deque<TestRead> reads;
  for (int i = 0; i < 50; ++i) reads.emplace_back("o", 1000, owner);
  const auto transport = store.open(1);
  for (auto& prepared : reads) transport->submit(prepared.read);
  REQUIRE(owner.wait_for(reads.size()));
  for (auto& prepared : reads) CHECK(owner.status_of(prepared.read).code() == ErrorCode::kCancelled);
}

FOR_EVERY_TRANSPORT("destroying a transport completes whatever is outstanding first") {
  Store store;
  const auto bytes = testing::random_bytes(50000, 10);
  store.put("o", bytes);
  RecordingOwner owner;
  std::deque<TestRead> delayed, running;
  for (int i = 0; i < 10; ++i) delayed.emplace_back("o", bytes.size(), owner);
  for (int i = 0; i < 100; ++i) running.emplace_back("o", bytes.size(), owner);
  {
    const auto transport = store.open(2);
    for (auto& prepared : delayed) transport->submit(prepared.read, much_later());
    for (auto& prepared : running) transport->submit(prepared.read);
  }
  CHECK(owner.count() == delayed.size() + running.size());
  for (auto& prepared : delayed) CHECK(owner.status_of(prepared.read).code() == ErrorCode::kCancelled);
  for (auto& prepared : running) {
    const Status status = owner.status_of(prepared.read);
    CHECK(owner.count_of(prepared.read) == 1);
    CHECK((status.ok() || status.code() == ErrorCode::kCancelled));
    if (status.ok()) CHECK(prepared.holds(bytes));
  }
}

FOR_EVERY_TRANSPORT("an owner may submit again from complete(), until the transport refuses") {
  Store store;
  const auto bytes = testing::random_bytes(1000, 11);
  store.put("o", bytes);
  RecordingOwner owner;
  TestRead chained("o", bytes.size(), owner), endless("o", bytes.size(), owner);
  Transport* transport = nullptr;
  int left = 100;  // only on the thread that completes the chained read; one at a time
  owner.then([&](Read& read, const Status& status) {
    if (status.ok() && (&read == &endless.read || --left > 0)) transport->submit(read);
  });
  {
    const auto opened = store.open(2);
    transport = opened.get();
    transport->submit(chained.read);
    REQUIRE(owner.wait_for(100));
    CHECK(owner.count() == 100);
    CHECK(left == 0);
    transport->submit(endless.read);
    REQUIRE(owner.wait_for(150));
  }
  size_t refused = 0;
  for (const auto& done : owner.completions()) {
    if (done.status.ok()) continue;
    ++refused;
    CHECK(done.read == &endless.read);
    CHECK(done.status.code() == ErrorCode::kCancelled);
  }
  CHECK(refused == 1);
  CHECK(chained.holds(bytes));
}

FOR_EVERY_TRANSPORT("threads may submit at the same time") {
  Store store;
  const auto bytes = testing::random_bytes(5000, 12);
  store.put("o", bytes);
  RecordingOwner owner;
  std::deque<TestRead> reads;
  for (int i = 0; i < 400; ++i) reads.emplace_back("o", bytes.size(), owner);
  const auto transport = store.open(2);
  {
    std::vector<std::jthread> threads;
    for (size_t part = 0; part < 4; ++part) {
      threads.emplace_back([&, part] {
        for (size_t i = part; i < reads.size(); i += 4) transport->submit(reads[i].read);
      });
    }
  }
  REQUIRE(owner.wait_for(reads.size()));
  for (auto& prepared : reads) {
    CHECK(owner.status_of(prepared.read).ok());
    CHECK(prepared.holds(bytes));
  }
}

FOR_EVERY_TRANSPORT("a transport says what it is") {
  Store store;
  const auto transport = store.open(3);
  CHECK(transport->connections() == 3);
  CHECK_FALSE(transport->path().empty());
}

}  // namespace
}  // namespace rdmaload
