// The server against clients as they should not be: hostile, slow, half-closed, killed, too many; and what it
// holds once they are gone.
#include "server/server.h"

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <thread>

#include "core/error.h"
#include "support/bytes.h"
#include "support/temp_dir.h"

using namespace rdmaload::server;
using rdmaload::testing::bytes_of;
using rdmaload::testing::random_bytes;
using rdmaload::testing::text_of;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr auto kPatience = std::chrono::seconds(30);  // only an overloaded machine needs so long

class Client {
 public:
  explicit Client(int port, int receive_buffer = 0, const char* from = nullptr)
      : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    if (from != nullptr) {  // every 127.x.y.z is this machine
      sockaddr_in own{};
      own.sin_family = AF_INET;
      inet_pton(AF_INET, from, &own.sin_addr);
      REQUIRE(bind(fd_, reinterpret_cast<sockaddr*>(&own), sizeof(own)) == 0);
    }
    if (receive_buffer > 0) setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    const timeval patience{30, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
      close(fd_);
      throw std::runtime_error("no connection");
    }
  }
  ~Client() {
    if (fd_ >= 0) close(fd_);
  }
  Client(Client&& other) noexcept : fd_(std::exchange(other.fd_, -1)), buffer_(std::move(other.buffer_)) {}
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // As much as the server takes; false when it closed the connection.
  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
    return true;
  }
  // Until the socket takes no more without waiting.
  size_t send_until_full(std::string_view bytes) {
    size_t total = 0;
    while (true) {
      const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent > 0) total += static_cast<size_t>(sent);
      if (sent > 0) continue;
      // Full for now, or because the server has stopped to read?
      pollfd waiting{fd_, POLLOUT, 0};
      if (poll(&waiting, 1, 300) == 0) return total;
      if ((waiting.revents & (POLLERR | POLLHUP)) != 0) return total;
    }
  }
  std::string receive(size_t bytes) {
    while (buffer_.size() < bytes && more()) {
    }
    const size_t count = std::min(bytes, buffer_.size());
    std::string taken = buffer_.substr(0, count);
    buffer_.erase(0, count);
    return taken;
  }
  std::string line() {
    while (buffer_.find('\n') == std::string::npos && more()) {
    }
    const size_t end = buffer_.find('\n');
    return receive(end == std::string::npos ? buffer_.size() : end + 1);
  }
  std::string rest() {
    while (more()) {
    }
    return std::exchange(buffer_, {});
  }
  void end_output() { shutdown(fd_, SHUT_WR); }
  // As a process that is killed with unread data: the server gets a reset.
  void kill() {
    const linger now{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    close(std::exchange(fd_, -1));
  }

 private:
  bool more() {
    std::array<char, 65536> part;
    const ssize_t got = recv(fd_, part.data(), part.size(), 0);
    if (got <= 0) return false;
    buffer_.append(part.data(), static_cast<size_t>(got));
    return true;
  }
  int fd_;
  std::string buffer_;
};

struct Running {
  explicit Running(ServerOptions options = {}, uint64_t limit = 64 * kMiB)
      : memory(ValueMemory::make(limit)),
        store(std::make_shared<Store>(memory)),
        server(store, std::move(options)) {}
  const Counters& counters() { return server.counters(); }
  Client client(int receive_buffer = 0) { return Client(server.port(), receive_buffer); }
  std::shared_ptr<ValueMemory> memory;
  std::shared_ptr<Store> store;
  Server server;
};

bool eventually(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

std::string words(std::initializer_list<std::string_view> arguments) {
  std::string text = "*" + std::to_string(arguments.size()) + "\r\n";
  for (const std::string_view argument : arguments) {
    text += "$" + std::to_string(argument.size()) + "\r\n";
    text += argument;
    text += "\r\n";
  }
  return text;
}

}  // namespace

