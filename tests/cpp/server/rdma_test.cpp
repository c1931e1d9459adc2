// The server over RDMA, on a network in memory: what it sends from where, what it holds, and how it treats
// clients as they should not be. Over real verbs: tests/rdma and the suite needs_rdma.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <functional>
#include <thread>

#include "core/error.h"
#include "server/server.h"
#include "support/bytes.h"
#include "support/fake_queue_pair.h"
#include "support/rdma_client.h"
#include "support/temp_dir.h"

using namespace rdmaload;
using namespace rdmaload::server;
using rdmaload::rdma::testing::FakeFaults;
using rdmaload::rdma::testing::FakeNetwork;
using rdmaload::testing::bytes_of;
using rdmaload::testing::random_bytes;
using rdmaload::testing::RdmaClient;
using rdmaload::testing::TempDir;
using rdmaload::testing::text_of;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr auto kPatience = std::chrono::seconds(30);  // only an overloaded machine needs so long

struct Running {
  explicit Running(ServerOptions options = {}, uint64_t limit = 256 * kMiB)
      : network(std::make_shared<FakeNetwork>()), memory(ValueMemory::make(limit)) {
    store = std::make_shared<Store>(memory);
    options.rdma.host = "10.0.0.1";
    options.rdma.fabric = network;
    server.emplace(store, std::move(options));
  }
  const Counters& counters() { return server->counters(); }
  std::unique_ptr<RdmaClient> client(uint32_t window = 64 << 10) {
    return std::make_unique<RdmaClient>(*network, "10.0.0.1", server->rdma_port(), window);
  }
  void put(const std::string& key, std::span<const std::byte> bytes) {
    const auto value = memory->allocate(bytes.size());
    REQUIRE(value != nullptr);
    std::copy(bytes.begin(), bytes.end(), value->fill().begin());
    REQUIRE(store->set(key, value, SetCondition::kAlways) == Outcome::kDone);
  }
  std::shared_ptr<FakeNetwork> network;
  std::shared_ptr<ValueMemory> memory;
  std::shared_ptr<Store> store;
  std::optional<Server> server;
};

