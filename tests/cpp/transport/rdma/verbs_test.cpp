// Queue pairs and the Valkey framing over real verbs, a card (or soft-RoCE) talking to itself.
//
// They run where there is a usable card; else they say so, and fail where RDMALOAD_REQUIRE names "rdma".
#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "support/bytes.h"
#include "transport/rdma/channel.h"
#include "transport/rdma/devices.h"
#include "transport/rdma/registrar.h"
#include "transport/rdma/verbs_queue_pair.h"

namespace rdmaload::rdma {
namespace {

using rdmaload::testing::bytes_of;
using rdmaload::testing::random_bytes;
using rdmaload::testing::text_of;
using Bytes = std::vector<std::byte>;

constexpr std::chrono::seconds kLong{60};
constexpr std::chrono::milliseconds kStep{100};
const GiveUp kNever = [] { return false; };

// An address of a usable card; nullopt, and said so, where there is none.
std::optional<std::string> card_address() {
  const std::vector<Card> cards = list_cards();
  for (const Card& card : cards) {
    if (!card.usable()) continue;
    if (const auto address = address_of_card(card, "0.0.0.0")) return address;
  }
  const char* required = std::getenv("RDMALOAD_REQUIRE");
  if (required != nullptr && std::string(required).find("rdma") != std::string::npos) {
    FAIL("RDMALOAD_REQUIRE names rdma, but this machine has no usable RDMA card");
  }
  std::fprintf(stderr, "SKIPPED: no usable RDMA card, nothing of this was tested over verbs\n");
  return std::nullopt;
}

Error error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  FAIL("nothing was thrown");
  return Error(ErrorCode::kInvalid, "");
}

std::unique_ptr<QueuePair> accept_one(Listener& listener, Deadline deadline) {
  while (!deadline.passed()) {
    if (auto accepted = listener.accept()) return accepted;
    pollfd entry{listener.descriptor(), POLLIN, 0};
    ::poll(&entry, 1, 100);
  }
  throw Error(ErrorCode::kTimeout, "nobody connected");
}

// One side with its window, whose content it collects.
struct End {
  End(std::unique_ptr<QueuePair> queue_pair, Side side, uint32_t window_bytes)
      : window(window_bytes),
        region(queue_pair->domain()->register_memory(window, Access::kRemoteWrite)),
        channel(std::move(queue_pair), options(side)) {}
  static ChannelOptions options(Side side) {
    ChannelOptions options;
    options.side = side;
    return options;
  }
  void open() {
    channel.open(*region, 0, static_cast<uint32_t>(window.size()), Deadline::after(kLong), kNever);
  }
  void collect(std::chrono::milliseconds time) {
    take();  // it may have come while the connection was opened, and turn() throws when the peer has gone
    channel.turn(time);
    take();
  }
  void take() {
    stream.insert(stream.end(), window.begin() + static_cast<ptrdiff_t>(taken),
                  window.begin() + static_cast<ptrdiff_t>(channel.received()));
    taken = channel.received();
    if (!channel.window_full()) return;
    taken = 0;
    channel.announce(*region, 0, static_cast<uint32_t>(window.size()));
  }
  // Sends all of it, collecting what comes meanwhile.
  void send(std::span<const std::byte> bytes) {
    const Deadline deadline = Deadline::after(kLong);
    while (!bytes.empty()) {
      const size_t sent = channel.try_send(bytes);
      bytes = bytes.subspan(sent);
      if (sent == 0) collect(kStep);
      if (deadline.passed()) throw Error(ErrorCode::kTimeout, "sending took too long");
    }
  }
  void receive(size_t bytes) {
    const Deadline deadline = Deadline::after(kLong);
    while (stream.size() < bytes) {
      collect(kStep);
      if (deadline.passed()) throw Error(ErrorCode::kTimeout, "receiving took too long");
    }
  }