TEST_CASE("values of every size come back byte-equal, pipelined, over two connections") {
  Running running;
  Client writer = running.client();
  Client reader = running.client();
  for (const size_t size : {size_t{0}, size_t{1}, kSmallArgumentBytes, kSmallArgumentBytes + 1,
                            size_t{1044480}, size_t{9} << 20}) {
    const std::string value = text_of(random_bytes(size, size));
    REQUIRE(writer.send(words({"SET", "k", value}) + words({"STRLEN", "k"})));
    CHECK(writer.line() == "+OK\r\n");
    CHECK(writer.line() == ":" + std::to_string(size) + "\r\n");
    std::string asked;
    for (int i = 0; i < 5; ++i) asked += words({"GET", "k"});
    REQUIRE(reader.send(asked + words({"GETRANGE", "k", "-3", "-1"})));
    for (int i = 0; i < 5; ++i) {
      CHECK(reader.line() == "$" + std::to_string(size) + "\r\n");
      CHECK(reader.receive(size) == value);
      CHECK(reader.line() == "\r\n");
    }
    const std::string tail = value.substr(value.size() - std::min<size_t>(3, value.size()));
    CHECK(reader.line() == "$" + std::to_string(tail.size()) + "\r\n");
    CHECK(reader.receive(tail.size() + 2) == tail + "\r\n");
  }
}

TEST_CASE("ranges count as in Redis") {
  Running running;
  Client client = running.client();
  client.send(words({"SET", "k", "0123456789"}));
  CHECK(client.line() == "+OK\r\n");
  const std::vector<std::array<std::string, 3>> examples{
      {"0", "-1", "0123456789"}, {"0", "3", "0123"},  {"-3", "-1", "789"},
      {"5", "100", "56789"},     {"10", "20", ""},    {"5", "4", ""},
      {"-100", "2", "012"},      {"-100", "-90", ""}, {"3", "3", "3"}};
  for (const auto& [first, last, wanted] : examples) {
    CAPTURE(first);
    CAPTURE(last);
    client.send(words({"GETRANGE", "k", first, last}));
    CHECK(client.line() == "$" + std::to_string(wanted.size()) + "\r\n");
    CHECK(client.receive(wanted.size() + 2) == wanted + "\r\n");
  }
}

TEST_CASE("the memory limit answers OOM, takes the value off the stream and goes on") {
  Running running({}, 8 * kMiB);
  Client client = running.client();
  REQUIRE(client.send(words({"SET", "big", std::string(9 * kMiB, 'b')}) + words({"PING"})));
  CHECK(client.line().substr(0, 5) == "-OOM ");
  CHECK(client.line() == "+PONG\r\n");
  CHECK(running.memory->held_bytes() == 0);
  CHECK(running.counters().refused_for_memory == 1);
}

TEST_CASE("announced lengths allocate nothing beyond the limit, and are given back when the client goes") {
  Running running({}, 16 * kMiB);
  {
    std::vector<Client> clients;
    for (int i = 0; i < 40; ++i) {
      clients.push_back(running.client());
      clients.back().send("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5242880\r\nfew bytes");
    }
    REQUIRE(eventually([&] { return running.counters().refused_for_memory >= 37; }));
    CHECK(running.memory->held_bytes() <= 16 * kMiB);
    Client other = running.client();
    other.send(words({"SET", "small", "value"}) + words({"GET", "small"}));
    CHECK(other.line() == "+OK\r\n");
    CHECK(other.line() == "$5\r\n");
  }
  REQUIRE(eventually([&] { return running.counters().connections_now == 0; }));
  CHECK(running.memory->values() == 1);
  CHECK(running.memory->held_bytes() < 1000);
}

