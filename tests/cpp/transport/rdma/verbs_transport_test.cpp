// The client of both roads over real verbs, from a server of the tests that speaks as ours or as a Valkey.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/crc32c.h"
#include "support/rdma_server.h"
#include "support/reads.h"
#include "transport/rdma/devices.h"
#include "transport/rdma/rdma_transport.h"
#include "transport/rdma/verbs_queue_pair.h"

namespace rdmaload::rdma {
namespace {

using rdmaload::testing::random_bytes;
using rdmaload::testing::RecordingOwner;
using Bytes = std::vector<std::byte>;

std::string card_address() {
  const std::vector<Card> cards = list_cards();
  for (const Card& card : cards) {
    if (!card.usable()) continue;
    if (const auto address = address_of_card(card, "0.0.0.0")) return *address;
  }
  const char* required = std::getenv("RDMALOAD_REQUIRE");
  if (required != nullptr && std::string(required).find("rdma") != std::string::npos) {
    FAIL("RDMALOAD_REQUIRE names rdma, but this machine has no usable RDMA card");
  }
  std::fprintf(stderr, "SKIPPED: no usable RDMA card, nothing of this was tested over verbs\n");
  return {};
}

TEST_SUITE("needs_rdma") {
  TEST_CASE("verbs: both roads, whatever the server's window, bring every byte to its place") {
    const std::string address = card_address();
    if (address.empty()) return;
    constexpr size_t kChunks = 24;
    constexpr uint64_t kBytes = 100'000, kLastBytes = 33'333;
    const Bytes content = random_bytes((kChunks - 1) * kBytes + kLastBytes, 5);
    for (const bool ours : {true, false}) {
      for (const uint32_t window : {64u, 1000u, 1u << 16}) {
        CAPTURE(ours);
        CAPTURE(window);
        VerbsFabric fabric;
        testing::RdmaServer::Options server_options;
        server_options.ours = ours;
        server_options.window_bytes = window;
        testing::RdmaServer server(fabric, server_options, address);
        RecordingOwner owner;
        Bytes memory(content.size());
        std::vector<std::unique_ptr<Read>> reads;
        for (size_t i = 0; i < kChunks; ++i) {
          auto read = std::make_unique<Read>();
          read->object = "m/" + std::to_string(i);
          read->length = read->object_bytes = i + 1 < kChunks ? kBytes : kLastBytes;
          read->segments = {{memory.data() + i * kBytes, read->length}};
          read->checksum = true;
          read->owner = &owner;
          const auto begin = content.begin() + static_cast<ptrdiff_t>(i * kBytes);
          server.put(read->object, Bytes(begin, begin + static_cast<ptrdiff_t>(read->length)));
          reads.push_back(std::move(read));
        }
        // One that is not there among them: its own error, and on the same connection.
        reads[9]->object = "gone";
        TransportOptions options;
        options.endpoint.host = address;
        options.endpoint.port = server.port();
        options.endpoint.name = "rdma://" + address;
        options.endpoint.connect_timeout = std::chrono::seconds(60);
        options.endpoint.inactivity_timeout = std::chrono::seconds(60);
        options.connections = 1;
        options.fabric = std::make_shared<VerbsFabric>();
        RdmaTransport transport(options);
        const std::span<std::byte> destination(memory);
        const auto lease = transport.prepare({&destination, 1});
        for (const auto& read : reads) transport.submit(*read);
        for (size_t done = 1; done <= kChunks; ++done) REQUIRE(owner.wait_for(done));  // 20 s for each
        uint64_t copied = 0;
        for (size_t i = 0; i < kChunks; ++i) {
          const Status status = owner.status_of(*reads[i]);
          CAPTURE(status.message());
          if (i == 9) {
            CHECK(status.code() == ErrorCode::kNotFound);
            continue;
          }
          REQUIRE(status.ok());
          const auto expected = std::span(content).subspan(i * kBytes, reads[i]->length);
          CHECK(std::equal(expected.begin(), expected.end(),
                           memory.begin() + static_cast<ptrdiff_t>(i * kBytes)));
          CHECK(reads[i]->crc == crc32c(0, expected));
          copied += reads[i]->copied_bytes;
        }
        CHECK(server.connections() == 1);
        if (ours) {
          CHECK(copied == 0);
        } else {
          CHECK(copied > 0);
          CHECK(copied <
                content.size() / 2);  // the ends of runs, and what was outstanding at the missing key
        }
      }
    }
  }
}

}  // namespace
}  // namespace rdmaload::rdma