  Bytes window;
  std::unique_ptr<MemoryRegion> region;
  Channel channel;
  Bytes stream;
  uint64_t taken = 0;
};

// A listener, and a server that runs on a thread of its own.
struct Server {
  Server(const std::string& address, uint32_t window_bytes, std::function<void(End&)> serve)
      : listener(fabric.listen(address, 0, true)), thread([this, window_bytes, serve = std::move(serve)] {
          try {
            End end(accept_one(*listener, Deadline::after(kLong)), Side::kServer, window_bytes);
            end.open();
            serve(end);
          } catch (const std::exception& error) {
            failure = error.what();
          }
        }) {}
  ~Server() {
    if (thread.joinable()) thread.join();
  }
  void join() {
    thread.join();
    CHECK(failure == "");
  }
  VerbsFabric fabric;
  std::unique_ptr<Listener> listener;
  std::string failure;
  std::thread thread;
};

std::unique_ptr<QueuePair> dial(const std::string& address, int port, const std::string& device = "") {
  return VerbsFabric().resolve({address, port, device, nullptr}, Deadline::after(kLong), kNever);
}

TEST_SUITE("needs_rdma") {
  TEST_CASE("verbs: streams go both ways over real queue pairs") {
    const auto address = card_address();
    if (!address) return;
    const Bytes up = random_bytes(3 << 20, 1), down = random_bytes(5 << 20, 2);
    Server server(*address, 1 << 16, [&](End& end) {
      end.receive(up.size());
      CHECK(end.stream == up);
      end.send(down);
      end.receive(up.size() + 3);
    });
    End client(dial(*address, server.listener->port()), Side::kClient, 100'000);
    MESSAGE(client.channel.queue_pair().description());
    client.open();
    client.send(up);
    client.receive(down.size());
    CHECK(client.stream == down);
    client.channel.answered(client.channel.total_sent());
    client.send(bytes_of("end"));
    server.join();
  }

  TEST_CASE("verbs: remote writes go where they belong, before the reply") {
    const auto address = card_address();
    if (!address) return;
    Bytes value = random_bytes(4 << 20, 3);
    Server server(*address, 4096, [&](End& end) {
      end.receive(12);  // address and key
      uint64_t target = 0;
      uint32_t key = 0;
      std::memcpy(&target, end.stream.data(), 8);
      std::memcpy(&key, end.stream.data() + 8, 4);
      const MemoryRegistrar registrar(end.channel.domain(), 1 << 20);
      const Registration store = registrar.register_host(value, Access::kSource);
      REQUIRE(store.registered());
      CHECK(store.slabs().size() >= 4);
      uint64_t id = 0;
      for (const auto& slab : store.slabs()) {
        const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(slab->address()),
                                               slab->bytes());
        const uint64_t at = slab->address() - store.slabs().front()->address();
        REQUIRE(end.channel.try_write(bytes, slab->local_key(), target + 7 + at, key, id++));
      }
      end.send(bytes_of("+OK\r\n"));
      std::array<uint64_t, 16> ids{};
      for (size_t done = 0; done < id; done += end.channel.take_completed(ids)) end.collect(kStep);
      end.receive(15);
    });
    End client(dial(*address, server.listener->port()), Side::kClient, 4096);
    Bytes arena(value.size() + 16);
    const auto region = client.channel.domain()->register_memory(arena, Access::kRemoteWrite);
    client.open();
    Bytes request(12);
    const uint64_t at = region->address();
    const uint32_t key = region->remote_key();
    std::memcpy(request.data(), &at, 8);
    std::memcpy(request.data() + 8, &key, 4);
    client.send(request);
    client.receive(5);
    CHECK(text_of(client.stream) == "+OK\r\n");
    CHECK(std::equal(value.begin(), value.end(), arena.begin() + 7));
    client.send(bytes_of("bye"));
    server.join();
  }

  TEST_CASE("verbs: a write outside of what is registered ends the connection and changes nothing") {
    const auto address = card_address();
    if (!address) return;
    Bytes arena(8192);
    std::atomic<uint64_t> target = 0;
    std::atomic<uint32_t> key = 0;
    Server server(*address, 4096, [&](End& end) {
      end.receive(1);
      Bytes bytes = random_bytes(100, 1);
      const auto source = end.channel.domain()->register_memory(bytes, Access::kSource);
      end.channel.try_write(bytes, source->local_key(), target + 8192 - 50, key, 1);
      const Error error = error_of([&] { end.receive(2); });
      CHECK(error.code() == ErrorCode::kUnavailable);
      MESSAGE(std::string(error.what()));
    });
    End client(dial(*address, server.listener->port()), Side::kClient, 4096);
    const auto region = client.channel.domain()->register_memory(arena, Access::kRemoteWrite);
    target = region->address();
    key = region->remote_key();
    client.open();
    client.send(bytes_of("x"));
    CHECK(error_of([&] { client.receive(1); }).code() == ErrorCode::kUnavailable);
    server.join();
    CHECK(arena == Bytes(8192));
  }

  TEST_CASE("verbs: a peer that leaves is noticed, and what it said before is there") {
    const auto address = card_address();
    if (!address) return;
    Server server(*address, 4096, [&](End& end) {
      end.send(bytes_of("last words"));
      REQUIRE(end.channel.try_fence(9));
      std::array<uint64_t, 1> id{};
      while (end.channel.take_completed(id) == 0) end.collect(kStep);
    });
    End client(dial(*address, server.listener->port()), Side::kClient, 4096);
    client.open();
    server.join();
    const Error error = error_of([&] { client.receive(11); });
    CHECK(error.code() == ErrorCode::kUnavailable);
    MESSAGE(std::string(error.what()));
    CHECK(text_of(client.stream) == "last words");
  }

  TEST_CASE("verbs: a peer whose process is killed is noticed") {
    const auto address = card_address();
    if (!address) return;
    int to_parent[2] = {-1, -1};
    REQUIRE(::pipe(to_parent) == 0);
    // A forked child may not use verbs that its parent has used: it starts this program anew.
    char self[4096] = {};
    REQUIRE(::readlink("/proc/self/exe", self, sizeof(self) - 1) > 0);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      ::dup2(to_parent[1], 3);
      ::setenv("RDMALOAD_TEST_DOOMED", address->c_str(), 1);
      ::execl(self, self, "--test-case=verbs: the doomed server", "--no-skip", "--out=/dev/null",
              static_cast<char*>(nullptr));
      ::_exit(127);
    }
    ::close(to_parent[1]);
    int port = 0;
    REQUIRE(::read(to_parent[0], &port, sizeof(port)) == sizeof(port));
    End client(dial(*address, port), Side::kClient, 4096);
    client.open();
    client.receive(2);
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    ::close(to_parent[0]);
    const Error error = error_of([&] { client.receive(3); });
    CHECK(error.code() == ErrorCode::kUnavailable);
    MESSAGE(std::string(error.what()));
  }