bool eventually(const std::function<bool()>& condition) {
  const auto deadline = Clock::now() + kPatience;
  while (!condition()) {
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

std::string words(const std::vector<std::string>& arguments) { return RdmaClient::words(arguments); }

std::string address_text(const std::byte* at) { return std::to_string(reinterpret_cast<uintptr_t>(at)); }

// RDMALOAD.READ of segments {offset, length, where}.
struct Segment {
  uint64_t offset, length;
  const std::byte* to;
};
std::vector<std::string> read_of(const std::string& key, uint64_t size, const rdma::MemoryRegion& region,
                                 const std::vector<Segment>& segments) {
  std::vector<std::string> arguments{"RDMALOAD.READ", key, std::to_string(size)};
  for (const Segment& segment : segments) {
    arguments.push_back(std::to_string(segment.offset));
    arguments.push_back(std::to_string(segment.length));
    arguments.push_back(address_text(segment.to));
    arguments.push_back(std::to_string(region.remote_key()));
  }
  return arguments;
}

FileRange export_bytes(const TempDir& directory, const std::string& name, std::span<const std::byte> bytes) {
  directory.write(name, bytes);
  const std::string path = directory.path() / name;
  struct stat status{};
  REQUIRE(stat(path.c_str(), &status) == 0);
  const int64_t written = int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
  return {std::make_shared<const ExportedFile>(path, bytes.size(), written), 0, bytes.size()};
}

}  // namespace

TEST_CASE("over RDMA values of every size come back byte-equal, whatever the client's window") {
  Running running;
  for (const uint32_t window : {64u << 10, 100'001u, 3u << 20}) {
    CAPTURE(window);
    const auto client = running.client(window);
    for (const size_t size :
         {size_t{0}, size_t{1}, size_t{4095}, size_t{32} << 10, size_t{1044480}, size_t{9} << 20}) {
      CAPTURE(size);
      const std::string value = text_of(random_bytes(size, size + window));
      CHECK(client->ask({"SET", "k", value}) == "+OK\r\n");
      client->send(words({"GET", "k"}) + words({"GETRANGE", "k", "-3", "-1"}) + words({"STRLEN", "k"}));
      CHECK((client->bulk() == value));
      CHECK(client->bulk() == value.substr(value.size() - std::min<size_t>(3, value.size())));
      CHECK(client->line() == ":" + std::to_string(size) + "\r\n");
    }
  }
  // Large values were not copied on their way out, small ones were.
  CHECK(running.counters().rdma_direct_bytes == 3 * ((32 << 10) + 1044480 + (9 << 20)));
}

TEST_CASE("a read places bytes exactly where the client says, and nothing beside them") {
  Running running;
  const auto value = random_bytes(70 * kMiB, 1);  // registered in parts of 32 MiB
  running.put("k", value);
  const auto client = running.client();
  std::vector<std::byte> memory(value.size() + 64, std::byte{0xee});
  const auto region = client->offer(memory);
  // All of it, one byte further on than aligned.
  CHECK(client->ask(read_of("k", value.size(), *region, {{0, value.size(), memory.data() + 33}})) ==
        ":" + std::to_string(value.size()) + "\r\n");
  CHECK((std::equal(value.begin(), value.end(), memory.begin() + 33)));
  for (size_t i = 0; i < 33; ++i) CHECK(memory[i] == std::byte{0xee});
  for (size_t i = value.size() + 33; i < memory.size(); ++i) CHECK(memory[i] == std::byte{0xee});
  // Segments in any order, of any length, none included, of a value of any size.
  std::fill(memory.begin(), memory.end(), std::byte{0xee});
  CHECK(client->ask(read_of("k", 0, *region,
                            {{kMiB, 1000, memory.data() + 5000},
                             {7, 1, memory.data()},
                             {3, 0, memory.data()},
                             {value.size() - 1, 1, memory.data() + 1}})) ==
        ":" + std::to_string(value.size()) + "\r\n");
  CHECK((std::equal(value.begin() + kMiB, value.begin() + kMiB + 1000, memory.begin() + 5000)));
  CHECK(memory[0] == value[7]);
  CHECK(memory[1] == value.back());
  CHECK(memory[2] == std::byte{0xee});
  CHECK(memory[4999] == std::byte{0xee});
  CHECK(memory[6000] == std::byte{0xee});
  CHECK(running.counters().rdma_copied_bytes == 0);
  CHECK(running.counters().rdma_direct_bytes == value.size() + 1002);
}

TEST_CASE("a read costs one work request per segment, and one for its reply") {
  Running running;
  constexpr size_t kChunk = kMiB - 4096;
  const auto value = random_bytes(kChunk, 2);
  running.put("k", value);
  const auto client = running.client();
  std::vector<std::byte> memory(kChunk);
  const auto region = client->offer(memory);
  constexpr uint64_t kReads = 100;
  for (int round = 0; round < 2; ++round) {
    const uint64_t before = running.counters().rdma_work_requests;
    for (uint64_t i = 0; i < kReads; ++i)
      client->send(words(read_of("k", kChunk, *region, {{0, kChunk, memory.data()}})));
    for (uint64_t i = 0; i < kReads; ++i) CHECK(client->line() == ":1044480\r\n");
    CHECK((memory == value));
    REQUIRE(eventually([&] { return running.counters().rdma_work_requests >= before + kReads; }));
    // Replies that are ready together share a write; now and then a window is announced, or it says that it
    // lives: every three seconds, which a busy machine may take for this. A third request per read is far
    // off.
    CHECK(running.counters().rdma_work_requests - before <= 2 * kReads + 30);
  }
  CHECK(running.counters().rdma_direct_bytes == 2 * kReads * kChunk);
  CHECK(running.counters().rdma_copied_bytes == 0);
}

TEST_CASE("a read of what is not as the client thinks writes nothing and says so") {
  Running running;
  running.put("k", random_bytes(100'000, 3));
  const auto client = running.client();
  std::vector<std::byte> memory(100'000, std::byte{0xee});
  const auto region = client->offer(memory);
  const std::byte* to = memory.data();
  CHECK(client->ask({"RDMALOAD.HELLO", "2"}).substr(0, 8) == "-NOPROTO");
  CHECK(client->ask({"RDMALOAD.HELLO", "1"}) == "*4\r\n");
  CHECK(client->bulk() == "version");
  CHECK(client->line() == ":1\r\n");
  CHECK(client->bulk() == "max_segments");
  const uint64_t most = std::stoull(client->line().substr(1));
  CHECK(client->ask(read_of("absent", 0, *region, {{0, 1, to}})).substr(0, 9) == "-NOTFOUND");
  CHECK(client->ask(read_of("k", 99'999, *region, {{0, 1, to}})) == "-SIZE 100000\r\n");
  CHECK(client->ask(read_of("k", 100'000, *region, {{0, 1, to}, {1, 100'000, to}})).substr(0, 6) == "-RANGE");
  CHECK(client->ask(read_of("k", 0, *region, {{100'001, 0, to}})).substr(0, 6) == "-RANGE");
  CHECK(client->ask(read_of("k", 0, *region, {{UINT64_MAX, 2, to}})).substr(0, 6) == "-RANGE");
  CHECK(client->ask({"RDMALOAD.READ", "k", "0", "0", "1", "99"}).substr(0, 4) == "-ERR");
  CHECK(client->ask({"RDMALOAD.READ", "k", "0", "0", "1", "-1", "1"}).substr(0, 4) == "-ERR");
  CHECK(client->ask({"RDMALOAD.READ", "k", "0", "0", "1", "1", "4294967296"}).substr(0, 4) == "-ERR");
  CHECK(client->ask({"RDMALOAD.READ", "k", "x", "0", "1", "1", "1"}).substr(0, 4) == "-ERR");
  CHECK(client->ask({"SADD", "names", "a"}) == ":1\r\n");
  CHECK(client->ask(read_of("names", 0, *region, {{0, 1, to}})).substr(0, 10) == "-WRONGTYPE");
  CHECK((memory == std::vector<std::byte>(100'000, std::byte{0xee})));
  CHECK(running.counters().rdma_reads == 0);
  // As many segments as were promised, and one more.
  std::vector<Segment> segments(most, Segment{0, 1, to});
  CHECK(client->ask(read_of("k", 0, *region, segments)) == ":100000\r\n");
  segments.push_back({0, 1, to});
  CHECK(client->ask(read_of("k", 0, *region, segments)).substr(0, 4) == "-ERR");
}

TEST_CASE("over TCP there is no such thing as a read into the client's memory") {
  auto memory = ValueMemory::make(kMiB);
  Store store(memory);
  Counters counters;
  Shared shared{store, counters, "", "", 0, 0, 1, 1, {}, {}, {}};
  Session session(shared, 1, "somewhere");
  session.consume(words({"RDMALOAD.HELLO", "1"}));
  CHECK(session.replies().front().text.substr(0, 20) == "-ERR unknown command");
}

TEST_CASE("exported files and small values are copied once, and counted") {
  Running running;
  const TempDir directory;
  const auto bytes = random_bytes(5 * kMiB + 12'345, 4);
  running.store->export_range("file", export_bytes(directory, "weights", bytes));
  const auto small = random_bytes(1000, 5);
  running.put("small", small);
  const auto client = running.client();
  std::vector<std::byte> memory(bytes.size());
  const auto region = client->offer(memory);
  for (int i = 0; i < 3; ++i) {
    std::fill(memory.begin(), memory.end(), std::byte{0});
    client->send(words(read_of("file", bytes.size(), *region,
                               {{1, bytes.size() - 1, memory.data() + 1}, {0, 1, memory.data()}})) +
                 words({"GET", "file"}));
    CHECK(client->line() == ":" + std::to_string(bytes.size()) + "\r\n");
    CHECK((client->bulk() == text_of(bytes)));
    CHECK((memory == bytes));
  }
  CHECK(running.counters().rdma_copied_bytes == 6 * bytes.size());
  client->send(words(read_of("small", 1000, *region, {{0, 1000, memory.data()}})));
  CHECK(client->line() == ":1000\r\n");
  CHECK((std::equal(small.begin(), small.end(), memory.begin())));
  CHECK(running.counters().rdma_copied_bytes == 6 * bytes.size() + 1000);
  CHECK(running.counters().rdma_direct_bytes == 0);
}

TEST_CASE("a file that became shorter ends the connection that asked, and says so") {
  Running running;
  const TempDir directory;
  const auto bytes = random_bytes(kMiB, 6);
  const FileRange range = export_bytes(directory, "weights", bytes);
  running.store->export_range("file", range);
  REQUIRE(truncate(range.file->path().c_str(), 1000) == 0);
  const auto client = running.client();
  client->send(words({"GET", "file"}));
  CHECK(client->lost());
  CHECK(running.counters().files_failed == 1);
  const auto log = running.server->take_log();
  REQUIRE(log.size() == 1);
  CHECK(log[0].find("ends before byte 1000: it changed while it was served") != std::string::npos);
  CHECK(running.client()->ask({"PING"}) == "+PONG\r\n");
}

TEST_CASE("a value in flight stays as it was when its key is replaced and its memory used again") {
  Running running;
  const auto old = random_bytes(kMiB, 7);
  running.put("k", old);
  const auto client = running.client();
  CHECK(client->ask({"PING"}) == "+PONG\r\n");
  std::vector<std::byte> memory(kMiB);
  const auto region = client->offer(memory);
  const uint64_t posted = running.counters().rdma_work_requests;
  running.network->set([](FakeFaults& faults) { faults.held = true; });
  client->send(words(read_of("k", kMiB, *region, {{0, kMiB, memory.data()}})));
  REQUIRE(running.network->deliver(1) == 1);
  REQUIRE(eventually([&] {
    return running.counters().rdma_reads == 1 && running.counters().rdma_work_requests >= posted + 2;
  }));
  // The write and the reply are the card's now, which has read none of the bytes yet. If the old value's
  // memory were given back, one of these would take it.
  for (uint64_t i = 0; i < 4; ++i) {
    running.put("k", random_bytes(kMiB, 8 + i));
    running.put("other", random_bytes(kMiB, 100 + i));
    const std::string_view gone = "other";
    CHECK(running.store->remove({&gone, 1}).count == 1);
  }
  CHECK((memory == std::vector<std::byte>(kMiB)));
  running.network->set([](FakeFaults& faults) { faults.held = false; });
  CHECK(client->line() == ":1048576\r\n");
  CHECK((memory == old));
  // Once the card is done, the old value is given back.
  CHECK(eventually([&] { return running.memory->values() == 1; }));
}

TEST_CASE("pages that were sent by reference are registered anew before others are read there") {
  Running running;
  const auto client = running.client();
  const std::string a = text_of(random_bytes(2 * kMiB, 9)), b = text_of(random_bytes(2 * kMiB, 10)),
                    c = text_of(random_bytes(2 * kMiB, 11));
  CHECK(client->ask({"SET", "a", a}) == "+OK\r\n");
  CHECK(client->ask({"SET", "b", b}) == "+OK\r\n");
  const auto held = running.store->get("b");
  const auto& value = std::get<ValuePtr>(held.content);
  const uint32_t before = running.memory->registered(value, 0, 2 * kMiB).region->local_key();
  CHECK(running.memory->registered(value, 5, 10).region->local_key() == before);
  CHECK(running.memory->registered_bytes() == 32 * kMiB);
  {
    const auto sent = running.store->get("a");  // over TCP
    std::get<ValuePtr>(sent.content)->refer();
  }
  CHECK(client->ask({"DEL", "a"}) == ":1\r\n");
  // Its pages were detached, for sockets may still refer to them: what the card knows is stale.
  CHECK(running.memory->registered_bytes() == 0);
  CHECK(client->ask({"SET", "c", c}) == "+OK\r\n");
  CHECK(running.memory->registered(value, 0, 2 * kMiB).region->local_key() != before);
  CHECK(running.memory->registered_bytes() == 32 * kMiB);
  client->send(words({"GET", "c"}) + words({"GET", "b"}));
  CHECK((client->bulk() == c));
  CHECK((client->bulk() == b));
}

TEST_CASE("what no socket referred to stays registered, whatever comes and goes") {
  Running running;
  const auto client = running.client();
  const std::string a = text_of(random_bytes(kMiB, 9)), b = text_of(random_bytes(kMiB, 10)),
                    c = text_of(random_bytes(kMiB, 11));
  CHECK(client->ask({"SET", "a", a}) == "+OK\r\n");
  CHECK(client->ask({"SET", "b", b}) == "+OK\r\n");
  const auto held = running.store->get("b");
  const auto& value = std::get<ValuePtr>(held.content);
  const uint32_t key = running.memory->registered(value, 0, kMiB).region->local_key();
  CHECK(client->ask({"DEL", "a"}) == ":1\r\n");
  CHECK(client->ask({"SET", "c", c}) == "+OK\r\n");
  CHECK(running.memory->registered(value, 0, kMiB).region->local_key() == key);
  CHECK(running.memory->registered_bytes() == 32 * kMiB);
  client->send(words({"GET", "c"}) + words({"GET", "b"}));
  CHECK((client->bulk() == c));
  CHECK((client->bulk() == b));
}

TEST_CASE("where memory cannot be registered values are copied, and an operator reads why") {
  Running running;
  running.network->set([](FakeFaults& faults) { faults.memlock_bytes = 8 * kMiB; });
  const auto client = running.client();
  const auto value = random_bytes(3 * kMiB, 12);
  CHECK(client->ask({"SET", "k", text_of(value)}) == "+OK\r\n");
  std::vector<std::byte> memory(value.size());
  const auto region = client->offer(memory);
  client->send(words({"GET", "k"}) + words(read_of("k", 0, *region, {{0, value.size(), memory.data()}})));
  CHECK((client->bulk() == text_of(value)));
  CHECK(client->line() == ":3145728\r\n");
  CHECK((memory == value));
  CHECK(running.counters().rdma_direct_bytes == 0);
  CHECK(running.counters().rdma_copied_bytes == 2 * value.size());
  std::vector<std::string> log;
  REQUIRE(eventually([&] {
    for (auto& line : running.server->take_log()) log.push_back(line);
    return !log.empty();
  }));
  CHECK(log[0].find("values are copied before they are sent over RDMA") == 0);
  CHECK(log[0].find("limit of locked memory") != std::string::npos);
}

TEST_CASE("over RDMA, too, nobody gets anything without the password") {
  ServerOptions options;
  options.password = "secret";
  Running running(std::move(options));
  running.put("k", random_bytes(1000, 13));
  const auto client = running.client();
  std::vector<std::byte> memory(1000, std::byte{0xee});
  const auto region = client->offer(memory);
  CHECK(client->ask({"GET", "k"}).substr(0, 7) == "-NOAUTH");
  CHECK(client->ask({"RDMALOAD.HELLO", "1"}).substr(0, 7) == "-NOAUTH");
  CHECK(client->ask({"AUTH", "wrong"}).substr(0, 10) == "-WRONGPASS");
  CHECK(client->ask({"AUTH", "secret"}) == "+OK\r\n");
  CHECK(client->ask(read_of("k", 0, *region, {{0, 1000, memory.data()}})) == ":1000\r\n");
  // A large value of a stranger is refused before it is taken, and the refusal arrives.
  const auto stranger = running.client();
  CHECK(stranger->ask({"RDMALOAD.READ", "k", "0", "0", "1", "1", "1"}).substr(0, 7) == "-NOAUTH");
  stranger->send("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$100000000\r\n");
  CHECK(stranger->line().substr(0, 4) == "-ERR");
  CHECK(stranger->lost());
}

TEST_CASE("a client that takes no replies is bounded, and keeps nobody else waiting") {
  Running running;
  const auto value = random_bytes(kMiB, 14);
  running.put("k", value);
  const uint64_t held = running.memory->held_bytes();
  const auto slow = running.client();
  // Far more requests than it takes replies of: its window is full and never announced again.
  std::string requests;
  for (int i = 0; i < 50'000; ++i) requests += words({"GET", "k"});
  const auto deadline = Clock::now() + kPatience;
  size_t sent = 0;
  int idle = 0;
  while (sent < requests.size() && idle < 50 && Clock::now() < deadline) {
    const size_t part = slow->try_send(std::string_view(requests).substr(sent));
    sent += part;
    slow->channel().answered(slow->channel().total_sent());
    idle = slow->channel().turn(std::chrono::milliseconds(2)) || part > 0 ? 0 : idle + 1;
  }
  // It took what fits into its window and what a session keeps, and no more of the stream.
  CHECK(sent < requests.size() / 2);
  CHECK(running.memory->held_bytes() == held);
  const auto other = running.client();
  other->send(words({"GET", "k"}));
  CHECK((other->bulk() == text_of(value)));
  // What it asked for is still there for it, in order.
  for (int i = 0; i < 100; ++i) CHECK((slow->bulk() == text_of(value)));
}

TEST_CASE("a client that breaks the protocol loses its own connection and nothing else") {
  Running running;
  running.put("k", random_bytes(kMiB, 15));
  const auto good = running.client();
  SUBCASE("writes beyond the window") {
    const auto bad = running.client();
    const auto region = bad->offer(std::span(reinterpret_cast<std::byte*>(running.memory.get()), 8));
    std::vector<std::byte> bytes(64);
    const auto source = bad->offer(bytes);
    rdma::QueuePair& queue_pair = bad->channel().queue_pair();
    queue_pair.post_write(0, bytes, source->local_key(), reinterpret_cast<uintptr_t>(running.store.get()), 7,
                          std::nullopt, true);
    CHECK(bad->lost());
    CHECK(running.network->refused_writes() == 1);
  }
  SUBCASE("writes to the store's memory") {
    const auto bad = running.client();
    const auto found = running.store->get("k");
    const auto registered = running.memory->registered(std::get<ValuePtr>(found.content), 0, kMiB);
    std::vector<std::byte> bytes(64);
    const auto source = bad->offer(bytes);
    bad->channel().queue_pair().post_write(0, bytes, source->local_key(), registered.region->address(),
                                           registered.region->remote_key(), std::nullopt, true);
    CHECK(bad->lost());
    CHECK(running.network->refused_writes() == 1);
  }
  SUBCASE("writes into another's window") {
    // Whose address and key it guessed. (The fake hands out keys in order.)
    const auto bad = running.client();
    std::vector<std::byte> bytes(8);
    const auto source = bad->offer(bytes);
    bad->channel().queue_pair().post_write(0, bytes, source->local_key(),
                                           good->channel().peer_window_address(),
                                           good->channel().peer_window_key(), std::nullopt, true);
    CHECK(bad->lost());
    CHECK(running.network->refused_writes() == 1);
  }
  SUBCASE("sends a message of the wrong size") {
    const auto bad = running.client();
    const std::array<std::byte, 31> message{};
    bad->channel().queue_pair().post_send(0, message, std::nullopt, true);
    CHECK(bad->lost());
    CHECK(eventually([&] { return running.server->take_log().size() == 1; }));
  }
  SUBCASE("wants bytes where it has no memory") {
    const auto bad = running.client();
    bad->send(words({"RDMALOAD.READ", "k", "0", "0", "1048576", "4096", "1"}));
    CHECK(bad->lost());
  }
  SUBCASE("announces a window that it does not have") {
    const auto bad = running.client();
    std::array<std::byte, 32> message{};
    message[1] = std::byte{3};
    message[20] = std::byte{16};
    message[25] = std::byte{1};
    message[31] = std::byte{9};
    bad->channel().queue_pair().post_send(0, message, std::nullopt, true);
    bad->send(words({"GET", "k"}));
    CHECK(bad->lost());
  }
  SUBCASE("speaks no RESP") {
    const auto bad = running.client();
    bad->send("*1\r\n$-5\r\n");
    CHECK(bad->line().substr(0, 4) == "-ERR");
    CHECK(bad->lost());
  }
  CHECK(good->ask({"PING"}) == "+PONG\r\n");
  CHECK(eventually([&] { return running.counters().rdma_connections_now == 1; }));
  CHECK(running.memory->values() == 1);
}

TEST_CASE("connections over RDMA have a limit, and those that go make room") {
  ServerOptions options;
  options.rdma.max_connections = 3;
  Running running(std::move(options));
  std::vector<std::unique_ptr<RdmaClient>> clients;
  for (int i = 0; i < 3; ++i) clients.push_back(running.client());
  for (const auto& client : clients) CHECK(client->ask({"PING"}) == "+PONG\r\n");
  CHECK_THROWS_AS(running.client(), Error);
  CHECK(running.counters().connections_refused == 1);
  clients.pop_back();
  REQUIRE(eventually([&] { return running.counters().rdma_connections_now == 2; }));
  CHECK(running.client()->ask({"PING"}) == "+PONG\r\n");
}

TEST_CASE("a server over RDMA without memory for a connection goes on, and counts it out") {
  Running running;
  const auto good = running.client();
  running.network->set([](FakeFaults& faults) { faults.accepts_without_memory = 2; });
  CHECK(running.client()->ask({"PING"}) == "+PONG\r\n");  // a later turn found some
  CHECK(running.server->take_log().size() == 2);
  running.network->set([](FakeFaults& faults) { faults.addresses_without_memory = 1; });
  CHECK_THROWS_AS(running.client(), Error);
  CHECK(eventually([&] { return running.counters().rdma_connections_now == 1; }));
  CHECK(running.counters().connections_now == 1);
  CHECK(good->ask({"PING"}) == "+PONG\r\n");
  CHECK(running.client()->ask({"PING"}) == "+PONG\r\n");
}

TEST_CASE("clients that are lost in the middle of their replies leave nothing behind") {
  Running running;
  running.put("k", random_bytes(9 * kMiB, 16));
  const uint64_t registered = running.network->registered_bytes();
  for (int round = 0; round < 3; ++round) {
    std::vector<std::unique_ptr<RdmaClient>> clients;
    for (int i = 0; i < 8; ++i) {
      clients.push_back(running.client());
      clients.back()->send(words({"GET", "k"}) + words({"GET", "k"}));
    }
    REQUIRE(eventually([&] { return running.counters().hits >= static_cast<uint64_t>(16 * round + 8); }));
    if (round == 1) running.network->cut();
    clients.clear();
    REQUIRE(eventually([&] { return running.counters().rdma_connections_now == 0; }));
  }
  CHECK(running.counters().connections_now == 0);
  CHECK(running.network->registered_bytes() == registered);
  CHECK(eventually([&] { return running.store->remove(std::vector<std::string_view>{"k"}).count == 1; }));
  CHECK(running.memory->values() == 0);
}

TEST_CASE("a connection of which nothing moves is closed; an idle one is not") {
  ServerOptions options;
  options.stall_timeout = std::chrono::milliseconds(300);
  Running running(std::move(options));
  running.put("k", random_bytes(kMiB, 17));
  const auto idle = running.client();
  CHECK(idle->ask({"PING"}) == "+PONG\r\n");
  const auto stalled = running.client();
  stalled->send(words({"GET", "k"}));  // its window holds a sixteenth of that
  CHECK(eventually([&] { return running.counters().connections_stalled == 1; }));
  CHECK(stalled->lost());
  CHECK(idle->ask({"PING"}) == "+PONG\r\n");
}

TEST_CASE("a server that stops takes its hands off all memory") {
  auto running = std::make_unique<Running>();
  running->put("k", random_bytes(9 * kMiB, 18));
  const auto network = running->network;
  const auto client = running->client();
  client->send(words({"GET", "k"}) + words({"GET", "k"}));
  REQUIRE(eventually([&] { return running->counters().hits == 2; }));
  running->server->stop();
  CHECK(client->lost());
  CHECK(running->memory->registered_bytes() == 0);
  CHECK(running->counters().rdma_connections_now == 0);
  // The store goes on without a card, and with another one.
  ServerOptions options;
  options.rdma.host = "10.0.0.1";
  options.rdma.fabric = network;
  Server second(running->store, std::move(options));
  RdmaClient again(*network, "10.0.0.1", second.rdma_port());
  CHECK(again.ask({"STRLEN", "k"}) == ":9437184\r\n");
  CHECK_THROWS_WITH_AS(Server(running->store,
                              [&] {
                                ServerOptions third;
                                third.rdma.host = "10.0.0.1";
                                third.rdma.fabric = network;
                                return third;
                              }()),
                       doctest::Contains("one server over RDMA at a time"), Error);
}

TEST_CASE("SHUTDOWN, QUIT and CLIENT LIST work over RDMA as over TCP") {
  Running running;
  const auto client = running.client();
  client->send(words({"CLIENT", "LIST"}));
  CHECK(client->bulk().find(" rdma=1") != std::string::npos);
  client->send(words({"INFO", "rdma"}));
  CHECK(client->bulk().find("rdma_connected_clients:1\r\n") != std::string::npos);
  CHECK(client->ask({"QUIT"}) == "+OK\r\n");
  CHECK(client->lost());
  const auto other = running.client();
  other->send(words({"SHUTDOWN"}));
  CHECK(running.server->wait(kPatience));
}

TEST_CASE("a server without RDMA where it was asked for does not start") {
  const auto network = std::make_shared<FakeNetwork>();
  network->set([](FakeFaults& faults) { faults.no_device = true; });
  ServerOptions options;
  options.rdma.host = "10.0.0.1";
  options.rdma.fabric = network;
  CHECK_THROWS_WITH_AS(Server(std::make_shared<Store>(ValueMemory::make(kMiB)), std::move(options)),
                       "this machine has no RDMA device", Error);
}
