// What wait() and set_low_water() promise, over a real loopback connection.
#include "transport/socket.h"

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <vector>

namespace rdmaload {
namespace {

constexpr int kShortMilliseconds = 50;
constexpr int kLongMilliseconds = 10'000;

// A connected Socket and the descriptor of its peer.
class Pair {
 public:
  Pair() {
    const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    REQUIRE(::bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0);
    REQUIRE(::listen(listener, 1) == 0);
    REQUIRE(::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0);
    socket = Socket::connect("127.0.0.1", ntohs(address.sin_port), Deadline::after(std::chrono::seconds(10)),
                             [] { return false; });
    peer = ::accept(listener, nullptr, nullptr);
    ::close(listener);
    REQUIRE(peer >= 0);
  }
  ~Pair() { close_peer(); }

  void send(size_t bytes) {
    const std::string text(bytes, 'x');
    REQUIRE(::send(peer, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes));
  }
  void close_peer() {
    if (peer >= 0) ::close(peer);
    peer = -1;
  }

  Socket socket;
  int peer = -1;
};

TEST_CASE("a socket is readable from its first byte on") {
  Pair pair;
  CHECK_FALSE(pair.socket.wait(true, false, kShortMilliseconds));
  pair.send(1);
  CHECK(pair.socket.wait(true, false, kLongMilliseconds));
}

TEST_CASE("with a low-water mark it is readable when that many bytes have come, or none will") {
  Pair pair;
  pair.socket.set_low_water(1000);
  pair.send(999);
  CHECK_FALSE(pair.socket.wait(true, false, kShortMilliseconds));
  SUBCASE("the bytes below the mark can be received all the same") {
    std::vector<std::byte> bytes(2000);
    CHECK(pair.socket.try_receive(bytes) == 999);
  }
  SUBCASE("the last byte wakes") {
    pair.send(1);
    CHECK(pair.socket.wait(true, false, kLongMilliseconds));
  }
  SUBCASE("a closed peer wakes") {
    pair.close_peer();
    CHECK(pair.socket.wait(true, false, kLongMilliseconds));
  }
  SUBCASE("a lower mark wakes for what is there") {
    pair.socket.set_low_water(1);
    CHECK(pair.socket.wait(true, false, kLongMilliseconds));
  }
  SUBCASE("the mark moves with the socket") {
    Socket moved = std::move(pair.socket);
    moved.set_low_water(1);
    CHECK(moved.wait(true, false, kLongMilliseconds));
  }
}

}  // namespace
}  // namespace rdmaload
