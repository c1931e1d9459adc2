// The server over real verbs: what only a card that keeps pages of its own can show. Run in the guest of
// tests/rdma, whose soft-RoCE device has this address.
#include <doctest/doctest.h>

#include "core/error.h"
#include "server/server.h"
#include "support/bytes.h"
#include "support/rdma_client.h"
#include "transport/rdma/verbs_queue_pair.h"

using namespace rdmaload;
using namespace rdmaload::server;
using rdmaload::testing::random_bytes;
using rdmaload::testing::RdmaClient;
using rdmaload::testing::text_of;

namespace {

constexpr uint64_t kMiB = 1 << 20;
const std::string kAddress = "10.77.0.1";

struct Running {
  explicit Running(uint64_t limit = 512 * kMiB)
      : memory(ValueMemory::make(limit)), store(std::make_shared<Store>(memory)), server(store, [] {
          ServerOptions options;
          options.rdma.host = kAddress;
          return options;
        }()) {}
  std::unique_ptr<RdmaClient> client(uint32_t window = 64 << 10) {
    return std::make_unique<RdmaClient>(fabric, kAddress, server.rdma_port(), window);
  }
  rdma::VerbsFabric fabric;
  std::shared_ptr<ValueMemory> memory;
  std::shared_ptr<Store> store;
  Server server;
};

std::vector<std::string> read_all(const std::string& key, const rdma::MemoryRegion& region, uint64_t bytes) {
  return {"RDMALOAD.READ",
          key,
          std::to_string(bytes),
          "0",
          std::to_string(bytes),
          std::to_string(region.address()),
          std::to_string(region.remote_key())};
}

}  // namespace

TEST_SUITE("needs_rdma") {
  TEST_CASE("values from one byte to 64 MiB come back byte-equal, by GET and placed") {
    Running running;
    std::vector<std::byte> memory(64 * kMiB);
    for (const uint32_t window : {64u << 10, 1'000'003u}) {
      CAPTURE(window);
      const auto client = running.client(window);
      const auto region = client->offer(memory);
      for (const size_t size : {size_t{1}, size_t{4096}, size_t{32} << 10, size_t{1044480}, 64 * kMiB}) {
        if (size == 64 * kMiB && window == 64u << 10) continue;
        CAPTURE(size);
        const auto value = random_bytes(size, size);
        CHECK(client->ask({"SET", "k", text_of(value)}) == "+OK\r\n");
        client->send(RdmaClient::words({"GET", "k"}));
        CHECK((client->bulk() == text_of(value)));
        std::fill(memory.begin(), memory.begin() + static_cast<ptrdiff_t>(size), std::byte{0});
        CHECK(client->ask(read_all("k", *region, size)) == ":" + std::to_string(size) + "\r\n");
        CHECK((std::equal(value.begin(), value.end(), memory.begin())));
      }
    }
  }

  // A card keeps the pages that it registered: detached ones would be sent for ever.
  TEST_CASE("what is stored where a value was is sent as it is, not as it was") {
    Running running;
    const auto client = running.client();
    std::vector<std::byte> memory(kMiB);
    const auto region = client->offer(memory);
    const auto kept = random_bytes(kMiB, 1);
    CHECK(client->ask({"SET", "kept", text_of(kept)}) == "+OK\r\n");
    for (unsigned round = 2; round < 6; ++round) {
      const auto value = random_bytes(kMiB, round);
      CHECK(client->ask({"SET", "k", text_of(value)}) == "+OK\r\n");
      CHECK(client->ask(read_all("k", *region, kMiB)) == ":1048576\r\n");
      CHECK((memory == value));
      CHECK(client->ask(read_all("kept", *region, kMiB)) == ":1048576\r\n");
      CHECK((memory == kept));
      CHECK(client->ask({"DEL", "k"}) == ":1\r\n");
    }
    CHECK(running.server.counters().rdma_copied_bytes == 0);
  }

  TEST_CASE("one client cannot write into the window of another, though it knows where that is") {
    Running running;
    const auto good = running.client();
    const auto bad = running.client();
    CHECK(good->ask({"PING"}) == "+PONG\r\n");
    std::vector<std::byte> bytes(8);
    const auto source = bad->offer(bytes);
    bad->channel().queue_pair().post_write(0, bytes, source->local_key(),
                                           good->channel().peer_window_address(),
                                           good->channel().peer_window_key(), std::nullopt, true);
    CHECK(bad->lost());
    CHECK(good->ask({"PING"}) == "+PONG\r\n");
    CHECK(running.server.counters().rdma_unbound_windows == 0);
  }

  TEST_CASE("memory that a client never offered ends its connection alone") {
    Running running;
    const auto good = running.client();
    CHECK(good->ask({"SET", "k", std::string(100'000, 'k')}) == "+OK\r\n");
    const auto bad = running.client();
    bad->send(RdmaClient::words({"RDMALOAD.READ", "k", "0", "0", "1000", "4096", "77"}));
    CHECK(bad->lost());
    CHECK(good->ask({"STRLEN", "k"}) == ":100000\r\n");
  }
}
