// The raw ceiling of reading chunks from Redis: pipelined GETs, received at their exact places in fresh
// memory with huge pages, without checksums, retries or time-outs. Lengths are known beforehand, so that one
// readv takes what the socket has of several replies. Prints one line of JSON; any unexpected byte ends the
// program.
//
//   redis_ceiling HOST PORT KEYS CONNECTIONS BYTES_IN_FLIGHT LOW_WATER [DUMP]
//
// KEYS has a line "key length" per chunk, in the order of their places. BYTES_IN_FLIGHT is over all
// connections. LOW_WATER is SO_RCVLOWAT while there is more to ask for: 1 is the system's. DUMP is written
// after the clock has stopped. One thread per connection.

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr size_t kHugePageBytes = 2 << 20;

struct Chunk {
  std::string request;
  std::string header;  // what its reply begins with: "$length\r\n"
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

// One stretch of the bytes that a connection expects, in their order.
struct Piece {
  enum Kind { kHeader, kPayload, kTrailer } kind;
  const Chunk* chunk;
  size_t size;
  size_t done = 0;
  char framing[24] = {};  // where a header or trailer is received, to be compared

  const char* expected() const { return kind == kHeader ? chunk->header.data() : "\r\n"; }
};

class Connection {
 public:
  Connection(int fd, const std::vector<Chunk>& chunks, std::atomic<size_t>& next, char* arena,
             size_t limit_bytes, int low_water)
      : fd_(fd), chunks_(chunks), next_(next), arena_(arena), limit_bytes_(limit_bytes) {
    set_low_water(low_water);
  }

  void run() {
    request_more();
    while (!pieces_.empty()) {
      iovec parts[kParts];
      int count = 0;
      for (auto piece = pieces_.begin(); piece != pieces_.end() && count < kParts; ++piece) {
        parts[count++] = {place_of(*piece) + piece->done, piece->size - piece->done};
      }
      const ssize_t received = readv(fd_, parts, count);
      if (received <= 0) die("readv");
      take(static_cast<size_t>(received));
    }
    close(fd_);
  }

 private:
  static constexpr int kParts = 8;  // the rest of one reply and two more

  char* place_of(Piece& piece) {
    return piece.kind == Piece::kPayload ? arena_ + piece.chunk->place : piece.framing;
  }

  void take(size_t received) {
    while (received > 0) {
      Piece& piece = pieces_.front();
      const size_t now = std::min(received, piece.size - piece.done);
      piece.done += now;
      received -= now;
      if (piece.done < piece.size) return;
      if (piece.kind != Piece::kPayload && std::memcmp(piece.framing, piece.expected(), piece.size) != 0) {
        die("unexpected reply");
      }
      const bool whole = piece.kind == Piece::kTrailer;
      if (whole) in_flight_bytes_ -= piece.chunk->length;
      pieces_.pop_front();
      if (whole) request_more();
    }
  }

  void request_more() {
    std::string requests;
    while (in_flight_bytes_ < limit_bytes_) {
      const size_t number = next_.fetch_add(1, std::memory_order_relaxed);  // only counts
      if (number >= chunks_.size()) {
        set_low_water(1);
        break;
      }
      const Chunk& chunk = chunks_[number];
      requests += chunk.request;
      pieces_.push_back({Piece::kHeader, &chunk, chunk.header.size()});
      if (chunk.length > 0) pieces_.push_back({Piece::kPayload, &chunk, chunk.length});
      pieces_.push_back({Piece::kTrailer, &chunk, 2});
      in_flight_bytes_ += chunk.length;
    }
    for (size_t sent = 0; sent < requests.size();) {
      const ssize_t now = send(fd_, requests.data() + sent, requests.size() - sent, MSG_NOSIGNAL);
      if (now <= 0) die("send");
      sent += static_cast<size_t>(now);
    }
  }

  void set_low_water(int bytes) { setsockopt(fd_, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof(bytes)); }

  int fd_;
  const std::vector<Chunk>& chunks_;
  std::atomic<size_t>& next_;
  char* arena_;
  size_t limit_bytes_;
  size_t in_flight_bytes_ = 0;
  std::deque<Piece> pieces_;
};

std::vector<Chunk> read_chunks(const char* path) {
  std::ifstream file(path);
  std::vector<Chunk> chunks;
  std::string key;
  size_t length = 0;
  size_t place = 0;
  while (file >> key >> length) {
    const std::string request = "*2\r\n$3\r\nGET\r\n$" + std::to_string(key.size()) + "\r\n" + key + "\r\n";
    chunks.push_back({request, "$" + std::to_string(length) + "\r\n", length, place});
    place += length;
  }
  return chunks;
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
  if (argc != 7 && argc != 8) {
    die("usage: redis_ceiling HOST PORT KEYS CONNECTIONS BYTES_IN_FLIGHT LOW_WATER [DUMP]");
  }
  const std::vector<Chunk> chunks = read_chunks(argv[3]);
  const auto connections = static_cast<size_t>(std::atoll(argv[4]));
  const size_t limit_bytes = std::max<size_t>(1, static_cast<size_t>(std::atoll(argv[5])) / connections);
  const size_t total = chunks.empty() ? 0 : chunks.back().place + chunks.back().length;

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
  const int low_water = std::atoi(argv[6]);
  const auto work = [&] {
    Connection(connect_to(argv[1], argv[2]), chunks, next, arena, limit_bytes, low_water).run();
  };
  for (size_t number = 1; number < connections; ++number) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  const double cpu = cpu_seconds() - cpu_start;
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

  if (argc == 8) {
    std::ofstream dump(argv[7], std::ios::binary);
    if (!dump.write(arena, static_cast<std::streamsize>(total)).flush()) die("dump");
  }
  std::printf("{\"seconds\": %.6f, \"cpu_seconds\": %.6f, \"bytes\": %zu}\n", seconds.count(), cpu, total);
}
