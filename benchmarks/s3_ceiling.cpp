// The raw ceiling of reading objects over HTTP: ranged GETs on a few connections, received at their exact
// places in fresh memory with huge pages, without checksums, retries or time-outs. Prints one line of JSON;
// anything unexpected ends the program.
//
//   s3_ceiling HOST PORT OBJECTS CONNECTIONS RANGE_BYTES [DUMP]
//
// OBJECTS has a line "target length" per object, in the order of their places. DUMP is written after the
// clock has stopped. One thread per connection.

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr size_t kHugePageBytes = 2 << 20;
constexpr size_t kHeadBytes = 4096;

struct Range {
  std::string request;
  size_t length;
  size_t place;
};

[[noreturn]] void die(const char* what) {
  std::perror(what);
  std::_Exit(1);
}

int connect_to(const char* host, const char* port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host, port, &hints, &found) != 0) die("getaddrinfo");
  const int fd = socket(found->ai_family, SOCK_STREAM, 0);
  if (fd < 0 || connect(fd, found->ai_addr, found->ai_addrlen) != 0) die("connect");
  freeaddrinfo(found);
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  return fd;
}

void read_range(int fd, const Range& range, char* arena) {
  for (size_t sent = 0; sent < range.request.size();) {
    const ssize_t now = send(fd, range.request.data() + sent, range.request.size() - sent, MSG_NOSIGNAL);
    if (now <= 0) die("send");
    sent += static_cast<size_t>(now);
  }
  char head[kHeadBytes];
  size_t have = 0;
  char* end = nullptr;
  while (end == nullptr) {
    if (have == kHeadBytes) die("a head longer than expected");
    const ssize_t got = recv(fd, head + have, kHeadBytes - have, 0);
    if (got <= 0) die("recv");
    have += static_cast<size_t>(got);
    end = static_cast<char*>(memmem(head, have, "\r\n\r\n", 4));
  }
  if (std::memcmp(head, "HTTP/1.1 206", 12) != 0) die("not a 206");
  size_t done = have - static_cast<size_t>(end + 4 - head);
  if (done > range.length) die("more than asked for");
  std::memcpy(arena + range.place, end + 4, done);
  while (done < range.length) {
    const ssize_t got = recv(fd, arena + range.place + done, range.length - done, 0);
    if (got <= 0) die("recv");
    done += static_cast<size_t>(got);
  }
}

std::vector<Range> read_objects(const char* path, const std::string& host, size_t range_bytes) {
  std::ifstream file(path);
  std::vector<Range> ranges;
  std::string target;
  size_t length = 0, place = 0;
  while (file >> target >> length) {
    for (size_t at = 0; at < length; at += range_bytes) {
      const size_t size = std::min(range_bytes, length - at);
      ranges.push_back({"GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\nRange: bytes=" +
                            std::to_string(at) + "-" + std::to_string(at + size - 1) + "\r\n\r\n",
                        size, place + at});
    }
    place += length;
  }
  return ranges;
}

double cpu_seconds() {
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
  };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6 && argc != 7) die("usage: s3_ceiling HOST PORT OBJECTS CONNECTIONS RANGE_BYTES [DUMP]");
  const std::vector<Range> ranges = read_objects(argv[3], argv[1], static_cast<size_t>(std::atoll(argv[5])));
  const auto connections = static_cast<size_t>(std::atoll(argv[4]));
  const size_t total = ranges.empty() ? 0 : ranges.back().place + ranges.back().length;

  const auto start = std::chrono::steady_clock::now();
  const double cpu_start = cpu_seconds();
  void* mapped =
      mmap(nullptr, total + kHugePageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) die("mmap");
  madvise(mapped, total + kHugePageBytes, MADV_HUGEPAGE);
  char* arena = static_cast<char*>(mapped);
  arena += kHugePageBytes - reinterpret_cast<size_t>(mapped) % kHugePageBytes;

  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  const auto work = [&] {
    const int fd = connect_to(argv[1], argv[2]);
    for (size_t at; (at = next.fetch_add(1, std::memory_order_relaxed)) < ranges.size();) {  // only counts
      read_range(fd, ranges[at], arena);
    }
    close(fd);
  };
  for (size_t number = 1; number < connections; ++number) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  const double cpu = cpu_seconds() - cpu_start;
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

  if (argc == 7) {
    std::ofstream dump(argv[6], std::ios::binary);
    if (!dump.write(arena, static_cast<std::streamsize>(total)).flush()) die("dump");
  }
  std::printf("{\"seconds\": %.6f, \"cpu_seconds\": %.6f, \"bytes\": %zu}\n", seconds.count(), cpu, total);
}