  // Not a test: what the test above starts and kills.
  TEST_CASE("verbs: the doomed server" * doctest::skip()) {
    const char* address = std::getenv("RDMALOAD_TEST_DOOMED");
    if (address == nullptr) return;
    VerbsFabric fabric;
    const auto listener = fabric.listen(address, 0, false);
    const int port = listener->port();
    if (::write(3, &port, sizeof(port)) != sizeof(port)) return;
    End end(accept_one(*listener, Deadline::after(kLong)), Side::kServer, 4096);
    end.open();
    end.send(bytes_of("up"));
    end.receive(1);
  }

  TEST_CASE("verbs: after close nothing lands") {
    const auto address = card_address();
    if (!address) return;
    // The server writes without end; the client closes in the middle and then looks at its memory.
    std::atomic<bool> closed = false;
    Server server(*address, 4096, [&](End& end) {
      Bytes bytes(1000, std::byte{1});
      const Deadline deadline = Deadline::after(kLong);
      try {
        for (uint8_t round = 1; !deadline.passed(); ++round) {
          std::fill(bytes.begin(), bytes.end(), std::byte{round});
          end.send(bytes);
        }
      } catch (const Error& error) {
        CHECK(error.code() == ErrorCode::kUnavailable);
      }
      CHECK(closed);
    });
    End client(dial(*address, server.listener->port()), Side::kClient, 1 << 16);
    client.open();
    client.receive(300'000);
    closed = true;
    client.channel.close();
    const Bytes before = client.window;
    server.join();  // it has noticed: all that it had posted is over
    CHECK(client.window == before);
  }

  TEST_CASE("verbs: connecting to where nothing listens for RDMA is refused or times out") {
    const auto address = card_address();
    if (!address) return;
    const auto open = [&](const std::string& host, int port, Deadline deadline, const GiveUp& give_up) {
      auto queue_pair = VerbsFabric().resolve({host, port, "", nullptr}, deadline, give_up);
      End client(std::move(queue_pair), Side::kClient, 4096);
      client.channel.open(*client.region, 0, 4096, deadline, give_up);
    };
    SUBCASE("a TCP port without RDMA behind it") {
      const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      sockaddr_in own{};
      own.sin_family = AF_INET;
      inet_pton(AF_INET, address->c_str(), &own.sin_addr);
      socklen_t size = sizeof(own);
      REQUIRE(::bind(listener, reinterpret_cast<sockaddr*>(&own), size) == 0);
      REQUIRE(::listen(listener, 1) == 0);
      REQUIRE(::getsockname(listener, reinterpret_cast<sockaddr*>(&own), &size) == 0);
      const Error error =
          error_of([&] { open(*address, ntohs(own.sin_port), Deadline::after(kLong), kNever); });
      CHECK(error.code() == ErrorCode::kUnavailable);
      CHECK(std::string(error.what()).find("nothing listens for RDMA") != std::string::npos);
      MESSAGE(std::string(error.what()));
      ::close(listener);
    }
    SUBCASE("an address that nobody has") {
      // The last address of the card's network (10.77.0.250 in the guest).
      const std::string nobody = address->substr(0, address->rfind('.')) + ".250";
      const Error error =
          error_of([&] { open(nobody, 6379, Deadline::after(std::chrono::seconds(1)), kNever); });
      CHECK((error.code() == ErrorCode::kTimeout || error.code() == ErrorCode::kUnavailable));
      MESSAGE(std::string(error.what()));
      CHECK(error_of([&] { open(nobody, 6379, Deadline::never(), [] { return true; }); }).code() ==
            ErrorCode::kCancelled);
    }
    SUBCASE("a listener that does not accept") {
      VerbsFabric fabric;
      const auto listener = fabric.listen(*address, 0, false);
      const Error error = error_of(
          [&] { open(*address, listener->port(), Deadline::after(std::chrono::seconds(1)), kNever); });
      CHECK(error.code() == ErrorCode::kTimeout);
    }
    SUBCASE("giving up takes the answer of a slow server first") {
      // It waits for a second, which a busy machine may need for the answer alone: one of five times is
      // enough.
      std::string failure = "nobody asked";
      for (int i = 0; i < 5 && !failure.empty(); ++i) {
        VerbsFabric fabric;
        const auto listener = fabric.listen(*address, 0, false);
        std::thread client([&] {
          try {
            open(*address, listener->port(), Deadline::never(), [] { return true; });
          } catch (const Error&) {  // cancelled, or it saw the server go
          }
        });
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        try {
          const Deadline deadline = Deadline::after(std::chrono::seconds(4));
          std::unique_ptr<QueuePair> asked;
          while (asked == nullptr && !deadline.passed()) asked = listener->accept();
          if (asked != nullptr) {
            asked->start();
            establish(*asked, deadline, kNever);
            failure.clear();
          }
        } catch (const Error& error) {
          failure = error.what();
        }
        client.join();
      }
      CHECK(failure == "");
    }
    SUBCASE("loopback has no card") {
      CHECK(error_of([&] { open("127.0.0.1", 6379, Deadline::after(kLong), kNever); }).code() ==
            ErrorCode::kUnavailable);
    }
  }

  TEST_CASE("verbs: a card is chosen by name") {
    const auto address = card_address();
    if (!address) return;
    const std::vector<Card> cards = list_cards();
    const auto route = route_to(*address, 6379);
    REQUIRE(route.has_value());
    CHECK(route->address == *address);
    const Card* card = card_of_netdev(cards, route->netdev);
    REQUIRE(card != nullptr);
    CHECK(dial(*address, 6379, card->name)->domain()->device() == card->name);
    CHECK(error_of([&] { dial(*address, 6379, "mlx5_77"); }).code() == ErrorCode::kUnavailable);
  }

  TEST_CASE("verbs: a listener needs the address of a card") {
    const auto address = card_address();
    if (!address) return;
    VerbsFabric fabric;
    CHECK(error_of([&] { fabric.listen("0.0.0.0", 0, true); }).code() == ErrorCode::kInvalid);
    CHECK(error_of([&] { fabric.listen("192.0.2.1", 0, true); }).code() == ErrorCode::kUnavailable);
    const auto listener = fabric.listen(*address, 0, true);
    CHECK(error_of([&] { fabric.listen(*address, listener->port(), true); }).code() ==
          ErrorCode::kUnavailable);
  }

  TEST_CASE("verbs: too little memory may be locked") {
    const auto address = card_address();
    if (!address) return;
    // In a process of its own, which gives up its right to lock anything.
    char self[4096] = {};
    REQUIRE(::readlink("/proc/self/exe", self, sizeof(self) - 1) > 0);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      ::setenv("RDMALOAD_TEST_MEMLOCK", address->c_str(), 1);
      const rlimit limit{8 << 20, 8 << 20};
      if (::setrlimit(RLIMIT_MEMLOCK, &limit) != 0) ::_exit(126);
      if (::setgid(65534) != 0 || ::setuid(65534) != 0) ::_exit(125);  // and so without CAP_IPC_LOCK
      ::execl(self, self, "--test-case=verbs: within 8 MiB of locked memory", "--no-skip",
              static_cast<char*>(nullptr));
      ::_exit(127);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
  }

  // Not a test of its own: what the test above starts, with little memory to lock.
  TEST_CASE("verbs: within 8 MiB of locked memory" * doctest::skip()) {
    const char* address = std::getenv("RDMALOAD_TEST_MEMLOCK");
    if (address == nullptr) return;
    CHECK(memlock_limit() == uint64_t{8} << 20);
    const auto queue_pair = dial(address, 6379);
    const MemoryRegistrar registrar(queue_pair->domain(), 1 << 20);
    Bytes memory(64 << 20);
    const Registration refused = registrar.register_host(memory, Access::kRemoteWrite);
    CHECK(!refused.registered());
    CHECK(refused.reason().find("8192 KiB") != std::string::npos);
    CHECK(refused.reason().find("ulimit -l") != std::string::npos);
    // The slabs that fitted were given back: as much fits again.
    const Registration fits = registrar.register_host(std::span(memory).first(2 << 20), Access::kRemoteWrite);
    CHECK(fits.registered());
  }

}  // TEST_SUITE
}  // namespace
}  // namespace rdmaload::rdma
