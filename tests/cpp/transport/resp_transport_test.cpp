// What the contract does not say about RESP, against scripted servers.
#include "transport/resp/resp_transport.h"

#include <doctest/doctest.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "core/crc32c.h"
#include "support/reads.h"
#include "support/resp_server.h"

namespace rdmaload::resp {
namespace {

using testing::bulk;
using testing::Command;
using testing::RecordingOwner;
using testing::RespServer;
using testing::RespSession;
using testing::RespStore;
using testing::TestRead;
using namespace std::string_literals;

constexpr std::chrono::milliseconds kShort{150};

TransportOptions options_for(const RespServer& server) {
  TransportOptions options;
  options.endpoint.host = server.address();
  options.endpoint.port = server.port();
  options.endpoint.name = "redis://test";
  options.connections = 1;
  return options;
}

// The commands that a server saw, from whatever thread.
class Log {
 public:
  void add(const Command& command) {
    std::lock_guard lock(mutex_);
    commands_.push_back(command);
  }
  std::vector<Command> commands() const {
    std::lock_guard lock(mutex_);
    return commands_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Command> commands_;
};

// Submits one read of the whole object and returns what became of it.
Status read_once(const TransportOptions& options, const std::string& object, uint64_t bytes) {
  RecordingOwner owner;
  TestRead prepared(object, bytes, owner);
  RespTransport transport(options);
  transport.submit(prepared.read);
  if (!owner.wait_for(1)) return Status(ErrorCode::kInvalid, "the read did not complete");
  return owner.status_of(prepared.read);
}

// Answers the first GET of every connection with these bytes and stays silent after them.
RespServer::Script answers(std::string bytes) {
  return [bytes = std::move(bytes)](RespSession& session, int) {
    if (!session.next_command()) return;
    session.send(bytes);
    session.wait_for_close();
  };
}

bool mentions(const Status& status, std::string_view text) {
  return status.message().find(text) != std::string::npos;
}

TEST_CASE("the handshake sends what the endpoint asks for and nothing else") {
  struct Case {
    std::string user, password;
    int database, protocol;
    std::vector<Command> expected;
  };
  for (const Case& with : std::vector<Case>{
           {"", "", 0, 2, {}},
           {"", "secret", 0, 2, {{"AUTH", "secret"}}},
           {"me", "secret", 3, 2, {{"AUTH", "me", "secret"}, {"SELECT", "3"}}},
           {"", "", 15, 2, {{"SELECT", "15"}}},
           {"", "", 0, 3, {{"HELLO", "3"}}},
           {"", "secret", 0, 3, {{"HELLO", "3", "AUTH", "default", "secret"}}},
           {"me", "secret", 2, 3, {{"HELLO", "3", "AUTH", "me", "secret"}, {"SELECT", "2"}}},
       }) {
    RespStore store;
    store.put("k", "value");
    Log log;
    RespServer server([&](RespSession& session, int) {
      while (const auto command = session.next_command()) {
        log.add(*command);
        session.send(store.answer(*command));
      }
    });
    TransportOptions options = options_for(server);
    options.endpoint.username = with.user;
    options.endpoint.password = with.password;
    options.endpoint.database = with.database;
    options.endpoint.protocol = with.protocol;
    CHECK(read_once(options, "k", 5).ok());
    auto expected = with.expected;
    expected.push_back({"GET", "k"});
    CHECK(log.commands() == expected);
  }
}

TEST_CASE("a refused handshake is an error of the right kind that shows no password") {
  struct Case {
    std::string reply;
    ErrorCode code;
  };
  for (const Case& with : std::vector<Case>{
           {"-WRONGPASS invalid username-password pair or user is disabled.\r\n", ErrorCode::kAuthentication},
           {"-ERR invalid password\r\n", ErrorCode::kAuthentication},
           {"!10\r\nNOAUTH no.\r\n", ErrorCode::kAuthentication},
           {"-NOPROTO unsupported protocol version\r\n", ErrorCode::kNotSupported},
           {"-ERR unknown command `X`, with args beginning with: `hunter2`, \r\n", ErrorCode::kNotSupported},
           {"-LOADING Redis is loading the dataset in memory\r\n", ErrorCode::kUnavailable},
           {"-ERR max number of clients reached\r\n", ErrorCode::kUnavailable},
           {"HTTP/1.1 400 Bad Request\r\n", ErrorCode::kFormat},
           {"*100000\r\n", ErrorCode::kFormat},
           {"", ErrorCode::kUnavailable},  // closes
       }) {
    for (const int protocol : {2, 3}) {
      CAPTURE(with.reply);
      RespServer server([&](RespSession& session, int) {
        if (session.next_command()) session.send(with.reply);
      });
      TransportOptions options = options_for(server);
      options.endpoint.username = "me";
      options.endpoint.password = "hunter2";
      options.endpoint.protocol = protocol;
      const Status status = read_once(options, "k", 5);
      CHECK(status.code() == with.code);
      CHECK_FALSE(mentions(status, "hunter2"));
      if (!with.reply.empty() && with.code != ErrorCode::kFormat) CHECK(mentions(status, "redis://test"));
    }
  }
}

TEST_CASE("SELECT of a database that is not there is an error that names it") {
  RespServer server(answers("-ERR DB index is out of range\r\n"));
  TransportOptions options = options_for(server);
  options.endpoint.database = 99;
  const Status status = read_once(options, "k", 5);
  CHECK(status.code() == ErrorCode::kNotSupported);
  CHECK(mentions(status, "SELECT"));
  CHECK(mentions(status, "out of range"));
}

TEST_CASE("a server that never answers the handshake is kTimeout") {
  RespServer server([](RespSession& session, int) { session.wait_for_close(); });
  TransportOptions options = options_for(server);
  options.endpoint.password = "secret";
  options.endpoint.connect_timeout = kShort;
  const Status status = read_once(options, "k", 5);
  CHECK(status.code() == ErrorCode::kTimeout);
  CHECK(mentions(status, "AUTH"));
}

TEST_CASE("a handshake that comes byte by byte is read") {
  RespServer server([](RespSession& session, int) {
    RespStore store;
    store.put("k", "value");
    while (const auto command = session.next_command()) {
      for (const char byte : store.answer(*command)) {
        session.send(std::string_view(&byte, 1));
        session.wait_until_taken();
      }
    }
  });
  TransportOptions options = options_for(server);
  options.endpoint.protocol = 3;
  CHECK(read_once(options, "k", 5).ok());
}

TEST_CASE("every kind of error reply to a GET maps to its code and names the key") {
  struct Case {
    std::string reply;
    ErrorCode code;
  };
  for (const Case& with : std::vector<Case>{
           {"-NOAUTH Authentication required.\r\n", ErrorCode::kAuthentication},
           {"-NOPERM no permissions\r\n", ErrorCode::kAuthentication},
           {"-LOADING Redis is loading\r\n", ErrorCode::kUnavailable},
           {"-OOM command not allowed\r\n", ErrorCode::kUnavailable},
           {"-CLUSTERDOWN\r\n", ErrorCode::kUnavailable},
           {"-MOVED 3999 127.0.0.1:6381\r\n", ErrorCode::kNotSupported},
           {"-WRONGTYPE Operation against a key\r\n", ErrorCode::kFormat},
           {"-ERR anything else\r\n", ErrorCode::kNotSupported},
           {"$-1\r\n", ErrorCode::kNotFound},
           {"_\r\n", ErrorCode::kNotFound},
           {"*-1\r\n", ErrorCode::kNotFound},
           {"$6\r\nvalue!\r\n", ErrorCode::kIntegrity},
           {"$4\r\nvalu\r\n", ErrorCode::kIntegrity},
           {"$0\r\n\r\n", ErrorCode::kIntegrity},
           {"$536870912\r\n", ErrorCode::kIntegrity},
           {"$536870913\r\n", ErrorCode::kFormat},
           {"$-2\r\n", ErrorCode::kFormat},
           {"$5x\r\nvalue\r\n", ErrorCode::kFormat},
           {"+value\r\n", ErrorCode::kFormat},
           {":5\r\n", ErrorCode::kFormat},
           {"*1\r\n$5\r\nvalue\r\n", ErrorCode::kFormat},
           {"#t\r\n", ErrorCode::kFormat},
           {"=5\r\nvalue\r\n", ErrorCode::kFormat},
           {"!5\r\nvalue\r\n", ErrorCode::kFormat},
           {"%1\r\n+a\r\n+b\r\n", ErrorCode::kFormat},
           {"garbage\r\n", ErrorCode::kFormat},
           {std::string(8, '\0'), ErrorCode::kFormat},
           {"$5\r\nvalueXY", ErrorCode::kFormat},
           {"$5\r\nvalue\r\r", ErrorCode::kFormat},
           {"-" + std::string(70000, 'x') + "\r\n", ErrorCode::kFormat},
       }) {
    CAPTURE(with.reply.substr(0, 60));
    RespServer server(answers(with.reply));
    const Status status = read_once(options_for(server), "the/key", 5);
    CHECK(status.code() == with.code);
    if (with.reply[0] != 'g' && with.reply[0] != '\0' && with.code != ErrorCode::kFormat) {
      CHECK(mentions(status, "the/key"));
      CHECK(mentions(status, "redis://test"));
    }
  }
}

TEST_CASE("replies that arrive in two parts, cut at every byte, are read the same") {
  // An error, a nil and values so short that what follows is read ahead, whatever the cut.
  const std::vector<std::string> values{"", "a", "bc", "def", "0123456789", "\r\n$1\r\n"};
  std::string stream;
  for (const auto& value : values) stream += bulk(value) + "-ERR x\r\n" + bulk(value) + "$-1\r\n";
  std::vector<std::string> kinds;
  for (const auto& value : values) kinds.insert(kinds.end(), {"=" + value, "-", "=" + value, "_"});
  std::atomic<bool> short_of_commands{false};
  RespServer server([&](RespSession& session, int) {
    for (size_t cut = 0; cut <= stream.size(); ++cut) {
      for (size_t i = 0; i < kinds.size(); ++i) {
        if (!session.next_command()) {
          short_of_commands = true;
          return;
        }
      }
      session.send(std::string_view(stream).substr(0, cut));
      session.wait_until_taken();
      session.send(std::string_view(stream).substr(cut));
    }
  });
  RespTransport transport(options_for(server));
  for (size_t cut = 0; cut <= stream.size(); ++cut) {
    CAPTURE(cut);
    RecordingOwner owner;
    std::deque<TestRead> reads;
    for (const auto& kind : kinds) reads.emplace_back("k", kind[0] == '=' ? kind.size() - 1 : 3, owner);
    for (auto& prepared : reads) transport.submit(prepared.read);
    REQUIRE(owner.wait_for(reads.size()));
    for (size_t i = 0; i < reads.size(); ++i) {
      CAPTURE(i);
      const Status status = owner.status_of(reads[i].read);
      CAPTURE(status.message());
      if (kinds[i][0] == '=') {
        const auto value = testing::bytes_of(kinds[i].substr(1));
        REQUIRE(status.ok());
        REQUIRE(reads[i].holds(value));
        REQUIRE(reads[i].read.crc == crc32c(0, value));
      } else {
        REQUIRE(status.code() == (kinds[i][0] == '-' ? ErrorCode::kNotSupported : ErrorCode::kNotFound));
      }
    }
  }
  CHECK_FALSE(short_of_commands);
  CHECK(server.connections() == 1);
}

TEST_CASE("small replies of every kind, in every order, arrive in one piece or byte by byte") {
  std::mt19937_64 random(5);
  for (const bool byte_by_byte : {false, true}) {
    constexpr size_t kReads = 60;
    for (int round = 0; round < (byte_by_byte ? 2 : 30); ++round) {
      std::string stream;
      std::vector<std::string> kinds;
      for (size_t i = 0; i < kReads; ++i) {
        switch (testing::pick(random, 0, 4)) {
          case 0:
            kinds.push_back("-");
            stream += "-ERR " + std::string(testing::pick(random, 0, 30), 'e') + "\r\n";
            break;
          case 1:
            kinds.push_back("_");
            stream += testing::pick(random, 0, 1) == 0 ? "$-1\r\n" : "_\r\n";
            break;
          default:
            kinds.push_back(
                "=" + testing::text_of(testing::random_bytes(
                          testing::pick(random, 0, testing::pick(random, 0, 3) == 0 ? 2000 : 6), random())));
            stream += bulk(kinds.back().substr(1));
        }
      }
      RespServer server([&](RespSession& session, int) {
        for (size_t i = 0; i < kReads; ++i) {
          if (!session.next_command()) return;
        }
        if (!byte_by_byte) session.send(stream);
        for (size_t i = 0; byte_by_byte && i < stream.size(); ++i) {
          session.send(std::string_view(stream).substr(i, 1));
          session.wait_until_taken();
        }
        session.wait_for_close();
      });
      RespTransport transport(options_for(server));
      RecordingOwner owner;
      std::deque<TestRead> reads;
      for (const auto& kind : kinds) {
        const uint64_t bytes = kind[0] == '=' ? kind.size() - 1 : testing::pick(random, 0, 2000);
        reads.emplace_back("k", bytes, 0, testing::random_segments(random, bytes), owner);
      }
      for (auto& prepared : reads) transport.submit(prepared.read);
      REQUIRE(owner.wait_for(kReads));
      for (size_t i = 0; i < kReads; ++i) {
        const Status status = owner.status_of(reads[i].read);
        CAPTURE(status.message());
        if (kinds[i][0] == '=') {
          REQUIRE(status.ok());
          REQUIRE(reads[i].holds(testing::bytes_of(kinds[i].substr(1))));
        } else {
          REQUIRE(status.code() == (kinds[i][0] == '-' ? ErrorCode::kNotSupported : ErrorCode::kNotFound));
        }
      }
      CHECK(server.connections() == 1);
    }
  }
}

TEST_CASE("payload bytes that a short error reply made us read ahead are counted as copied, others are not") {
  const std::string value = testing::text_of(testing::random_bytes(3, 1));
  RespServer server([&](RespSession& session, int) {
    for (int i = 0; i < 3 && session.next_command(); ++i) {
    }
    // A header of "$1000000\r\n" is expected where the nil comes: the difference reaches into the value.
    session.send("$-1\r\n" + bulk(value) + bulk(value));
    session.wait_for_close();
  });
  RespTransport transport(options_for(server));
  RecordingOwner owner;
  TestRead nil("k", 1000000, owner), ahead("k", 3, owner), normal("k", 3, owner);
  for (TestRead* prepared : {&nil, &ahead, &normal}) transport.submit(prepared->read);
  REQUIRE(owner.wait_for(3));
  CHECK(owner.status_of(nil.read).code() == ErrorCode::kNotFound);
  CHECK(ahead.holds(testing::bytes_of(value)));
  CHECK(ahead.read.copied_bytes == 1);
  CHECK(normal.holds(testing::bytes_of(value)));
  CHECK(normal.read.copied_bytes == 0);
}

TEST_CASE(
    "a connection that ends in the middle of a value fails its reads as kUnavailable and is made anew") {
  const auto value = testing::random_bytes(1000, 2);
  const std::string reply = bulk(testing::text_of(value));
  for (const bool reset : {false, true}) {
    // Before anything, in the header, after it, in the payload, before and in the trailer.
    for (const size_t cut :
         {size_t{0}, size_t{3}, size_t{7}, size_t{500}, reply.size() - 2, reply.size() - 1}) {
      CAPTURE(reset);
      CAPTURE(cut);
      RespStore store;
      store.put("k", testing::text_of(value));
      RespServer server([&](RespSession& session, int connection) {
        if (connection > 0) return store.serve(session);
        for (int i = 0; i < 2; ++i) session.next_command();
        session.send(std::string_view(reply).substr(0, cut));
        session.wait_until_taken();
        if (reset) session.reset();
      });
      RespTransport transport(options_for(server));
      RecordingOwner owner;
      TestRead first("k", 1000, owner), second("k", 1000, owner);
      transport.submit(first.read);
      transport.submit(second.read);
      REQUIRE(owner.wait_for(2));
      for (TestRead* prepared : {&first, &second}) {
        const Status status = owner.status_of(prepared->read);
        CAPTURE(status.message());
        CHECK(status.code() == ErrorCode::kUnavailable);
        transport.submit(prepared->read);
      }
      REQUIRE(owner.wait_for(4));
      for (TestRead* prepared : {&first, &second}) {
        CHECK(owner.status_of(prepared->read).ok());
        CHECK(prepared->holds(value));
        CHECK(prepared->read.crc == crc32c(0, value));
      }
      CHECK(server.connections() == 2);
    }
  }
}

TEST_CASE("only the read whose reply was bad is to blame for a lost connection") {
  RespServer server([](RespSession& session, int) {
    for (int i = 0; i < 2; ++i) session.next_command();
    session.send("$3\r\nbad\r\n");
    session.wait_for_close();
  });
  RespTransport transport(options_for(server));
  RecordingOwner owner;
  TestRead bad("bad", 5, owner), innocent("innocent", 5, owner);
  transport.submit(bad.read);
  transport.submit(innocent.read);
  REQUIRE(owner.wait_for(2));
  CHECK(owner.status_of(bad.read).code() == ErrorCode::kIntegrity);
  CHECK(owner.status_of(innocent.read).code() == ErrorCode::kUnavailable);  // which is tried again
  CHECK(mentions(owner.status_of(innocent.read), "innocent"));
}

TEST_CASE("silence is kTimeout after the inactivity time-out, wherever it begins") {
  const std::string reply = bulk(std::string(1000, 'v'));
  for (const size_t cut : {size_t{0}, size_t{3}, size_t{500}, reply.size() - 1}) {
    CAPTURE(cut);
    RespServer server(answers(reply.substr(0, cut)));
    TransportOptions options = options_for(server);
    options.endpoint.inactivity_timeout = kShort;
    const auto begin = Clock::now();
    const Status status = read_once(options, "k", 1000);
    CHECK(status.code() == ErrorCode::kTimeout);
    CHECK(mentions(status, "inactivity_timeout"));
    CHECK(mentions(status, "'k'"));
    CHECK(Clock::now() - begin >= kShort);
  }
}

TEST_CASE("a slow server that keeps sending is not silent") {
  RespServer server([](RespSession& session, int) {
    if (!session.next_command()) return;
    // 30 pieces with pauses of 10 ms take longer than the time-out, each pause is far shorter.
    session.send("$30\r\n");
    for (int i = 0; i < 30; ++i) {
      session.readable_within(10);
      session.send("x");
    }
    session.send("\r\n");
    session.wait_for_close();
  });
  TransportOptions options = options_for(server);
  options.endpoint.inactivity_timeout = std::chrono::milliseconds(200);
  CHECK(read_once(options, "k", 30).ok());
}

TEST_CASE("an idle connection does not time out and is used again") {
  RespStore store;
  store.put("k", "value");
  RespServer server([&](RespSession& session, int) { store.serve(session); });
  TransportOptions options = options_for(server);
  options.endpoint.inactivity_timeout = std::chrono::milliseconds(50);
  RespTransport transport(options);
  RecordingOwner owner;
  TestRead first("k", 5, owner), second("k", 5, owner);
  transport.submit(first.read);
  transport.submit(second.read, Clock::now() + std::chrono::milliseconds(150));
  REQUIRE(owner.wait_for(2));
  CHECK(owner.status_of(first.read).ok());
  CHECK(owner.status_of(second.read).ok());
  CHECK(server.connections() == 1);
}

TEST_CASE("a refused connection is kUnavailable and names the endpoint") {
  // Bound but not listening: nobody else can get this port meanwhile.
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in own{};
  own.sin_family = AF_INET;
  own.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(own);
  REQUIRE(::bind(fd, reinterpret_cast<sockaddr*>(&own), size) == 0);
  REQUIRE(getsockname(fd, reinterpret_cast<sockaddr*>(&own), &size) == 0);
  TransportOptions options;
  options.endpoint.host = "127.0.0.1";
  options.endpoint.port = ntohs(own.sin_port);
  const Status status = read_once(options, "k", 5);
  CHECK(status.code() == ErrorCode::kUnavailable);
  CHECK(mentions(status, "127.0.0.1:" + std::to_string(options.endpoint.port)));
  CHECK(mentions(status, "refused"));
  ::close(fd);
}

TEST_CASE("a name that cannot be resolved is kUnavailable") {
  TransportOptions options;
  options.endpoint.host = "no-such-host.invalid";
  const Status status = read_once(options, "k", 5);
  CHECK(status.code() == ErrorCode::kUnavailable);
  CHECK(mentions(status, "no-such-host.invalid:6379"));
}

TEST_CASE("a name and an IPv6 address are reached") {
  RespStore store;
  store.put("k", "value");
  const auto serve = [&](RespSession& session, int) { store.serve(session); };
  RespServer four(serve);
  TransportOptions options = options_for(four);
  options.endpoint.host = "localhost";
  CHECK(read_once(options, "k", 5).ok());
  std::unique_ptr<RespServer> six;
  try {
    six = std::make_unique<RespServer>(serve, "::1");
  } catch (const std::runtime_error&) {
    MESSAGE("skipped: this machine has no IPv6 loopback");
    return;
  }
  CHECK(read_once(options_for(*six), "k", 5).ok());
}

TEST_CASE("bytes in flight fill their bound and stay within it, whatever the number of connections") {
  constexpr uint64_t kBytes = 1000;
  constexpr int kPerConnection = 4, kReads = 40;
  const std::string value(kBytes, 'v');
  for (const int connections : {1, 2}) {
    CAPTURE(connections);
    std::atomic<int> most{0}, fewest_first{1000};
    RespServer server([&](RespSession& session, int) {
      int unanswered = 0;
      // The pipeline fills before anything is answered.
      for (; unanswered < kPerConnection && session.next_command(); ++unanswered) {
      }
      bool first = true;
      for (;;) {
        // Whatever else the client has sent without waiting for an answer.
        while (session.readable_within(5)) {
          if (!session.next_command()) return;
          ++unanswered;
        }
        int seen = most;
        while (unanswered > seen && !most.compare_exchange_weak(seen, unanswered)) {
        }
        if (std::exchange(first, false)) fewest_first = std::min<int>(fewest_first, unanswered);
        if (unanswered == 0) return session.wait_for_close();
        session.send(bulk(value));
        --unanswered;
      }
    });
    TransportOptions options = options_for(server);
    options.connections = connections;
    options.bytes_in_flight = kBytes * kPerConnection * static_cast<uint64_t>(connections);
    RespTransport transport(options);
    RecordingOwner owner;
    std::deque<TestRead> reads;
    for (int i = 0; i < kReads; ++i) reads.emplace_back("k", kBytes, owner);
    for (auto& prepared : reads) transport.submit(prepared.read);
    REQUIRE(owner.wait_for(kReads));
    for (auto& prepared : reads) CHECK(owner.status_of(prepared.read).ok());
    CHECK(most == kPerConnection);
    CHECK(fewest_first == kPerConnection);
  }
}

TEST_CASE("every answer makes room for the next request") {
  constexpr int kDepth = 4, kReads = 30;
  RespServer server([](RespSession& session, int) {
    int received = 0;
    for (; received < kDepth && session.next_command(); ++received) {
    }
    for (int answered = 0; answered < kReads; ++answered) {
      session.send(bulk("value"));
      if (received < kReads && session.next_command()) ++received;
    }
    session.wait_for_close();
  });
  TransportOptions options = options_for(server);
  options.bytes_in_flight = 5 * kDepth;
  options.endpoint.inactivity_timeout = std::chrono::seconds(5);
  RespTransport transport(options);
  RecordingOwner owner;
  std::deque<TestRead> reads;
  for (int i = 0; i < kReads; ++i) reads.emplace_back("k", 5, owner);
  for (auto& prepared : reads) transport.submit(prepared.read);
  REQUIRE(owner.wait_for(kReads));
  for (auto& prepared : reads) CHECK(owner.status_of(prepared.read).ok());
}

TEST_CASE("a read larger than the bound on bytes in flight goes alone") {
  RespStore store;
  const auto value = testing::random_bytes(100000, 3);
  store.put("k", testing::text_of(value));
  RespServer server([&](RespSession& session, int) { store.serve(session); });
  TransportOptions options = options_for(server);
  options.bytes_in_flight = 10;
  RespTransport transport(options);
  RecordingOwner owner;
  std::deque<TestRead> reads;
  for (int i = 0; i < 5; ++i) reads.emplace_back("k", value.size(), owner);
  for (auto& prepared : reads) transport.submit(prepared.read);
  REQUIRE(owner.wait_for(reads.size()));
  for (auto& prepared : reads) CHECK(prepared.holds(value));
}

TEST_CASE("a whole object is a GET, a part of it a GETRANGE with an inclusive end") {
  RespStore store;
  store.put("k", "0123456789");
  Log log;
  RespServer server([&](RespSession& session, int) {
    while (const auto command = session.next_command()) {
      log.add(*command);
      session.send(store.answer(*command));
    }
  });
  RespTransport transport(options_for(server));
  RecordingOwner owner;
  TestRead whole("k", 10, owner), head("k", 10, 0, {{4}}, owner), tail("k", 10, 9, {{1}}, owner);
  for (TestRead* prepared : {&whole, &head, &tail}) transport.submit(prepared->read);
  REQUIRE(owner.wait_for(3));
  CHECK(log.commands() ==
        std::vector<Command>{{"GET", "k"}, {"GETRANGE", "k", "0", "3"}, {"GETRANGE", "k", "9", "9"}});
  CHECK(head.holds(testing::bytes_of("0123456789")));
  CHECK(tail.holds(testing::bytes_of("0123456789")));
}

TEST_CASE(
    "reads in flight with a silent server are cancelled soon, and those of other owners are not their "
    "fault") {
  std::atomic<int> seen{0};
  RespServer server([&](RespSession& session, int) {
    while (session.next_command()) ++seen;
  });
  RespTransport transport(options_for(server));
  RecordingOwner mine, other;
  std::deque<TestRead> reads;
  for (int i = 0; i < 10; ++i) reads.emplace_back("k", 100, mine);
  TestRead innocent("k", 100, other);
  transport.submit(innocent.read);
  for (auto& prepared : reads) transport.submit(prepared.read);
  const auto give_up = Clock::now() + testing::kSoon;
  while (seen < 11 && Clock::now() < give_up) std::this_thread::yield();
  REQUIRE(seen == 11);
  mine.set_cancelled();
  transport.cancel(mine);
  REQUIRE(mine.wait_for(10));
  for (auto& prepared : reads) CHECK(mine.status_of(prepared.read).code() == ErrorCode::kCancelled);
  REQUIRE(other.wait_for(1));
  CHECK(other.status_of(innocent.read).code() == ErrorCode::kUnavailable);
}

TEST_CASE("reads of an owner that gave up before they started cost no connection and nobody's reads") {
  std::atomic<bool> answer{false};
  RespServer server([&](RespSession& session, int) {
    if (!session.next_command()) return;
    const auto give_up = Clock::now() + testing::kSoon;
    while (!answer && Clock::now() < give_up) std::this_thread::yield();
    session.send(bulk("value"));
    session.wait_for_close();
  });
  RespTransport transport(options_for(server));
  RecordingOwner gone, other;
  gone.set_cancelled();
  TestRead before("k", 5, gone), innocent("k", 5, other), beside("k", 5, gone);
  transport.submit(before.read);
  REQUIRE(gone.wait_for(1));
  CHECK(server.connections() == 0);
  transport.submit(innocent.read);
  transport.submit(beside.read);
  REQUIRE(gone.wait_for(2));
  CHECK(other.count() == 0);
  answer = true;
  REQUIRE(other.wait_for(1));
  CHECK(other.status_of(innocent.read).ok());
  CHECK(server.connections() == 1);
}

TEST_CASE("destroying the transport completes reads in flight, at any stage, with kCancelled") {
  const std::string reply = bulk(std::string(1000, 'v'));
  for (const size_t cut : {size_t{0}, size_t{3}, size_t{500}, reply.size() - 1}) {
    CAPTURE(cut);
    std::atomic<bool> all_sent{false};
    RespServer server([&](RespSession& session, int) {
      for (int i = 0; i < 5; ++i) session.next_command();
      session.send(std::string_view(reply).substr(0, cut));
      session.wait_until_taken();
      all_sent = true;
      session.wait_for_close();
    });
    RecordingOwner owner;
    std::deque<TestRead> reads;
    for (int i = 0; i < 5; ++i) reads.emplace_back("k", 1000, owner);
    {
      RespTransport transport(options_for(server));
      for (auto& prepared : reads) transport.submit(prepared.read);
      const auto give_up = Clock::now() + testing::kSoon;
      while (!all_sent && Clock::now() < give_up) std::this_thread::yield();
      REQUIRE(all_sent);
    }
    REQUIRE(owner.count() == 5);
    for (auto& prepared : reads) CHECK(owner.status_of(prepared.read).code() == ErrorCode::kCancelled);
  }
}

TEST_CASE("cancelling and destroying do not wait for a server that never answers the handshake") {
  std::atomic<int> greeted{0};
  RespServer server([&](RespSession& session, int) {
    session.next_command();
    ++greeted;
    session.wait_for_close();
  });
  TransportOptions options = options_for(server);
  options.endpoint.password = "secret";
  options.endpoint.connect_timeout = std::chrono::minutes(10);
  const auto wait_for_greeting = [&](int count) {
    const auto give_up = Clock::now() + testing::kSoon;
    while (greeted < count && Clock::now() < give_up) std::this_thread::yield();
    return greeted == count;
  };
  RecordingOwner owner, left;
  TestRead cancelled("k", 5, owner), outstanding("k", 5, left);
  {
    RespTransport transport(options);
    transport.submit(cancelled.read);
    REQUIRE(wait_for_greeting(1));
    owner.set_cancelled();
    transport.cancel(owner);
    REQUIRE(owner.wait_for(1));
    CHECK(owner.status_of(cancelled.read).code() == ErrorCode::kCancelled);
    transport.submit(outstanding.read);
    REQUIRE(wait_for_greeting(2));
  }
  CHECK(left.status_of(outstanding.read).code() == ErrorCode::kCancelled);
}

TEST_CASE("nothing connects before there is something to read, and no more connections than were asked for") {
  RespStore store;
  store.put("k", "value");
  RespServer server([&](RespSession& session, int) { store.serve(session); });
  TransportOptions options = options_for(server);
  options.connections = 3;
  RespTransport transport(options);
  CHECK(server.connections() == 0);
  RecordingOwner owner;
  std::deque<TestRead> reads;
  for (int i = 0; i < 300; ++i) reads.emplace_back("k", 5, owner);
  for (auto& prepared : reads) transport.submit(prepared.read);
  REQUIRE(owner.wait_for(reads.size()));
  CHECK(server.connections() >= 1);
  CHECK(server.connections() <= 3);
}

}  // namespace
}  // namespace rdmaload::resp
