// The pipe that hands memory to sockets by reference: which bytes arrive, that nothing stays in it, and what
// it does where the system refuses.
#include "server/splice_pipe.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/bytes.h"

using rdmaload::server::SplicePipe;
using rdmaload::testing::random_bytes;

namespace {

constexpr size_t kPipeBytes = 256 << 10;

// Two ends of a stream, non-blocking as the server's.
struct Pair {
  Pair() { REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0); }
  ~Pair() {
    for (const int end : ends) close(end);
  }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;
  // What has come until now.
  std::vector<std::byte> take() const {
    std::vector<std::byte> taken;
    std::array<std::byte, 65536> part;
    for (ssize_t got = 0; (got = recv(ends[1], part.data(), part.size(), 0)) > 0;) {
      taken.insert(taken.end(), part.begin(), part.begin() + got);
    }
    return taken;
  }
  int ends[2];
};

// Runs `body` in a thread that ends with it, which a filter of system calls outlives nowhere else.
template <typename Body>
void in_its_own_thread(Body body) {
  std::thread(body).join();
}

// From now on this thread gets EPERM from a system call, as in a sandbox. False: the system takes no filters.
bool forbid(long call) {
  std::array<sock_filter, 4> program{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(call), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog filter{program.size(), program.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

}  // namespace

TEST_CASE("bytes reach the socket in order, whatever their length and where they begin in a page") {
  SplicePipe pipe;
  REQUIRE(pipe.refusal() == "");
  const auto value = random_bytes((3 << 20) + 77, 1);
  for (const size_t begin : {size_t{0}, size_t{1}, size_t{4095}}) {
    CAPTURE(begin);
    const Pair pair;
    const auto bytes = std::span(value).subspan(begin);
    std::vector<std::byte> arrived;
    for (size_t sent = 0; sent < bytes.size();) {
      const ssize_t now = pipe.send(pair.ends[0], bytes.subspan(sent), false);
      if (now > 0) {
        CHECK(static_cast<size_t>(now) <= kPipeBytes);
        sent += static_cast<size_t>(now);
      } else {
        REQUIRE(errno == EAGAIN);
      }
      const auto part = pair.take();
      arrived.insert(arrived.end(), part.begin(), part.end());
    }
    CHECK((std::equal(bytes.begin(), bytes.end(), arrived.begin(), arrived.end())));
    CHECK(pipe.refusal() == "");
  }
}

TEST_CASE("what the socket has taken is the memory itself, no copy of it") {
  SplicePipe pipe;
  REQUIRE(pipe.refusal() == "");
  const Pair pair;
  const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  auto* page = static_cast<std::byte*>(
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  REQUIRE(page != MAP_FAILED);
  std::fill_n(page, size, std::byte{1});
  REQUIRE(pipe.send(pair.ends[0], {page, size}, false) == static_cast<ssize_t>(size));
  std::fill_n(page, size, std::byte{2});  // what whoever calls it must not do
  CHECK((pair.take() == std::vector<std::byte>(size, std::byte{2})));
  munmap(page, size);
}

TEST_CASE("what a full socket leaves in the pipe never comes out for another") {
  SplicePipe pipe;
  REQUIRE(pipe.refusal() == "");
  const auto first = random_bytes(1 << 20, 2), second = random_bytes(5000, 3);
  const Pair full, other;
  size_t sent = 0;
  ssize_t now = 0;
  while ((now = pipe.send(full.ends[0], std::span(first).subspan(sent), true)) > 0) {
    sent += static_cast<size_t>(now);
    REQUIRE(sent < first.size());  // a socket holds less
  }
  CHECK(errno == EAGAIN);
  CHECK(sent > 0);
  REQUIRE(pipe.send(other.ends[0], second, false) == static_cast<ssize_t>(second.size()));
  CHECK((other.take() == second));
  CHECK((full.take() == std::vector<std::byte>(first.begin(), first.begin() + static_cast<ptrdiff_t>(sent))));
  CHECK(pipe.refusal() == "");
}

TEST_CASE("a lost socket is its own error, and the pipe serves the others on") {
  SplicePipe pipe;
  REQUIRE(pipe.refusal() == "");
  const auto bytes = random_bytes(5000, 4);
  in_its_own_thread([&] {
    sigset_t pipe_signal;
    sigemptyset(&pipe_signal);
    sigaddset(&pipe_signal, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe_signal, nullptr);
    const Pair lost;
    shutdown(lost.ends[1], SHUT_RDWR);
    CHECK(pipe.send(lost.ends[0], bytes, false) == -1);
    CHECK(errno == EPIPE);
  });
  CHECK(pipe.refusal() == "");
  const Pair pair;
  REQUIRE(pipe.send(pair.ends[0], bytes, false) == static_cast<ssize_t>(bytes.size()));
  CHECK((pair.take() == bytes));
}

TEST_CASE("a target that splice does not know refuses the pipe for good, and nothing is sent") {
  SplicePipe pipe;
  REQUIRE(pipe.refusal() == "");
  const auto bytes = random_bytes(5000, 5);
  // A file that is opened for appending takes no splice: EINVAL, as a sandbox's sockets give.
  const int file = memfd_create("target", MFD_CLOEXEC);
  REQUIRE(fcntl(file, F_SETFL, O_APPEND) == 0);
  CHECK(pipe.send(file, bytes, false) == -1);
  CHECK(errno == EAGAIN);
  CHECK(pipe.refusal().starts_with("splice: "));
  CHECK(lseek(file, 0, SEEK_END) == 0);
  close(file);
  const Pair pair;
  CHECK(pipe.send(pair.ends[0], bytes, false) == -1);
  CHECK(errno == EAGAIN);
  CHECK(pair.take().empty());
}

TEST_CASE("a system call that is forbidden is named when the pipe is made") {
  for (const auto& [call, name] : {std::pair<long, const char*>{SYS_vmsplice, "vmsplice: "},
                                   {SYS_splice, "splice: "},
                                   {SYS_pipe2, "pipe2: "},
                                   {SYS_fcntl, "F_SETPIPE_SZ: "}}) {
    CAPTURE(name);
    in_its_own_thread([&, forbidden = call, begins = name] {
      if (!forbid(forbidden)) {
        MESSAGE("this system takes no filters of system calls");
        return;
      }
      SplicePipe pipe;
      CHECK(pipe.refusal().starts_with(begins));
      const Pair pair;
      const auto bytes = random_bytes(100, 6);
      CHECK(pipe.send(pair.ends[0], bytes, false) == -1);
      CHECK(errno == EAGAIN);
      CHECK(pair.take().empty());
    });
  }
}

TEST_CASE("a call that is forbidden later refuses the pipe then") {
  SplicePipe pipe;
  REQUIRE(pipe.refusal() == "");
  in_its_own_thread([&] {
    if (!forbid(SYS_vmsplice)) return;
    const Pair pair;
    const auto bytes = random_bytes(100, 7);
    CHECK(pipe.send(pair.ends[0], bytes, false) == -1);
    CHECK(errno == EAGAIN);
    CHECK(pipe.refusal().starts_with("vmsplice: "));
    CHECK(pair.take().empty());
  });
}
