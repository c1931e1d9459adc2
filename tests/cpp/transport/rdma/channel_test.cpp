// The Valkey-over-RDMA framing between two ends of the fake network, and against a peer that breaks it.
#include "transport/rdma/channel.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "support/bytes.h"
#include "support/fake_queue_pair.h"

namespace rdmaload::rdma {
namespace {

using rdmaload::testing::bytes_of;
using rdmaload::testing::pick;
using rdmaload::testing::random_bytes;
using rdmaload::testing::text_of;
using testing::FakeNetwork;
using testing::FakeQueuePair;
using Bytes = std::vector<std::byte>;

constexpr std::chrono::milliseconds kNow{0};
const GiveUp kNever = [] { return false; };

ErrorCode code_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.code();
  }
  FAIL("nothing was thrown");
  return ErrorCode::kInvalid;
}

// One side with its window, whose content it collects into `stream`.
struct End {
  End(std::unique_ptr<QueuePair> queue_pair, Side side, uint32_t window_bytes,
      size_t send_buffer_bytes = 1 << 16)
      : window(window_bytes),
        region(queue_pair->domain()->register_memory(window, Access::kRemoteWrite)),
        channel(std::move(queue_pair), options(side, send_buffer_bytes)) {}
  static ChannelOptions options(Side side, size_t send_buffer_bytes) {
    ChannelOptions options;
    options.side = side;
    options.send_buffer_bytes = send_buffer_bytes;
    return options;
  }
  void start() { channel.start(*region, 0, static_cast<uint32_t>(window.size())); }
  // Takes what has come; announces again when the window is full.
  void collect() {
    channel.turn(kNow);
    stream.insert(stream.end(), window.begin() + static_cast<ptrdiff_t>(taken),
                  window.begin() + static_cast<ptrdiff_t>(channel.received()));
    taken = channel.received();
    if (!channel.window_full()) return;
    taken = 0;
    channel.announce(*region, 0, static_cast<uint32_t>(window.size()));
  }

  Bytes window;
  std::unique_ptr<MemoryRegion> region;
  Channel channel;
  Bytes stream;
  uint64_t taken = 0;
};

struct Connected {
  explicit Connected(uint32_t client_window = 4096, uint32_t server_window = 4096,
                     size_t send_buffer = 1 << 16)
      : client(std::move(made.first), Side::kClient, client_window, send_buffer),
        server(std::move(made.second), Side::kServer, server_window, send_buffer) {
    client.start();
    server.start();
    for (int i = 0; i < 10 && !(client.channel.ready() && server.channel.ready()); ++i) {
      client.channel.turn(kNow);
      server.channel.turn(kNow);
    }
    REQUIRE(client.channel.ready());
    REQUIRE(server.channel.ready());
  }
  // Sends all of `bytes` from one end, the other collecting.
  static void transfer(End& from, End& to, std::span<const std::byte> bytes) {
    for (int idle = 0; !bytes.empty() && idle < 100; ++idle) {
      const size_t taken = from.channel.try_send(bytes);
      bytes = bytes.subspan(taken);
      if (taken > 0) idle = 0;
      to.collect();
      from.collect();
      from.channel.answered(from.channel.total_sent());
    }
    REQUIRE(bytes.empty());
    to.collect();
  }

  FakeNetwork network;
  std::pair<std::unique_ptr<FakeQueuePair>, std::unique_ptr<FakeQueuePair>> made = network.pair();
  End client, server;
};

