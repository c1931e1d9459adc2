// The client of both roads over a fake network: bytes, copies, faults, and who may write when.
#include "transport/rdma/rdma_transport.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "core/crc32c.h"
#include "support/fake_transport.h"
#include "support/rdma_server.h"
#include "support/reads.h"
#include "transport/memory_transport.h"
#include "transport/rdma/run_plan.h"

namespace rdmaload::rdma {
namespace {

using rdmaload::testing::Command;
using rdmaload::testing::pick;
using rdmaload::testing::random_bytes;
using rdmaload::testing::RecordingOwner;
using testing::FakeFaults;
using testing::FakeNetwork;
using testing::RdmaServer;
using Bytes = std::vector<std::byte>;
using namespace std::string_literals;

constexpr std::chrono::milliseconds kShort{150};

// A file in chunks, each a value of the server, and memory for all of it between guards.
class Model {
 public:
  Model(uint64_t chunk_bytes, size_t chunks, uint64_t last_bytes, ReadOwner& owner)
      : content(random_bytes((chunks - 1) * chunk_bytes + last_bytes, 11)),
        memory_(content.size() + 2 * kGuard, kFill) {
    for (size_t i = 0; i < chunks; ++i) {
      auto read = std::make_unique<Read>();
      read->object = "m/" + std::to_string(i);
      read->length = read->object_bytes = i + 1 == chunks ? last_bytes : chunk_bytes;
      read->segments = {{memory_.data() + kGuard + i * chunk_bytes, read->length}};
      read->checksum = true;
      read->owner = &owner;
      reads.push_back(std::move(read));
    }
  }
  Bytes chunk(size_t i) const {
    const size_t begin = i * reads[0]->length;
    return {content.begin() + static_cast<ptrdiff_t>(begin),
            content.begin() + static_cast<ptrdiff_t>(begin + reads[i]->length)};
  }
  template <typename Server>
  void put_into(Server& server) const {
    for (size_t i = 0; i < reads.size(); ++i) server.put(reads[i]->object, chunk(i));
  }
  std::span<std::byte> destination() { return std::span(memory_).subspan(kGuard, content.size()); }
  // All the bytes are there, and none beside them was touched.
  bool is_complete() const {
    Bytes expected(memory_.size(), kFill);
    std::copy(content.begin(), content.end(), expected.begin() + kGuard);
    return memory_ == expected;
  }
  bool guards_are_whole() const {
    return std::all_of(memory_.begin(), memory_.begin() + kGuard, [](std::byte b) { return b == kFill; }) &&
           std::all_of(memory_.end() - kGuard, memory_.end(), [](std::byte b) { return b == kFill; });
  }
  bool checksums_are_right() const {
    for (size_t i = 0; i < reads.size(); ++i) {
      if (reads[i]->crc != crc32c(0, chunk(i))) return false;
    }
    return true;
  }
  uint64_t copied_bytes() const {
    uint64_t sum = 0;
    for (const auto& read : reads) sum += read->copied_bytes;
    return sum;
  }

  const Bytes content;
  std::vector<std::unique_ptr<Read>> reads;