TEST_CASE(
    "requests of thousands of keys count as memory: beyond the limit they get OOM, and it is given back") {
  Running running({}, 8 * kMiB);
  std::string most = "*252\r\n$4\r\nMGET\r\n";  // of 251 keys the last is missing
  for (int i = 0; i < 250; ++i) most += "$16000\r\n" + std::string(16000, 'k') + "\r\n";
  std::vector<Client> clients;
  for (int i = 0; i < 6; ++i) {
    clients.push_back(running.client());
    clients.back().send(most);
  }
  REQUIRE(eventually([&] { return running.counters().refused_for_memory >= 4; }));
  REQUIRE(eventually([&] { return running.counters().connections_now <= 2; }));
  CHECK(running.counters().errors == running.counters().refused_for_memory);
  CHECK(running.memory->held_bytes() <= 8 * kMiB);
  clients.clear();
  REQUIRE(eventually([&] { return running.counters().connections_now == 0; }));
  CHECK(running.memory->held_bytes() == 0);
  // Alone it fits, and nothing of it is kept once it is answered, however long the client stays.
  Client alone = running.client();
  alone.send(most + "$1\r\nk\r\n");
  CHECK(alone.line() == "*251\r\n");
  for (int i = 0; i < 251; ++i) CHECK(alone.line() == "$-1\r\n");
  CHECK(eventually([&] { return running.memory->held_bytes() == 0; }));
}

TEST_CASE("replies of thousands of values that nobody takes count as memory, too") {
  Running running({}, 8 * kMiB);
  Client writer = running.client();
  writer.send(words({"SET", "k", std::string(kMiB, 'v')}));
  CHECK(writer.line() == "+OK\r\n");
  std::string many = "*16001\r\n$4\r\nMGET\r\n";
  for (int i = 0; i < 16000; ++i) many += "$1\r\nk\r\n";
  const uint64_t before = running.memory->held_bytes();
  std::vector<Client> slow;
  for (int i = 0; i < 8; ++i) {
    slow.push_back(running.client(4096));
    slow.back().send(many);
  }
  REQUIRE(eventually([&] { return running.counters().commands == 9; }));
  REQUIRE(eventually([&] { return running.counters().refused_for_memory > 0; }));
  CHECK(running.memory->held_bytes() <= 8 * kMiB);
  CHECK(running.counters().errors == 0);  // a word in the middle of a value would be taken for its bytes
  writer.send("PING\r\n");
  CHECK(writer.line() == "+PONG\r\n");
  slow.clear();
  REQUIRE(eventually([&] { return running.counters().connections_now == 1; }));
  CHECK(running.memory->held_bytes() == before);
}

TEST_CASE("garbage is answered and the connection closed; others go on") {
  Running running;
  for (const std::string_view garbage :
       {std::string_view("*1000000000\r\n"), std::string_view("*1\r\n$-5\r\n"),
        std::string_view("*1\r\n$9999999999999\r\n"),
        std::string_view("\x16\x03\x01\x02\x00\x01\x00\n\0\0", 10), std::string_view("GET '\r\n")}) {
    Client client = running.client();
    client.send(garbage);
    const std::string answer = client.rest();
    CHECK(answer.substr(0, 1) == "-");
  }
  std::mt19937_64 random(3);
  for (uint64_t i = 0; i < 50; ++i) {
    Client client = running.client();
    client.send(text_of(random_bytes(2000, i)));
    client.end_output();
    client.rest();
  }
  REQUIRE(eventually([&] { return running.counters().connections_now == 0; }));
  Client client = running.client();
  client.send("PING\r\n");
  CHECK(client.line() == "+PONG\r\n");
}