// A client's channel against a peer that sends what the test wants.
struct AgainstRaw {
  AgainstRaw() {
    for (size_t i = 0; i < kReceiveDepth; ++i) {
      peer->post_receive(i, std::span(memory).subspan(i * kControlBytes, kControlBytes), region->local_key());
    }
    client.start();
    peer->start();
    client.channel.turn(kNow);
  }
  void send(const Bytes& message) { peer->post_send(0, message, std::nullopt, false); }
  static Bytes control(uint16_t opcode) {
    Bytes message(kControlBytes);
    message[1] = static_cast<std::byte>(opcode);
    return message;
  }
  static Bytes window(uint64_t address, uint32_t length, uint32_t key) {
    Bytes message = control(3);
    for (int i = 0; i < 8; ++i) message[16 + i] = static_cast<std::byte>(address >> (56 - 8 * i));
    for (int i = 0; i < 4; ++i) message[24 + i] = static_cast<std::byte>(length >> (24 - 8 * i));
    for (int i = 0; i < 4; ++i) message[28 + i] = static_cast<std::byte>(key >> (24 - 8 * i));
    return message;
  }
  void announce(uint32_t length) { send(window(region->address(), length, region->remote_key())); }
  // The control messages that the client sent, oldest first.
  std::vector<Bytes> heard() {
    std::vector<Bytes> messages;
    std::array<Completion, 64> completions;
    for (size_t count = 0; (count = peer->poll(completions)) > 0;) {
      for (size_t i = 0; i < count; ++i) {
        if (completions[i].kind != Completion::Kind::kReceive || completions[i].immediate) continue;
        const auto at = memory.begin() + static_cast<ptrdiff_t>(completions[i].id * kControlBytes);
        messages.emplace_back(at, at + kControlBytes);
      }
    }
    return messages;
  }

  FakeNetwork network;
  std::pair<std::unique_ptr<FakeQueuePair>, std::unique_ptr<FakeQueuePair>> made = network.pair();
  Bytes memory = Bytes(1 << 16);
  std::unique_ptr<QueuePair> peer = std::move(made.second);
  std::unique_ptr<MemoryRegion> region = peer->domain()->register_memory(memory, Access::kRemoteWrite);
  End client{std::move(made.first), Side::kClient, 4096};
};

TEST_CASE("RegisterXferMemory has its 32 big-endian bytes") {
  AgainstRaw raw;
  const std::vector<Bytes> heard = raw.heard();
  REQUIRE(heard.size() == 1);
  CHECK(heard[0] == AgainstRaw::window(raw.client.region->address(), 4096, raw.client.region->remote_key()));
}

TEST_CASE("bytes go both ways") {
  Connected both;
  Connected::transfer(both.client, both.server, bytes_of("PING\r\n"));
  CHECK(text_of(both.server.stream) == "PING\r\n");
  Connected::transfer(both.server, both.client, bytes_of("+PONG\r\n"));
  CHECK(text_of(both.client.stream) == "+PONG\r\n");
  CHECK(both.client.channel.total_received() == 7);
  CHECK(both.client.channel.total_sent() == 6);
}