 private:
  static constexpr size_t kGuard = 64;
  static constexpr std::byte kFill{0xa5};
  Bytes memory_;
};

TransportOptions options_for(FakeNetwork& network, int port, int connections = 1) {
  TransportOptions options;
  options.endpoint.host = "fake";
  options.endpoint.port = port;
  options.endpoint.name = "rdma://fake";
  options.endpoint.connect_timeout = std::chrono::seconds(20);
  options.endpoint.inactivity_timeout = std::chrono::seconds(20);
  options.connections = connections;
  options.fabric = std::shared_ptr<Fabric>(&network, [](Fabric*) {});
  return options;
}

// Reads everything, at once; whether all of it went well.
bool read_all(Transport& transport, Model& model, RecordingOwner& owner) {
  for (const auto& read : model.reads) transport.submit(*read);
  if (!owner.wait_for(model.reads.size())) return false;
  bool ok = true;
  for (const auto& read : model.reads) {
    const Status status = owner.status_of(*read);
    CHECK_MESSAGE(status.ok(), status.message());
    ok &= status.ok();
  }
  return ok;
}

// Until `done`, which the owner counts before it writes a completion down, is `wanted`. The completions are
// looked at before it: the last one may come in between.
bool wait_until_done(RecordingOwner& owner, const std::atomic<size_t>& done, size_t wanted) {
  for (size_t seen = owner.count(); done < wanted; seen = owner.count()) {
    if (!owner.wait_for(seen + 1)) return false;
  }
  return true;
}

bool mentions(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

TEST_CASE("from our server every byte lands in its place and none is copied") {
  FakeNetwork network;
  RdmaServer server(network, {});
  RecordingOwner owner;
  Model model(10'000, 40, 3'333, owner);
  model.put_into(server);
  RdmaTransport transport(options_for(network, server.port(), 3));
  const std::span<std::byte> destination = model.destination();
  auto lease = transport.prepare({&destination, 1});
  REQUIRE(read_all(transport, model, owner));
  CHECK(model.is_complete());
  CHECK(model.checksums_are_right());
  CHECK(model.copied_bytes() == 0);
  CHECK(transport.path() == "resp-rdma");
  CHECK(transport.fallback_reason().empty());
  CHECK(mentions(transport.description(), "RDMALOAD.READ over fake0"));
  CHECK(network.refused_writes() == 0);
}

TEST_CASE("memory that was not announced is reached through a ring, and counted") {
  FakeNetwork network;
  RdmaServer server(network, {});
  RecordingOwner owner;
  Model model(10'000, 40, 3'333, owner);
  model.put_into(server);
  RdmaTransport transport(options_for(network, server.port(), 2));
  REQUIRE(read_all(transport, model, owner));
  CHECK(model.is_complete());
  CHECK(model.checksums_are_right());
  CHECK(model.copied_bytes() == model.content.size());
  CHECK(transport.fallback_reason().empty());  // nobody asked for anything else
}

TEST_CASE("what may not be locked is staged, which is said with the reason") {
  FakeNetwork network;
  RdmaServer server(network, {});
  RecordingOwner owner;
  Model model(100'000, 30, 3'333, owner);
  model.put_into(server);
  TransportOptions options = options_for(network, server.port());
  options.bytes_in_flight = 1;
  RdmaTransport transport(options);
  // More than there is, so that only this is too much for the limit: a fake card looks at numbers.
  const std::span<std::byte> destination(model.destination().data(), 64 << 20);
  auto lease = transport.prepare({&destination, 1});
  network.set([](FakeFaults& faults) { faults.memlock_bytes = 32 << 20; });
  REQUIRE(read_all(transport, model, owner));
  CHECK(model.is_complete());
  CHECK(transport.path() == "resp-rdma");
  CHECK(model.copied_bytes() == model.content.size());
  CHECK(mentions(transport.fallback_reason(), "staged in host memory"));
  CHECK(mentions(transport.fallback_reason(), "locked memory"));
}

// Has room for so many connections.
class LimitedFabric final : public Fabric {
 public:
  LimitedFabric(FakeNetwork& network, int room) : network_(network), room_(room) {}
  std::unique_ptr<QueuePair> resolve(const Remote& remote, Deadline deadline,
                                     const GiveUp& give_up) override {
    if (room_-- <= 0) throw Error(ErrorCode::kDevice, "no more memory may be locked");
    return network_.resolve(remote, deadline, give_up);
  }
  std::unique_ptr<Listener> listen(const std::string& address, int port, bool share_domain) override {
    return network_.listen(address, port, share_domain);
  }

 private:
  FakeNetwork& network_;
  std::atomic<int> room_;
};

TEST_CASE("connections that find no memory to lock leave the work to those that did") {
  FakeNetwork network;
  RdmaServer server(network, {});
  RecordingOwner owner;
  Model model(10'000, 60, 3'333, owner);
  model.put_into(server);
  TransportOptions options = options_for(network, server.port(), 4);
  options.bytes_in_flight = 40'000;
  options.fabric = std::make_shared<LimitedFabric>(network, 2);
  options.fall_back = [] { return std::make_unique<MemoryTransport>(); };  // which has nothing
  RdmaTransport transport(options);
  const std::span<std::byte> destination = model.destination();
  auto lease = transport.prepare({&destination, 1});
  REQUIRE(read_all(transport, model, owner));
  CHECK(model.is_complete());
  CHECK(server.connections() <= 2);
  CHECK(transport.path() == "resp-rdma");
}

TEST_CASE("a destination is registered once, by the first read into it, and never after it was given back") {
  FakeNetwork network;
  RdmaServer server(network, {});
  RecordingOwner owner;
  Model model(10'000, 30, 10'000, owner);
  model.put_into(server);
  RdmaTransport transport(options_for(network, server.port(), 3));
  const std::span<std::byte> destination = model.destination();
  auto lease = transport.prepare({&destination, 1});
  CHECK(network.registered_bytes() < destination.size());
  REQUIRE(read_all(transport, model, owner));
  const uint64_t with = network.registered_bytes();
  lease.reset();
  CHECK(with - network.registered_bytes() == destination.size());
}

TEST_CASE("from a Valkey all but the edges of runs land in their places") {
  for (const uint32_t server_window : {64u, 1000u, 1u << 16}) {
    CAPTURE(server_window);
    FakeNetwork network;
    RdmaServer::Options server_options;
    server_options.ours = false;
    server_options.window_bytes = server_window;
    RdmaServer server(network, server_options);
    RecordingOwner owner;
    Model model(10'000, 60, 3'333, owner);
    model.put_into(server);
    RdmaTransport transport(options_for(network, server.port(), 2));
    const std::span<std::byte> destination = model.destination();
    auto lease = transport.prepare({&destination, 1});
    REQUIRE(read_all(transport, model, owner));
    CHECK(model.is_complete());
    CHECK(model.checksums_are_right());
    CHECK(transport.path() == "resp-rdma");
    CHECK(mentions(transport.description(), "Valkey over RDMA"));
    CHECK(model.copied_bytes() < model.content.size() / 2);  // how runs fall is a matter of threads
    CHECK(network.refused_writes() == 0);
  }
}

TEST_CASE("values from a byte to several windows, with holes and dropped bytes, over both roads") {
  std::mt19937_64 random(5);
  for (int round = 0; round < 40; ++round) {
    CAPTURE(round);
    FakeNetwork network;
    RdmaServer::Options server_options;
    server_options.ours = round % 2 == 0;
    server_options.window_bytes = static_cast<uint32_t>(pick(random, 48, 5000));
    server_options.max_segments = pick(random, 1, 5);
    RdmaServer server(network, server_options);
    RecordingOwner owner;
    std::vector<std::unique_ptr<rdmaload::testing::TestRead>> reads;
    std::vector<Bytes> objects;
    for (size_t i = 0; i < 12; ++i) {
      const uint64_t bytes = pick(random, 0, 3) == 0 ? pick(random, 1, 20) : pick(random, 1, 20'000);
      objects.push_back(random_bytes(bytes, random()));
      server.put("o" + std::to_string(i), objects.back());
      const uint64_t offset = pick(random, 0, 1) == 0 ? 0 : pick(random, 0, bytes - 1);
      const uint64_t length = pick(random, 0, 1) == 0 ? bytes - offset : pick(random, 1, bytes - offset);
      reads.push_back(std::make_unique<rdmaload::testing::TestRead>(
          "o" + std::to_string(i), bytes, offset, rdmaload::testing::random_segments(random, length), owner));
    }
    RdmaTransport transport(options_for(network, server.port(), 2));
    std::vector<std::span<std::byte>> destinations;
    for (const auto& read : reads) {
      for (const Segment& segment : read->read.segments) {
        if (segment.data != nullptr) destinations.emplace_back(segment.data, segment.size);
      }
    }
    auto lease = transport.prepare(destinations);
    for (const auto& read : reads) transport.submit(read->read);
    REQUIRE(owner.wait_for(reads.size()));
    for (size_t i = 0; i < reads.size(); ++i) {
      const Status status = owner.status_of(reads[i]->read);
      CHECK_MESSAGE(status.ok(), status.message());
      CHECK(reads[i]->holds(objects[i]));
      const Read& read = reads[i]->read;
      CHECK(read.crc == crc32c(0, std::span(objects[i]).subspan(read.offset, read.length)));
    }
  }
}

TEST_CASE("what a server says of a value is the read's error, and the others are read") {
  struct Case {
    bool ours;
    std::string reply;
    ErrorCode code;
  };
  for (const Case& expected :
       {Case{true, "", ErrorCode::kNotFound}, Case{false, "", ErrorCode::kNotFound},
        Case{true, "size", ErrorCode::kIntegrity}, Case{false, "size", ErrorCode::kIntegrity},
        Case{true, "-NOAUTH x\r\n", ErrorCode::kAuthentication},
        Case{false, "-NOAUTH x\r\n", ErrorCode::kAuthentication},
        Case{true, "-RANGE x\r\n", ErrorCode::kIntegrity}}) {
    CAPTURE(expected.ours);
    CAPTURE(expected.reply);
    FakeNetwork network;
    RdmaServer::Options server_options;
    server_options.ours = expected.ours;
    RdmaServer server(network, server_options);
    RecordingOwner owner;
    rdmaload::testing::TestRead bad("bad", 5000, owner), good("good", 5000, owner);
    const Bytes object = random_bytes(5000, 3);
    server.put("good", object);
    if (expected.reply == "size") server.put("bad", random_bytes(5001, 3));
    if (expected.reply.starts_with("-")) {
      server.hook([&](const Command& command) -> std::optional<std::string> {
        if (command.size() < 2 || command[1] != "bad" || command[0] == "GETRANGE") return std::nullopt;
        return command.size() > 2 && command[2] == "0" ? std::nullopt : std::optional(expected.reply);
      });
    }
    RdmaTransport transport(options_for(network, server.port()));
    transport.submit(bad.read);
    REQUIRE(owner.wait_for(1));
    CHECK(owner.status_of(bad.read).code() == expected.code);
    transport.submit(good.read);
    REQUIRE(owner.wait_for(2));
    CHECK(owner.status_of(good.read).ok());
    CHECK(good.holds(object));
    CHECK(transport.path() == "resp-rdma");
  }
}

TEST_CASE("replies of a Valkey that are no values are their reads' errors, on a connection that goes on") {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    FakeNetwork network;
    RdmaServer::Options server_options;
    server_options.ours = false;
    server_options.window_bytes = static_cast<uint32_t>(pick(random, 64, 30'000));
    RdmaServer server(network, server_options);
    RecordingOwner owner;
    constexpr size_t kChunks = 40;
    constexpr uint64_t kBytes = 5'000;
    Model model(kBytes, kChunks, pick(random, 1, kBytes), owner);
    model.put_into(server);
    std::map<const Read*, ErrorCode> wrong;
    for (size_t i = 0; i < kChunks; ++i) {
      Read& read = *model.reads[i];
      switch (pick(random, 0, 9)) {
        case 0:  // no such key
          read.object = "gone/" + std::to_string(i);
          wrong[&read] = ErrorCode::kNotFound;
          break;
        case 1:  // another size, above and below; two windows of it and no more are taken
          server.put(read.object, random_bytes(pick(random, 0, 1) == 0 ? pick(random, 0, read.length - 1)
                                                                       : pick(random, read.length + 1, 9'000),
                                               seed));
          wrong[&read] = ErrorCode::kIntegrity;
          break;
        case 2:
          read.object = "denied/" + std::to_string(i);
          wrong[&read] = ErrorCode::kAuthentication;
          break;
        case 3:  // a range of a key that is not there
          read.object = "gone/" + std::to_string(i);
          read.object_bytes = read.length + 5;
          wrong[&read] = ErrorCode::kNotFound;
          break;
        default:
          break;
      }
    }
    server.hook([](const Command& command) -> std::optional<std::string> {
      if (command.size() > 1 && command[1].starts_with("denied/"))
        return "-NOPERM no permissions to access\r\n";
      return std::nullopt;
    });
    RdmaTransport transport(options_for(network, server.port()));
    const std::span<std::byte> destination = model.destination();
    auto lease = transport.prepare({&destination, 1});
    for (const auto& read : model.reads) transport.submit(*read);
    REQUIRE(owner.wait_for(kChunks));
    CHECK(server.connections() == 1);
    CHECK(network.refused_writes() == 0);
    for (size_t i = 0; i < kChunks; ++i) {
      const Read& read = *model.reads[i];
      CAPTURE(i);
      const Status status = owner.status_of(read);
      CAPTURE(status.message());
      CHECK(owner.count_of(read) == 1);
      if (const auto expected = wrong.find(&read); expected != wrong.end()) {
        CHECK(status.code() == expected->second);
        CHECK(mentions(status.message(), read.object));
        continue;
      }
      CHECK(status.ok());
      const Segment& segment = read.segments[0];
      CHECK(Bytes(segment.data, segment.data + segment.size) == model.chunk(i));
      CHECK(read.crc == crc32c(0, model.chunk(i)));
    }
    CHECK(model.guards_are_whole());
  }
}

TEST_CASE("a read that has failed on a Valkey is not written to by what comes later on its connection") {
  FakeNetwork network;
  RdmaServer::Options server_options;
  server_options.ours = false;
  RdmaServer server(network, server_options);
  RecordingOwner owner;
  Model model(5'000, 48, 5'000, owner);
  model.put_into(server);
  // Its owner fills the memory itself, as another connection would, as soon as the read has failed.
  std::set<const Read*> gone;
  for (size_t i = 3; i < 48; i += 7) {
    model.reads[i]->object = "gone/" + std::to_string(i);
    gone.insert(model.reads[i].get());
  }
  owner.then([&](Read& read, const Status& status) {
    if (status.ok()) return;
    const size_t i = std::stoul(read.object.substr(5));
    const Bytes bytes = model.chunk(i);
    std::copy(bytes.begin(), bytes.end(), read.segments[0].data);
  });
  RdmaTransport transport(options_for(network, server.port()));
  const std::span<std::byte> destination = model.destination();
  auto lease = transport.prepare({&destination, 1});
  for (const auto& read : model.reads) transport.submit(*read);
  REQUIRE(owner.wait_for(48));
  for (const Read* read : gone) CHECK(owner.status_of(*read).code() == ErrorCode::kNotFound);
  CHECK(model.is_complete());
  CHECK(server.connections() == 1);
}

TEST_CASE("what arrived from a Valkey is whole although the connection fails while it goes on") {
  for (size_t nth = 1; nth <= 40; ++nth) {
    CAPTURE(nth);
    FakeNetwork network;
    RdmaServer::Options server_options;
    server_options.ours = false;
    RdmaServer server(network, server_options);
    RecordingOwner owner;
    Model model(5'000, 24, 5'000, owner);
    model.put_into(server);
    for (const auto& read : model.reads) read->checksum = false;  // so that nothing else finds a wrong byte
    RdmaTransport transport(options_for(network, server.port()));
    std::atomic<size_t> done{0}, failed{0};
    owner.then([&](Read& read, const Status& status) {
      if (status.ok()) {
        if (++done == 1) network.set([&](FakeFaults& faults) { faults.fail_client_post = nth; });
      } else {
        ++failed;
        transport.submit(read);
      }
    });
    const std::span<std::byte> destination = model.destination();
    auto lease = transport.prepare({&destination, 1});
    for (const auto& read : model.reads) transport.submit(*read);
    REQUIRE(wait_until_done(owner, done, model.reads.size()));
    CHECK(model.is_complete());
    if (nth < 10) CHECK(failed > 0);  // else there may be no such post
  }
}

// Takes over as TCP would. Before it completes anything, everything that the RDMA server ever posted is
// delivered: the latest moment at which it could do harm.
class LateTcp final : public Transport {
 public:
  LateTcp(FakeNetwork& network, const Model& model) : network_(network), model_(model) {}
  using Transport::submit;
  void submit(Read& read, Clock::time_point) override {
    rdmaload::testing::deliver(read, model_.chunk(std::stoul(read.object.substr(2))));
    network_.deliver(10'000);
    read.owner->complete(read, Status());
  }
  void cancel(const ReadOwner&) override {}
  std::string_view path() const noexcept override { return "late-tcp"; }
  int connections() const noexcept override { return 1; }

 private:
  FakeNetwork& network_;
  const Model& model_;
};

// Submits again what failed for want of a connection, as Load does.
void retry_over(Transport& transport, RecordingOwner& owner, std::atomic<size_t>& done) {
  owner.then([&](Read& read, const Status& status) {
    if (status.ok()) {
      ++done;
    } else if (status.code() == ErrorCode::kUnavailable || status.code() == ErrorCode::kTimeout) {
      transport.submit(read);
    }
  });
}

TEST_CASE("what the server writes after the deadline does not land in memory that TCP has filled") {
  for (const bool ours : {true, false}) {
    CAPTURE(ours);
    FakeNetwork network;
    RdmaServer::Options server_options;
    server_options.ours = ours;
    RdmaServer server(network, server_options);
    RecordingOwner owner;
    Model model(10'000, 12, 10'000, owner);
    model.put_into(server);
    // What is read by RDMA is wrong, so that it shows.
    for (const auto& read : model.reads) server.put(read->object, random_bytes(read->length, 99));
    TransportOptions options = options_for(network, server.port());
    options.endpoint.inactivity_timeout = kShort;
    options.fall_back = [&] { return std::make_unique<LateTcp>(network, model); };
    RdmaTransport transport(options);
    std::atomic<size_t> done{0};
    retry_over(transport, owner, done);
    // Nothing is delivered from the first request for weights on; the server has posted its answers by then.
    std::atomic<bool> stalled{false};
    server.hook([&](const Command& command) -> std::optional<std::string> {
      const bool weights = ours ? command[0] == "RDMALOAD.READ" && command[2] != "0" : command[0] == "GET";
      if (weights && !stalled.exchange(true)) network.set([](FakeFaults& faults) { faults.held = true; });
      return std::nullopt;
    });
    const std::span<std::byte> destination = model.destination();
    auto lease = transport.prepare({&destination, 1});
    for (const auto& read : model.reads) transport.submit(*read);
    REQUIRE(wait_until_done(owner, done, model.reads.size()));
    network.deliver(10'000);
    CHECK(stalled);
    CHECK(model.is_complete());
    CHECK(transport.path() == "late-tcp");
    CHECK(mentions(transport.fallback_reason(), "RDMA was given up"));
    CHECK(mentions(transport.fallback_reason(), "no byte came"));
  }
}

TEST_CASE("a connection that is cut mid-load is made again, and when that fails TCP takes what is missing") {
  for (const bool ours : {true, false}) {
    for (const bool comes_back : {true, false}) {
      CAPTURE(ours);
      CAPTURE(comes_back);
      FakeNetwork network;
      RdmaServer::Options server_options;
      server_options.ours = ours;
      auto server = std::make_unique<RdmaServer>(network, server_options);
      RecordingOwner owner;
      Model model(10'000, 40, 10'000, owner);
      model.put_into(*server);
      TransportOptions options = options_for(network, server->port(), 2);
      options.bytes_in_flight = 40'000;
      options.fall_back = [&] { return std::make_unique<LateTcp>(network, model); };
      RdmaTransport transport(options);
      std::atomic<size_t> done{0};
      std::atomic<bool> cut{false};
      owner.then([&](Read& read, const Status& status) {
        if (status.ok()) {
          if (++done == 20 && !cut.exchange(true)) {
            if (!comes_back) network.set([](FakeFaults& faults) { faults.no_device = true; });
            network.cut();
          }
        } else {
          transport.submit(read);
        }
      });
      const std::span<std::byte> destination = model.destination();
      auto lease = transport.prepare({&destination, 1});
      for (const auto& read : model.reads) transport.submit(*read);
      REQUIRE(wait_until_done(owner, done, model.reads.size()));
      CHECK(model.is_complete());
      CHECK(model.checksums_are_right());
      if (!comes_back) {
        CHECK(transport.path() == "late-tcp");
        CHECK(mentions(transport.fallback_reason(), "no RDMA device"));
      }
      lease.reset();
    }
  }
}

TEST_CASE("without RDMA the reads go to TCP at once, with the reason") {
  struct Case {
    std::function<void(FakeFaults&)> fault;
    std::string reason;
    RdmaServer::Options server;
    std::string password;
  };
  std::vector<Case> cases;
  cases.push_back({[](FakeFaults& faults) { faults.no_device = true; }, "no RDMA device", {}, ""});
  cases.push_back({[](FakeFaults& faults) { faults.no_answer = true; }, "", {}, ""});
  cases.push_back({[](FakeFaults& faults) { faults.memlock_bytes = 1000; }, "locked memory", {}, ""});
  RdmaServer::Options wrong;
  wrong.wrong_echo = true;
  cases.push_back({[](FakeFaults&) {}, "self-test", wrong, ""});
  RdmaServer::Options locked;
  locked.password = "secret";
  cases.push_back({[](FakeFaults&) {}, "WRONGPASS", locked, "guess"});
  for (const Case& expected : cases) {
    CAPTURE(expected.reason);
    FakeNetwork network;
    RdmaServer server(network, expected.server);
    RecordingOwner owner;
    Model model(10'000, 6, 77, owner);
    network.set(expected.fault);
    TransportOptions options = options_for(network, server.port(), 3);
    options.endpoint.connect_timeout = std::chrono::milliseconds(300);
    options.endpoint.password = expected.password;
    options.fall_back = [&] { return std::make_unique<LateTcp>(network, model); };
    RdmaTransport transport(options);
    const std::span<std::byte> destination = model.destination();
    auto lease = transport.prepare({&destination, 1});
    REQUIRE(read_all(transport, model, owner));
    CHECK(model.is_complete());
    CHECK(transport.path() == "late-tcp");
    CHECK(mentions(transport.fallback_reason(), "no RDMA: "));
    CHECK(mentions(transport.fallback_reason(), expected.reason));
    CHECK_FALSE(mentions(transport.fallback_reason(), "guess"));
  }
}

TEST_CASE("a wrong byte in the self-test of direct reads is found before a weight is read") {
  FakeNetwork network;
  RdmaServer server(network, {});
  RecordingOwner owner;
  Model model(10'000, 6, 77, owner);
  model.put_into(server);
  server.hook([](const Command& command) -> std::optional<std::string> {
    if (command[0] != "RDMALOAD.READ") return std::nullopt;
    return ":10000\r\n";  // and nothing was written
  });
  TransportOptions options = options_for(network, server.port());
  options.fall_back = [&] { return std::make_unique<LateTcp>(network, model); };
  RdmaTransport transport(options);
  REQUIRE(read_all(transport, model, owner));
  CHECK(model.is_complete());
  CHECK(mentions(transport.fallback_reason(), "self-test"));
}

TEST_CASE("where falling back is not allowed the error is the read's") {
  FakeNetwork network;
  RecordingOwner owner;
  rdmaload::testing::TestRead read("k", 5000, owner);
  SUBCASE("no card") {
    network.set([](FakeFaults& faults) { faults.no_device = true; });
    RdmaTransport transport(options_for(network, 1));
    transport.submit(read.read);
    REQUIRE(owner.wait_for(1));
    CHECK(owner.status_of(read.read).code() == ErrorCode::kNotSupported);
  }
  SUBCASE("nobody listens") {
    RdmaTransport transport(options_for(network, 1));
    transport.submit(read.read);
    REQUIRE(owner.wait_for(1));
    CHECK(owner.status_of(read.read).code() == ErrorCode::kUnavailable);
    CHECK(transport.path() == "resp-rdma");
  }
}

TEST_CASE("a read that is cancelled in flight ends soon, and nothing lands afterwards") {
  for (const bool ours : {true, false}) {
    CAPTURE(ours);
    FakeNetwork network;
    RdmaServer::Options server_options;
    server_options.ours = ours;
    RdmaServer server(network, server_options);
    RecordingOwner owner;
    Model model(10'000, 8, 10'000, owner);
    model.put_into(server);
    std::atomic<bool> asked{false};
    server.hook([&](const Command& command) -> std::optional<std::string> {
      const bool weights = ours ? command[0] == "RDMALOAD.READ" && command[2] != "0" : command[0] == "GET";
      if (weights && !asked.exchange(true)) {
        network.set([](FakeFaults& faults) { faults.held = true; });
        owner.set_cancelled();
      }
      return std::nullopt;
    });
    RdmaTransport transport(options_for(network, server.port()));
    const std::span<std::byte> destination = model.destination();
    auto lease = transport.prepare({&destination, 1});
    for (const auto& read : model.reads) transport.submit(*read);
    REQUIRE(owner.wait_for(model.reads.size()));
    for (const auto& read : model.reads) CHECK(owner.status_of(*read).code() == ErrorCode::kCancelled);
    lease.reset();
    const Bytes before(destination.begin(), destination.end());
    network.deliver(10'000);
    CHECK(std::equal(before.begin(), before.end(), destination.begin()));
  }
}

TEST_CASE("destroying a transport completes what is in flight") {
  for (const bool ours : {true, false}) {
    FakeNetwork network;
    RdmaServer::Options server_options;
    server_options.ours = ours;
    RdmaServer server(network, server_options);
    server.hook([&](const Command& command) -> std::optional<std::string> {
      return command[0] == "RDMALOAD.READ" || command[0] == "GET" ? std::optional(""s) : std::nullopt;
    });
    RecordingOwner owner;
    Model model(10'000, 8, 10'000, owner);
    {
      RdmaTransport transport(options_for(network, server.port(), 2));
      for (const auto& read : model.reads) transport.submit(*read);
    }
    CHECK(owner.count() == model.reads.size());
    server.stop();
    CHECK(network.registered_bytes() == 0);
  }
}

}  // namespace
}  // namespace rdmaload::rdma
