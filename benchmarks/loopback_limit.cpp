// The raw limit of this machine's loopback: a process that sends, one that receives, no protocol, no
// checksums.
//
//   loopback_limit BYTES CHUNK CONNECTIONS send|sendfile|sendfile-huge|splice|splice-huge
//
// The sender's process has BYTES in a memory file and sends them chunk by chunk, a thread per connection, by
// send() from the mapping or by sendfile() from the file; or it has them in private memory and sends them by
// vmsplice() and splice(). The memory has huge pages if so asked and if the system gives them (to shared
// memory most do not). The receiver has a thread per connection, too, and receives into fresh memory
// with huge pages. Both sides' sockets are set as the weight server sets its own. Every byte that arrives is
// one of its place (the low byte of its chunk's number), which is looked at after the clock has stopped.
// Prints one line of JSON; sender_cpu_seconds is of sending alone.

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <thread>
#include <vector>

namespace {

constexpr size_t kHugePageBytes = 2 << 20;
constexpr int kPipeBytes = 256 << 10;  // as the weight server's

[[noreturn]] void die(const char* what) {
  std::perror(what);
  std::_Exit(1);
}

void set_up(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  for (const char* name : {"cubic", "reno"}) {
    if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, static_cast<socklen_t>(std::strlen(name))) == 0)
      return;
  }
}

struct Range {
  size_t begin, end;
};

// The chunks of one connection are next to each other.
Range range_of(size_t number, size_t connections, size_t chunks, size_t chunk, size_t total) {
  return {std::min(total, chunks * number / connections * chunk),
          std::min(total, chunks * (number + 1) / connections * chunk)};
}

void send_all(int fd, int file, const char* data, Range range, size_t chunk, bool by_file) {
  for (size_t at = range.begin; at < range.end;) {
    const size_t length = std::min(chunk - at % chunk, range.end - at);
    auto offset = static_cast<off_t>(at);
    const ssize_t sent =
        by_file ? sendfile(fd, file, &offset, length) : send(fd, data + at, length, MSG_NOSIGNAL);
    if (sent <= 0) die("send");
    at += static_cast<size_t>(sent);
  }
}

void splice_all(int fd, const char* data, Range range, size_t chunk) {
  int ends[2];
  if (pipe(ends) != 0 || fcntl(ends[1], F_SETPIPE_SZ, kPipeBytes) < 0) die("pipe");
  for (size_t at = range.begin; at < range.end;) {
    const size_t length = std::min({chunk - at % chunk, range.end - at, size_t{kPipeBytes}});
    iovec piece{const_cast<char*>(data) + at, length};
    const ssize_t filled = vmsplice(ends[1], &piece, 1, 0);
    if (filled <= 0) die("vmsplice");
    for (ssize_t left = filled; left > 0;) {
      const ssize_t sent = splice(ends[0], nullptr, fd, nullptr, static_cast<size_t>(left), 0);
      if (sent <= 0) die("splice");
      left -= sent;
    }
    at += static_cast<size_t>(filled);
  }
  close(ends[0]);
  close(ends[1]);
}

double cpu_seconds(int who) {
  rusage used{};
  getrusage(who, &used);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
  };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) die("usage: loopback_limit BYTES CHUNK CONNECTIONS send|sendfile|...");
  const auto total = static_cast<size_t>(std::atoll(argv[1]));
  const auto chunk = static_cast<size_t>(std::atoll(argv[2]));
  const auto connections = static_cast<size_t>(std::atoll(argv[3]));
  const std::string_view how = argv[4];
  const bool by_file = how.starts_with("sendfile");
  const bool by_splice = how.starts_with("splice");
  const size_t chunks = (total + chunk - 1) / chunk;

  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(listener, 64) != 0)
    die("listen");
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);

  int ready[2];
  if (pipe(ready) != 0) die("pipe");
  const pid_t sender = fork();
  if (sender == 0) {
    const int file = memfd_create("loopback_limit", 0);
    if (file < 0 || ftruncate(file, static_cast<off_t>(total)) != 0) die("memfd");
    const size_t reserve = total + kHugePageBytes;
    void* mapped = by_splice
                       ? mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                       : mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED) die("mmap");
    madvise(mapped, by_splice ? reserve : total, how.ends_with("-huge") ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    char* data = static_cast<char*>(mapped);
    if (by_splice) data += kHugePageBytes - reinterpret_cast<size_t>(mapped) % kHugePageBytes;
    for (size_t i = 0; i < chunks; ++i) {
      std::memset(data + i * chunk, static_cast<int>(i & 0xff), std::min(chunk, total - i * chunk));
    }
    const double filled = cpu_seconds(RUSAGE_SELF);
    if (write(ready[1], "r", 1) != 1) die("write");
    std::vector<std::thread> threads;
    for (size_t i = 0; i < connections; ++i) {
      const int fd = accept(listener, nullptr, nullptr);
      if (fd < 0) die("accept");
      set_up(fd);
      threads.emplace_back([=] {
        // Which range this connection wants.
        unsigned char number = 0;
        if (recv(fd, &number, 1, MSG_WAITALL) != 1) die("recv");
        const Range range = range_of(number, connections, chunks, chunk, total);
        if (by_splice) {
          splice_all(fd, data, range, chunk);
        } else {
          send_all(fd, file, data, range, chunk, by_file);
        }
        close(fd);
      });
    }
    for (std::thread& thread : threads) thread.join();
    const double used = cpu_seconds(RUSAGE_SELF) - filled;
    if (write(ready[1], &used, sizeof(used)) != sizeof(used)) die("write");
    std::_Exit(0);
  }
  char word = 0;
  if (read(ready[0], &word, 1) != 1) die("the sender is not ready");

  const auto start = std::chrono::steady_clock::now();
  const double cpu_start = cpu_seconds(RUSAGE_SELF);
  void* mapped =
      mmap(nullptr, total + kHugePageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) die("mmap");
  madvise(mapped, total + kHugePageBytes, MADV_HUGEPAGE);
  char* arena = static_cast<char*>(mapped);
  arena += kHugePageBytes - reinterpret_cast<size_t>(mapped) % kHugePageBytes;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < connections; ++i) {
    threads.emplace_back([=] {
      const int fd = socket(AF_INET, SOCK_STREAM, 0);
      if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) die("connect");
      set_up(fd);
      const auto number = static_cast<unsigned char>(i);
      if (send(fd, &number, 1, MSG_NOSIGNAL) != 1) die("send");
      const Range range = range_of(i, connections, chunks, chunk, total);
      for (size_t at = range.begin; at < range.end;) {
        const ssize_t got = recv(fd, arena + at, range.end - at, 0);
        if (got <= 0) die("recv");
        at += static_cast<size_t>(got);
      }
      close(fd);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const double cpu = cpu_seconds(RUSAGE_SELF) - cpu_start;
  int status = 0;
  if (waitpid(sender, &status, 0) != sender || status != 0) die("the sender failed");
  double sender_cpu = 0;
  if (read(ready[0], &sender_cpu, sizeof(sender_cpu)) != sizeof(sender_cpu)) die("the sender said nothing");
  for (size_t at = 0; at < total; ++at) {
    if (static_cast<unsigned char>(arena[at]) != ((at / chunk) & 0xff)) die("another byte arrived");
  }
  std::printf("{\"seconds\": %.6f, \"cpu_seconds\": %.6f, \"sender_cpu_seconds\": %.6f}\n", seconds, cpu,
              sender_cpu);
}