TEST_CASE("a stream is cut at the edges of windows of any length") {
  std::mt19937_64 random(7);
  for (int round = 0; round < 30; ++round) {
    const auto window = static_cast<uint32_t>(pick(random, 1, 3000));
    const size_t buffer = pick(random, 64, 5000);
    CAPTURE(window);
    CAPTURE(buffer);
    Connected both(window, static_cast<uint32_t>(pick(random, 1, 3000)), buffer);
    const Bytes up = random_bytes(pick(random, 1, 20'000), round);
    const Bytes down = random_bytes(pick(random, 1, 20'000), round + 1000);
    Connected::transfer(both.client, both.server, up);
    Connected::transfer(both.server, both.client, down);
    CHECK(both.server.stream == up);
    CHECK(both.client.stream == down);
    CHECK(both.client.channel.counters().announcements == 1 + down.size() / window);
    CHECK(both.client.channel.total_received() == down.size());
  }
}

TEST_CASE("without inlining everything goes through the send buffer") {
  FakeNetwork network;
  network.set([](auto& faults) { faults.inline_bytes = 0; });
  auto [one, other] = network.pair();
  End client(std::move(one), Side::kClient, 500, 100), server(std::move(other), Side::kServer, 333, 100);
  client.start();
  server.start();
  for (int i = 0; i < 5; ++i) {
    client.collect();
    server.collect();
  }
  const Bytes content = random_bytes(10'000, 3);
  Connected::transfer(client, server, content);
  Connected::transfer(server, client, content);
  CHECK(server.stream == content);
  CHECK(client.stream == content);
  CHECK(client.channel.counters().copied_bytes == content.size());
}

TEST_CASE("the send buffer is not written again before its bytes have left") {
  Connected both(4096, 4096, 400);
  both.network.set([](auto& faults) { faults.held = true; });
  const Bytes content = random_bytes(660, 8);
  const std::span<const std::byte> all(content);
  CHECK(both.client.channel.try_send(all.first(130)) == 130);
  CHECK(both.client.channel.try_send(all.subspan(130, 130)) == 130);
  CHECK(both.network.deliver(1) == 1);
  both.client.channel.turn(kNow);
  CHECK(both.client.channel.try_send(all.subspan(260)) == 270);  // all but the second 130
  both.network.set([](auto& faults) { faults.held = false; });
  both.server.collect();
  CHECK(both.server.stream == Bytes(content.begin(), content.begin() + 530));
}

TEST_CASE("registered memory is sent without a copy, and its id completes once the bytes were taken") {
  Connected both(1 << 20);
  Bytes value = random_bytes(100'000, 5);
  const auto region = both.server.channel.domain()->register_memory(value, Access::kSource);
  const uint64_t copied = both.server.channel.counters().copied_bytes;
  CHECK(both.server.channel.try_send_registered(value, region->local_key(), 77) == value.size());
  std::array<uint64_t, 4> ids{};
  CHECK(both.server.channel.take_completed(ids) == 0);
  both.client.collect();
  both.server.channel.turn(kNow);
  REQUIRE(both.server.channel.take_completed(ids) == 1);
  CHECK(ids[0] == 77);
  CHECK(both.client.stream == value);
  CHECK(both.server.channel.counters().copied_bytes == copied);
  CHECK(both.server.channel.counters().stream_writes == 1);
}

TEST_CASE("remote writes land before the reply that follows them") {
  Connected both;
  Bytes arena(5000), value = random_bytes(3000, 6);
  const auto target = both.client.channel.domain()->register_memory(arena, Access::kRemoteWrite);
  const auto source = both.server.channel.domain()->register_memory(value, Access::kSource);
  CHECK(both.server.channel.try_write(value, source->local_key(), target->address() + 1000,
                                      target->remote_key(), 1));
  CHECK(both.server.channel.try_send(bytes_of(":3000\r\n")) == 7);
  both.client.collect();
  CHECK(text_of(both.client.stream) == ":3000\r\n");
  CHECK(std::equal(value.begin(), value.end(), arena.begin() + 1000));
  CHECK(both.server.channel.counters().remote_writes == 1);
  both.server.channel.turn(kNow);
  std::array<uint64_t, 1> id{};
  CHECK(both.server.channel.take_completed(id) == 1);
}

TEST_CASE("a remote write outside of what was registered ends the connection and changes nothing") {
  Connected both;
  Bytes arena(5000), value = random_bytes(3000, 6);
  const auto target =
      both.client.channel.domain()->register_memory(std::span(arena).first(4000), Access::kRemoteWrite);
  const auto source = both.server.channel.domain()->register_memory(value, Access::kSource);
  both.server.channel.try_write(value, source->local_key(), target->address() + 1001, target->remote_key(),
                                {});
  CHECK(code_of([&] { both.server.channel.turn(kNow); }) == ErrorCode::kUnavailable);
  CHECK(code_of([&] { both.client.channel.turn(kNow); }) == ErrorCode::kUnavailable);
  CHECK(arena == Bytes(5000));
  CHECK(both.network.refused_writes() == 1);
}

TEST_CASE("the length of a window never changes") {
  Connected both;
  CHECK(code_of([&] { both.client.channel.announce(*both.client.region, 0, 4095); }) == ErrorCode::kInvalid);
  CHECK(code_of([&] { both.client.channel.announce(*both.client.region, 1, 4096); }) == ErrorCode::kInvalid);
  CHECK(both.client.channel.counters().announcements == 1);
}

TEST_CASE("a window may move when it was not full: what follows goes to the new place") {
  Connected both;
  Bytes arena(10'000);
  const auto region = both.client.channel.domain()->register_memory(arena, Access::kRemoteWrite);
  both.server.channel.try_send(bytes_of("abc"));
  both.client.channel.turn(kNow);
  CHECK(both.client.channel.received() == 3);
  both.client.channel.announce(*region, 5000, 4096);
  CHECK(both.client.channel.received() == 0);
  both.server.channel.turn(kNow);
  both.server.channel.try_send(bytes_of("def"));
  both.client.channel.turn(kNow);
  CHECK(text_of(std::span(arena).subspan(5000, 3)) == "def");
  CHECK(both.client.channel.received() == 3);
  CHECK(both.client.channel.total_received() == 6);
}

TEST_CASE("what breaks the protocol is refused") {
  AgainstRaw raw;
  const auto turn = [&] { raw.client.channel.turn(kNow); };
  SUBCASE("a short control message") { raw.send(Bytes(31)); }
  SUBCASE("an unknown kind") { raw.send(AgainstRaw::control(4)); }
  SUBCASE("features") {
    Bytes message = AgainstRaw::control(1);
    message[31] = std::byte{1};
    raw.send(message);
  }
  SUBCASE("an empty window") { raw.send(AgainstRaw::window(4096, 0, 1)); }
  SUBCASE("a window that wraps") { raw.send(AgainstRaw::window(UINT64_MAX - 10, 100, 1)); }
  SUBCASE("an immediate that says more than was written") {
    raw.peer->post_write(0, bytes_of("abc"), std::nullopt, raw.client.region->address(),
                         raw.client.region->remote_key(), 4, false);
  }
  SUBCASE("more bytes than the window has") {
    const Bytes chunk(64);
    for (int i = 0; i < 64; ++i) {
      raw.peer->post_write(0, chunk, std::nullopt, raw.client.region->address(),
                           raw.client.region->remote_key(), 64, false);
    }
    turn();
    CHECK(raw.client.channel.window_full());
    raw.peer->post_write(0, bytes_of("x"), std::nullopt, raw.client.region->address(),
                         raw.client.region->remote_key(), 1, false);
  }
  CHECK(code_of(turn) == ErrorCode::kFormat);
}

TEST_CASE("a control message longer than its receive ends the connection") {
  AgainstRaw raw;
  raw.send(Bytes(33));
  CHECK(code_of([&] { raw.client.channel.turn(kNow); }) == ErrorCode::kUnavailable);
}

TEST_CASE("keep-alives and answers to no question are taken without end") {
  AgainstRaw raw;
  for (int i = 0; i < 3000; ++i) {
    raw.send(AgainstRaw::control(i % 2 == 0 ? 2 : 0));
    if (i % 500 == 499) {
      raw.peer->post_send(0, AgainstRaw::control(2), std::nullopt, true);  // frees the peer's send queue
      while (raw.client.channel.turn(kNow)) {
      }
      raw.heard();
    }
  }
  CHECK(raw.client.channel.counters().receives == 3006);
}

TEST_CASE("a client stops before a server could run out of receives") {
  AgainstRaw raw;
  raw.announce(1 << 15);
  raw.client.channel.turn(kNow);
  raw.heard();
  const Bytes byte = bytes_of("x");
  size_t sent = 0;
  while (raw.client.channel.try_send(byte) == 1) {
    ++sent;
    raw.heard();
    raw.client.channel.turn(kNow);
  }
  CHECK(sent == kMaxUnansweredSends - 1);  // one is the announcement
  raw.client.channel.answered(0);
  CHECK(raw.client.channel.try_send(byte) == 1);
  CHECK(raw.client.channel.try_send(byte) == 0);
  raw.client.channel.answered(raw.client.channel.total_sent() - 1);
  for (int i = 0; i < 100; ++i) CHECK(raw.client.channel.try_send(byte) == 1);
}

TEST_CASE("a window that is announced again says that all before was taken") {
  AgainstRaw raw;
  raw.announce(500);
  raw.client.channel.turn(kNow);
  const Bytes byte = bytes_of("x");
  for (int i = 0; i < 500; ++i) CHECK(raw.client.channel.try_send(byte) == 1);
  CHECK(raw.client.channel.try_send(byte) == 0);  // full
  raw.announce(500);
  raw.client.channel.turn(kNow);
  for (int i = 0; i < 500; ++i) REQUIRE(raw.client.channel.try_send(byte) == 1);
}

TEST_CASE("a server answers the question for features, and sends keep-alives") {
  FakeNetwork network;
  auto [peer, other] = network.pair();
  Bytes memory(64 * kControlBytes);
  const auto region = peer->domain()->register_memory(memory, Access::kReceive);
  for (size_t i = 0; i < 64; ++i) {
    peer->post_receive(i, std::span(memory).subspan(i * kControlBytes, kControlBytes), region->local_key());
  }
  Bytes window(4096);
  const auto window_region = other->domain()->register_memory(window, Access::kRemoteWrite);
  ChannelOptions options = End::options(Side::kServer, 1 << 16);
  SUBCASE("features") {
    Channel server(std::move(other), options);
    server.start(*window_region, 0, 4096);
    peer->start();
    Bytes question = AgainstRaw::control(0);
    question[3] = std::byte{9};
    peer->post_send(0, question, std::nullopt, false);
    server.turn(kNow);
    server.turn(kNow);
    std::array<Completion, 8> completions;
    REQUIRE(peer->poll(completions) == 2);  // its window, then the answer
    CHECK(std::equal(question.begin(), question.end(), memory.begin() + kControlBytes));
    CHECK(server.next_due() < Clock::now() + kKeepaliveInterval + std::chrono::seconds(1));
  }
  SUBCASE("keep-alives") {
    options.keepalive_interval = std::chrono::milliseconds(0);
    Channel server(std::move(other), options);
    server.start(*window_region, 0, 4096);
    peer->start();
    server.turn(kNow);
    server.turn(kNow);
    std::array<Completion, 8> completions;
    REQUIRE(peer->poll(completions) >= 2);
    const Bytes keepalive = AgainstRaw::control(2);
    CHECK(std::equal(keepalive.begin(), keepalive.end(), memory.begin() + kControlBytes));
  }
}

TEST_CASE("a fence completes when all before it was taken") {
  Connected both;
  both.server.channel.try_send(bytes_of("bye"));
  REQUIRE(both.server.channel.try_fence(5));
  std::array<uint64_t, 1> id{};
  both.network.set([](auto& faults) { faults.held = true; });
  both.server.channel.turn(kNow);
  CHECK(both.server.channel.take_completed(id) == 0);
  both.network.set([](auto& faults) { faults.held = false; });
  both.server.channel.turn(kNow);
  CHECK(both.server.channel.take_completed(id) == 1);
  CHECK(id[0] == 5);
  both.client.collect();
  CHECK(text_of(both.client.stream) == "bye");
}

TEST_CASE("ids that nobody takes stop what would complete more") {
  Connected both(1 << 20);
  Bytes value(10);
  const auto source = both.server.channel.domain()->register_memory(value, Access::kSource);
  size_t posted = 0;
  for (int idle = 0; idle < 3; ++idle) {
    while (both.server.channel.try_send_registered(value, source->local_key(), posted) > 0) {
      ++posted;
      idle = 0;
    }
    both.client.collect();
    both.server.channel.turn(kNow);
  }
  CHECK(posted == kSendDepth);
  std::array<uint64_t, 2> ids{};
  CHECK(both.server.channel.take_completed(ids) == 2);
  CHECK(ids[1] == 1);
  CHECK(both.server.channel.try_send_registered(value, source->local_key(), 1) == 10);
}

TEST_CASE("what came before the peer left is there; then the loss is told") {
  Connected both;
  both.server.channel.try_send(bytes_of("last words"));
  both.server.channel.turn(kNow);
  both.server.channel.close();
  both.client.collect();
  CHECK(text_of(both.client.stream) == "last words");
  CHECK(code_of([&] { both.client.channel.turn(kNow); }) == ErrorCode::kUnavailable);
}

TEST_CASE("a cut connection is told to both") {
  Connected both;
  both.network.cut();
  CHECK(code_of([&] { both.client.channel.turn(kNow); }) == ErrorCode::kUnavailable);
  CHECK(code_of([&] { both.server.channel.turn(kNow); }) == ErrorCode::kUnavailable);
}

TEST_CASE("after close nothing lands any more") {
  Connected both;
  both.network.set([](auto& faults) { faults.held = true; });
  both.server.channel.try_send(bytes_of("late"));
  both.client.channel.close();
  const Bytes before = both.client.window;
  both.network.set([](auto& faults) { faults.held = false; });
  CHECK(both.network.deliver(10) == 0);
  CHECK(both.client.window == before);
  CHECK(code_of([&] { both.server.channel.turn(kNow); }) == ErrorCode::kUnavailable);
  CHECK(code_of([&] { both.client.channel.turn(kNow); }) == ErrorCode::kUnavailable);
}

TEST_CASE("everything is deregistered at the end") {
  FakeNetwork network;
  {
    auto [one, other] = network.pair();
    End client(std::move(one), Side::kClient, 4096);
    End server(std::move(other), Side::kServer, 4096);
    CHECK(network.registered_bytes() > 8192);
  }
  CHECK(network.registered_bytes() == 0);
}

TEST_CASE("opening has its deadline") {
  FakeNetwork network;
  Bytes window(4096);
  const auto open = [&](Deadline deadline, const GiveUp& give_up) {
    auto queue_pair = network.resolve({"fake", 7, "", nullptr}, deadline, give_up);
    const auto region = queue_pair->domain()->register_memory(window, Access::kRemoteWrite);
    Channel channel(std::move(queue_pair), {});
    channel.open(*region, 0, 4096, deadline, give_up);
  };
  const Deadline soon = Deadline::after(std::chrono::milliseconds(30));
  SUBCASE("nobody listens") {
    CHECK(code_of([&] { open(Deadline::never(), kNever); }) == ErrorCode::kUnavailable);
  }
  SUBCASE("nobody answers") {
    network.set([](auto& faults) { faults.no_answer = true; });
    CHECK(code_of([&] { open(soon, kNever); }) == ErrorCode::kTimeout);
    CHECK(code_of([&] { open(Deadline::never(), [] { return true; }); }) == ErrorCode::kCancelled);
  }
  SUBCASE("a listener that does not accept") {
    const auto listener = network.listen("fake", 7, false);
    CHECK(code_of([&] { open(soon, kNever); }) == ErrorCode::kTimeout);
  }
  SUBCASE("no device") {
    network.set([](auto& faults) { faults.no_device = true; });
    CHECK(code_of([&] { open(soon, kNever); }) == ErrorCode::kNotSupported);
  }
}

TEST_CASE("who gives up while connecting takes the answer first") {
  FakeNetwork network;
  Bytes window(4096);
  const auto listener = network.listen("fake", 7, false);
  std::atomic<bool> left = false;
  std::thread client([&] {
    auto queue_pair = network.resolve({"fake", 7, "", nullptr}, Deadline::never(), kNever);
    const auto region = queue_pair->domain()->register_memory(window, Access::kRemoteWrite);
    Channel channel(std::move(queue_pair), {});
    try {
      channel.open(*region, 0, 4096, Deadline::never(), [] { return true; });
    } catch (const Error&) {  // cancelled, or it saw the server go
    }
    left = true;
  });
  std::unique_ptr<QueuePair> asked;
  const auto until = Clock::now() + std::chrono::seconds(10);
  while (asked == nullptr && Clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));  // a server that is busy
    asked = listener->accept();
  }
  CHECK_FALSE(left);
  if (asked != nullptr) asked->start();
  client.join();
  CHECK(asked != nullptr);
}

TEST_CASE("a client and a server on threads of their own") {
  FakeNetwork network;
  const auto listener = network.listen("fake", 0, true);
  const Bytes content = random_bytes(300'000, 12);
  const Deadline limit = Deadline::after(std::chrono::seconds(60));
  std::thread server([&] {
    std::unique_ptr<QueuePair> accepted;
    while (accepted == nullptr && !limit.passed()) {
      pollfd entry{listener->descriptor(), POLLIN, 0};
      ::poll(&entry, 1, 1000);
      accepted = listener->accept();
    }
    REQUIRE(accepted != nullptr);
    CHECK(accepted->domain() == listener->domain());
    End end(std::move(accepted), Side::kServer, 5000);
    end.channel.open(*end.region, 0, 5000, limit, kNever);
    std::span<const std::byte> rest = content;
    while (!limit.passed() && end.stream.size() < 4) {  // "done"
      if (!rest.empty()) rest = rest.subspan(end.channel.try_send(rest));
      end.channel.turn(std::chrono::milliseconds(100));
      end.collect();
    }
    CHECK(text_of(end.stream) == "done");
  });
  auto queue_pair = network.resolve({"fake", listener->port(), "", nullptr}, limit, kNever);
  End client(std::move(queue_pair), Side::kClient, 7000);
  client.channel.open(*client.region, 0, 7000, limit, kNever);
  while (client.stream.size() < content.size() && !limit.passed()) {
    client.channel.turn(std::chrono::milliseconds(100));
    client.collect();
  }
  CHECK(client.stream == content);
  CHECK(client.channel.try_send(bytes_of("done")) == 4);
  server.join();
}

}  // namespace
}  // namespace rdmaload::rdma