TEST_CASE("before authentication nothing but authentication is understood") {
  ServerOptions options;
  options.password = "secret";
  Running running(options);
  for (const std::string& refused :
       {words({"GET", "k"}), words({"SHUTDOWN"}), words({"INFO"}), words({"AUTH", "wrong"}),
        words({"AUTH", "other", "secret"}), words({"HELLO", "3"}),
        words({"HELLO", "3", "AUTH", "default", "secre"})}) {
    Client client = running.client();
    client.send(refused);
    CHECK(client.line().substr(0, 1) == "-");
    client.send(words({"GET", "k"}));
    CHECK(client.line().substr(0, 7) == "-NOAUTH");
  }
  Client large = running.client();
  large.send("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1048576\r\n");
  CHECK(large.rest().find("unauthenticated bulk length") != std::string::npos);
  Client client = running.client();
  client.send(words({"AUTH", "secret"}) + words({"SET", "k", std::string(100'000, 'v')}));
  CHECK(client.line() == "+OK\r\n");
  CHECK(client.line() == "+OK\r\n");
  client.send(words({"RESET"}) + words({"GET", "k"}));
  CHECK(client.line() == "+RESET\r\n");
  CHECK(client.line().substr(0, 7) == "-NOAUTH");
}

TEST_CASE("who guesses passwords is soon not listened to; others, and who is in already, notice nothing") {
  ServerOptions options;
  options.password = "secret";
  Running running(options);
  Client early(running.server.port(), 0, "127.0.0.2");
  early.send(words({"AUTH", "secret"}));
  CHECK(early.line() == "+OK\r\n");
  int guesses = 0;
  std::string answer;
  do {
    Client guesser(running.server.port(), 0, "127.0.0.2");
    const std::string guess = std::to_string(++guesses);
    guesser.send(guesses % 2 == 0 ? words({"AUTH", guess}) : words({"HELLO", "3", "AUTH", "default", guess}));
    answer = guesser.line();
    CHECK(answer.substr(0, 1) == "-");
    if (answer.substr(0, 9) == "-TRYAGAIN") CHECK(guesser.rest().empty());  // and is closed
  } while (answer.substr(0, 9) != "-TRYAGAIN" && guesses < 1000);
  CHECK(answer.substr(0, 9) == "-TRYAGAIN");
  CHECK(running.counters().auth_failures == static_cast<uint64_t>(guesses) - 1);
  CHECK(running.counters().auth_failures >= 10);
  CHECK(running.counters().auth_refused == 1);
  Client other = running.client();
  other.send(words({"AUTH", "secret"}));
  CHECK(other.line() == "+OK\r\n");
  early.send("PING\r\n");
  CHECK(early.line() == "+PONG\r\n");
}

TEST_CASE("a client that takes no replies is not read from: what waits for it stays bounded") {
  Running running;
  Client writer = running.client();
  writer.send(words({"SET", "k", std::string(kMiB, 'v')}));
  CHECK(writer.line() == "+OK\r\n");
  Client slow = running.client(4096);
  std::string many;
  for (int i = 0; i < 5000; ++i) many += words({"GET", "k"});
  const size_t taken = slow.send_until_full(many);
  // 1,024 pending pieces are about as many commands; the rest is what sockets buffer.
  CHECK(taken < 64 * kMiB);
  CHECK(running.counters().commands < 3000);
  CHECK(running.memory->values() == 1);
  // It does not hold up anybody, and gets all of it once it reads.
  writer.send("PING\r\n");
  CHECK(writer.line() == "+PONG\r\n");
  for (int i = 0; i < 100; ++i) {
    REQUIRE(slow.line() == "$1048576\r\n");
    REQUIRE(slow.receive(kMiB) == std::string(kMiB, 'v'));
    REQUIRE(slow.line() == "\r\n");
  }
}

TEST_CASE("what is on its way stays as it was, when the value is replaced and its memory used again") {
  Running running;
  Client writer = running.client();
  Client slow = running.client(256 << 10);
  const std::string value = text_of(random_bytes(kMiB - 4096, 1));
  writer.send(words({"SET", "k", value}));
  CHECK(writer.line() == "+OK\r\n");
  slow.send(words({"GET", "k"}) + words({"GET", "k"}));
  CHECK(slow.line() == "$1044480\r\n");  // the rest waits in sockets, by reference
  for (int i = 0; i < 8; ++i) {
    const std::string other(kMiB - 4096, static_cast<char>('a' + i));
    writer.send(words({"SET", "k", other}) + words({"SET", "l", other}) + words({"DEL", "l"}));
    CHECK(writer.line() == "+OK\r\n");
    CHECK(writer.line() == "+OK\r\n");
    CHECK(writer.line() == ":1\r\n");
  }
  CHECK(slow.receive(value.size()) == value);
  CHECK(slow.line() == "\r\n");
  CHECK(slow.line() == "$1044480\r\n");
  CHECK(slow.receive(value.size()) == value);
  CHECK(running.counters().bytes_by_reference == 2 * value.size());
}

TEST_CASE("large values are sent by reference, from any place in them; small ones and text by a copy") {
  Running running;
  Client client = running.client();
  const std::string value = text_of(random_bytes(3 * kMiB + 5, 1));
  client.send(words({"SET", "k", value}) + words({"SET", "small", value.substr(0, 1000)}));
  CHECK(client.line() == "+OK\r\n");
  CHECK(client.line() == "+OK\r\n");
  client.send(words({"GET", "small"}) + words({"GET", "k"}) + words({"GETRANGE", "k", "4097", "1048576"}) +
              words({"GETRANGE", "k", "1", "100"}) + words({"GETRANGE", "k", "9", "300008"}));
  CHECK(client.line() == "$1000\r\n");
  CHECK(client.receive(1000) == value.substr(0, 1000));
  CHECK(client.line() == "\r\n");
  CHECK(client.line() == "$3145733\r\n");
  CHECK((client.receive(value.size()) == value));
  CHECK(client.line() == "\r\n");
  CHECK(client.line() == "$1044480\r\n");
  CHECK((client.receive(1044480) == value.substr(4097, 1044480)));
  CHECK(client.line() == "\r\n");
  CHECK(client.line() == "$100\r\n");
  CHECK(client.receive(100) == value.substr(1, 100));
  CHECK(client.line() == "\r\n");
  // References to small parts would keep huge pages of many times their size.
  CHECK(client.line() == "$300000\r\n");
  CHECK((client.receive(300000) == value.substr(9, 300000)));
  CHECK(running.counters().bytes_by_reference == value.size() + 1044480);
}

TEST_CASE("where a sandbox forbids references values are copied, and an operator reads so") {
  long forbidden = 0;
  std::string expected;
  SUBCASE("vmsplice") { forbidden = __NR_vmsplice, expected = "vmsplice"; }
  SUBCASE("splice") { forbidden = __NR_splice, expected = "splice"; }
  SUBCASE("pipe2") { forbidden = __NR_pipe2, expected = "pipe2"; }
  // The filter holds for this thread and those that it starts.
  std::thread sandboxed([&] {
    sock_filter program[] = {
        {BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(seccomp_data, nr)},
        {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, static_cast<uint32_t>(forbidden)},
        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | EPERM},
        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW},
    };
    const sock_fprog filter{4, program};
    REQUIRE(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    REQUIRE(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0);
    Running running;
    Client client = running.client();
    const std::string value = text_of(random_bytes(3 * kMiB, 1));
    client.send(words({"SET", "k", value}) + words({"GET", "k"}));
    CHECK(client.line() == "+OK\r\n");
    CHECK(client.line() == "$3145728\r\n");
    CHECK((client.receive(value.size()) == value));
    CHECK(running.counters().bytes_by_reference == 0);
    const std::vector<std::string> log = running.server.take_log();
    REQUIRE(!log.empty());
    CHECK(log[0].find(": " + expected + ": Operation not permitted") != std::string::npos);
  });
  sandboxed.join();
}

TEST_CASE("a half-closed client gets what it has asked for") {
  Running running;
  Client client = running.client();
  std::string asked = words({"SET", "k", std::string(3 * kMiB, 'v')});
  for (int i = 0; i < 3; ++i) asked += words({"GET", "k"});
  REQUIRE(client.send(asked + "*2\r\n$3\r\nGE"));
  client.end_output();
  const std::string answer = client.rest();
  CHECK(answer.size() == 5 + 3 * (10 + 3 * kMiB + 2));
  REQUIRE(eventually([&] { return running.counters().connections_now == 0; }));
}

TEST_CASE("connections of which nothing moves are closed; idle ones are not") {
  ServerOptions options;
  options.stall_timeout = std::chrono::milliseconds(300);
  Running running(options);
  Client idle = running.client();
  idle.send("PING\r\n");
  CHECK(idle.line() == "+PONG\r\n");
  Client partial = running.client();
  partial.send("*2\r\n$3\r\nGET\r\n");
  CHECK(partial.rest().empty());  // closed by the server
  CHECK(running.counters().connections_stalled == 1);
  idle.send("PING\r\n");
  CHECK(idle.line() == "+PONG\r\n");
}

TEST_CASE("the limit of connections refuses more and admits again") {
  ServerOptions options;
  options.max_connections = 2;
  Running running(options);
  Client first = running.client();
  {
    Client second = running.client();
    REQUIRE(eventually([&] { return running.counters().connections_now == 2; }));
    Client third = running.client();
    CHECK(third.rest() == "-ERR max number of clients reached\r\n");
  }
  REQUIRE(eventually([&] { return running.counters().connections_now == 1; }));
  Client fourth = running.client();
  fourth.send("PING\r\n");
  CHECK(fourth.line() == "+PONG\r\n");
  CHECK(running.counters().connections_refused == 1);
}

TEST_CASE("200 clients that come and go, half of them slow or killed, leave nothing and hold up nobody") {
  ServerOptions options;
  options.threads = 3;
  Running running(options);
  const std::string value = text_of(random_bytes(kMiB - 4096, 1));
  {
    Client writer = running.client();
    for (const char* key : {"a", "b", "c"}) {
      writer.send(words({"SET", key, value}));
      REQUIRE(writer.line() == "+OK\r\n");
    }
  }
  REQUIRE(eventually([&] { return running.counters().connections_now == 0; }));
  const uint64_t used = running.memory->used_bytes();
  const uint64_t held = running.memory->held_bytes();

  constexpr int kClients = 200;
  std::atomic<uint64_t> received = 0;
  std::atomic<int> wrong = 0;
  std::atomic<int> next = 0;
  std::vector<Client> slow;  // ask for much and never read, until all others are done
  for (int i = 0; i < kClients / 4; ++i) {
    slow.push_back(running.client(4096));
    for (int j = 0; j < 8; ++j) slow.back().send(words({"GET", "a"}));
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      while (true) {
        const int number = next++;
        if (number >= kClients - kClients / 4) return;
        Client client = running.client();
        if (number % 3 == 0) {  // killed: in the middle of a reply, of a value, or of a request
          client.send(number % 2 == 0
                          ? words({"MGET", "a", "b", "c"})
                          : "*3\r\n$3\r\nSET\r\n$1\r\nd\r\n$1000000\r\n" + value.substr(0, 500'000));
          if (number % 2 == 0) client.receive(1000);
          client.kill();
          continue;
        }
        client.send(words({"MGET", "a", "b", "c"}) + words({"PING"}));
        if (client.line() != "*3\r\n") ++wrong;
        for (int i = 0; i < 3; ++i) {
          client.line();
          if (client.receive(value.size()) != value) ++wrong;
          client.line();
          received += value.size();
        }
        if (client.line() != "+PONG\r\n") ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(received == uint64_t{100} * 3 * value.size());
  CHECK(running.counters().connections_now >= slow.size());
  for (size_t i = 0; i < slow.size(); i += 2) slow[i].kill();
  slow.clear();
  REQUIRE(eventually([&] { return running.counters().connections_now == 0; }));
  CHECK(running.counters().connections_accepted == uint64_t{1} + kClients);
  CHECK(running.counters().bytes_sent >= received);
  CHECK(running.memory->used_bytes() == used);
  CHECK(running.memory->held_bytes() == held);
  CHECK(running.memory->values() == 3);
  CHECK(running.store->size() == 3);
}

TEST_CASE(
    "exported files are served by range; one that became short ends that connection only, with a line") {
  const rdmaload::testing::TempDir folder;
  const auto content = random_bytes(3 * kMiB, 5);
  folder.write("weights", content);
  const std::string path = (folder.path() / "weights").string();
  struct stat status{};
  REQUIRE(stat(path.c_str(), &status) == 0);
  const int64_t written = int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
  Running running;
  {
    const auto file = std::make_shared<const ExportedFile>(path, content.size(), written);
    running.store->export_range("m/0", {file, 0, 2 * kMiB});
    running.store->export_range("m/1", {file, 2 * kMiB, kMiB});
  }
  Client client = running.client();
  client.send(words({"GETRANGE", "m/1", "10", "19"}) + words({"GET", "m/0"}) + words({"STRLEN", "m/1"}));
  CHECK(client.receive(17) == "$10\r\n" + text_of(std::span(content).subspan(2 * kMiB + 10, 10)) + "\r\n");
  CHECK(client.line() == "$2097152\r\n");
  CHECK(client.receive(2 * kMiB) == text_of(std::span(content).first(2 * kMiB)));
  CHECK(client.line() == "\r\n");
  CHECK(client.line() == ":1048576\r\n");
  std::filesystem::resize_file(path, kMiB);
  client.send(words({"GET", "m/0"}));
  CHECK(client.rest().size() == 10 + kMiB);
  const auto lines = running.server.take_log();
  REQUIRE(lines.size() == 1);
  CHECK(lines[0].find(path + ": ends before byte 1048576") == 0);
  CHECK(running.counters().files_failed == 1);
  Client other = running.client();
  other.send("PING\r\n");
  CHECK(other.line() == "+PONG\r\n");
}

TEST_CASE("stop closes every connection, may be repeated, and frees the port") {
  auto running = std::make_unique<Running>();
  const int port = running->server.port();
  Client client = running->client();
  client.send("PING\r\n");
  CHECK(client.line() == "+PONG\r\n");
  CHECK(!running->server.wait(std::chrono::seconds(0)));
  running->server.stop();
  running->server.stop();
  CHECK(running->server.wait(std::chrono::seconds(0)));
  CHECK(client.rest().empty());
  CHECK(running->counters().connections_now == 0);
  CHECK_THROWS(Client(port));
  ServerOptions options;
  options.port = port;
  Running again(options);
  CHECK(again.server.port() == port);
  options.port = port;
  CHECK_THROWS_AS(Server(again.store, options), rdmaload::Error);
}

TEST_CASE("SHUTDOWN ends the wait of whoever runs the server") {
  Running running;
  Client client = running.client();
  for (const char* word : {"ABORT", "SAVE", "later"}) {
    client.send(words({"SHUTDOWN", word}));
    CHECK(client.line().substr(0, 5) == "-ERR ");
  }
  CHECK(!running.server.wait(std::chrono::seconds(0)));
  client.send(words({"SHUTDOWN", "NOSAVE"}));
  CHECK(client.rest().empty());
  CHECK(running.server.wait(std::chrono::seconds(30)));
}

TEST_CASE("the two protocols differ where clients expect it") {
  Running running;
  Client client = running.client();
  client.send(words({"SADD", "s", "x"}) + words({"GET", "none"}) + words({"SMEMBERS", "s"}));
  CHECK(client.line() == ":1\r\n");
  CHECK(client.line() == "$-1\r\n");
  CHECK(client.receive(11) == "*1\r\n$1\r\nx\r\n");
  client.send(words({"HELLO", "3", "SETNAME", "me"}));
  CHECK(client.line() == "%7\r\n");
  while (client.line() != "*0\r\n") {
  }
  client.send(words({"GET", "none"}) + words({"SMEMBERS", "s"}) + words({"CLIENT", "GETNAME"}) +
              words({"CONFIG", "GET", "maxmemory-p*"}));
  CHECK(client.line() == "_\r\n");
  CHECK(client.receive(11) == "~1\r\n$1\r\nx\r\n");
  CHECK(client.receive(8) == "$2\r\nme\r\n");
  CHECK(client.receive(4) == "%1\r\n");
}

TEST_CASE("patterns are bounded, as they are compared with every key") {
  Running running;
  Client client = running.client();
  client.send(words({"SCAN", "0", "MATCH", std::string(1025, '*')}));
  CHECK(client.line().substr(0, 15) == "-ERR a pattern ");
  client.send(words({"SCAN", "0", "MATCH", std::string(1024, '*')}));
  CHECK(client.line() == "*2\r\n");
}

TEST_CASE("a name cannot make two lines of one in the list of clients") {
  Running running;
  Client client = running.client();
  client.send(words({"HELLO", "2", "SETNAME", "a\nid=7"}) + words({"CLIENT", "GETNAME"}));
  CHECK(client.line().substr(0, 18) == "-ERR Client names ");
  CHECK(client.line() == "$-1\r\n");
}
