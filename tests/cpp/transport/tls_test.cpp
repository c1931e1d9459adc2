// TLS streams against a server in this process: whom they trust, what they carry, how they end.
#include "transport/tls.h"

#include <doctest/doctest.h>

#include <functional>
#include <optional>

#include "core/error.h"
#include "support/bytes.h"
#include "support/tls_server.h"
#include "transport/byte_stream.h"
#include "transport/openssl.h"
#include "transport/resp/resp_transport.h"

namespace rdmaload {
namespace {

using testing::Certificate;
using testing::CertificateSpec;
using testing::kSoon;
using testing::make_certificate;
using testing::RespServer;
using testing::RespSession;
using testing::TempDir;
using testing::TlsServerOptions;
using testing::TlsSide;
using testing::TlsWire;
using testing::write_pem;
using namespace std::string_literals;

constexpr std::chrono::milliseconds kShort{150};

bool never() { return false; }

// An authority, a server's certificate from it, and the options of a client that trusts it.
struct World {
  TempDir directory;
  Certificate authority = make_certificate({"authority", ""});
  Certificate certificate = make_certificate({}, &authority);
  TlsOptions client() const {
    TlsOptions options;
    options.ca_file = write_pem(directory, "ca.pem", authority.x509.get());
    return options;
  }
};

ByteStream open(const RespServer& server, const TlsOptions& options, const std::string& host = "127.0.0.1",
                Deadline deadline = Deadline::after(kSoon), const GiveUp& give_up = never) {
  const TlsContext context(options);
  return ByteStream::connect({host, server.port(), {}}, &context, deadline, give_up);
}

void send_all(ByteStream& stream, std::span<const std::byte> bytes) {
  const Deadline deadline = Deadline::after(kSoon);
  while (!bytes.empty() && !deadline.passed()) {
    const size_t sent = stream.try_send(bytes);
    if (sent == 0) stream.wait(false, true, 20);
    bytes = bytes.subspan(sent);
  }
}

// Exactly so many bytes, or what came until the stream failed or time passed.
std::vector<std::byte> receive(ByteStream& stream, size_t size) {
  std::vector<std::byte> bytes(size);
  size_t got = 0;
  const Deadline deadline = Deadline::after(kSoon);
  while (got < size && !deadline.passed()) {
    const size_t more = stream.try_receive(std::span(bytes).subspan(got));
    if (more == 0) stream.wait(true, false, 20);
    got += more;
  }
  bytes.resize(got);
  return bytes;
}

std::optional<Error> failure_of(const std::function<void()>& use) {
  try {
    use();
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

void check_failure(ErrorCode code, std::vector<std::string> words, const std::function<void()>& use) {
  const auto error = failure_of(use);
  REQUIRE(error.has_value());
  const std::string text = error->what();
  CAPTURE(text);
  CHECK(error->code() == code);
  for (const std::string& word : words) CHECK_MESSAGE(text.find(word) != std::string::npos, word);
}

void echo(RespSession& session) {
  std::vector<char> piece(100000);
  for (;;) {
    const ssize_t got = session.receive(piece.data(), piece.size());
    if (got <= 0 || !session.send({piece.data(), static_cast<size_t>(got)})) return;
  }
}

void say_hello(RespSession& session) {
  session.send("hello");
  session.wait_for_close();
}

TEST_CASE("what is sent comes back byte for byte, both ways at once, whatever the sizes and the version") {
  World world;
  for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
    TlsSide side({world.certificate, nullptr, version, version});
    RespServer server([](RespSession& session, int) { echo(session); }, "127.0.0.1", side.wrap());
    ByteStream stream = open(server, world.client());
    const auto sent = testing::random_bytes(6'000'000, 1);
    std::vector<std::byte> got(sent.size());
    size_t out = 0, in = 0;
    std::mt19937_64 random(7);
    const Deadline deadline = Deadline::after(kSoon);
    while (in < sent.size() && !deadline.passed()) {
      // At most 2 MB ahead: the echo must not be full in both directions.
      const size_t room = std::min(sent.size() - out, in + 2'000'000 - out);
      const size_t moved_out = room > 0 ? stream.try_send(std::span(sent).subspan(out, room)) : 0;
      out += moved_out;
      std::vector<iovec> vectors;
      for (size_t at = in; at < got.size() && vectors.size() < 8;) {
        const size_t size = std::min<size_t>(testing::pick(random, 1, 60000), got.size() - at);
        vectors.push_back({got.data() + at, size});
        at += size;
      }
      const size_t moved_in = stream.try_receive(vectors);
      in += moved_in;
      if (moved_in == 0 && moved_out == 0) stream.wait(true, out < sent.size(), 20);
    }
    CHECK(in == sent.size());
    CHECK(got == sent);
  }
}

TEST_CASE("bytes that the library holds already are found without waiting for the socket") {
  World world;
  TlsSide side({world.certificate});
  RespServer server([](RespSession& session, int) { say_hello(session); }, "127.0.0.1", side.wrap());
  ByteStream stream = open(server, world.client());
  CHECK(testing::text_of(receive(stream, 1)) == "h");
  for (const char* expected : {"e", "l", "l", "o"}) {
    CHECK(stream.wait(true, false, 0));
    std::array<std::byte, 1> byte;
    REQUIRE(stream.try_receive(std::span(byte)) == 1);
    CHECK(testing::text_of(byte) == expected);
  }
  std::array<std::byte, 1> byte;
  CHECK(stream.try_receive(std::span(byte)) == 0);
  CHECK_FALSE(stream.wait(true, false, 0));
}

TEST_CASE("keys that the server renews in the middle change nothing") {
  World world;
  TlsSide side({world.certificate});
  RespServer server(
      [](RespSession& session, int) {
        for (int i = 0; i < 20; ++i) {
          session.send(std::string(20000, static_cast<char>('a' + i)));
          static_cast<TlsWire*>(session.wire())->update_keys();
          char byte;
          if (session.receive(&byte, 1) != 1 || byte != static_cast<char>('A' + i)) return;
        }
        session.send("end");
      },
      "127.0.0.1", side.wrap());
  ByteStream stream = open(server, world.client());
  for (int i = 0; i < 20; ++i) {
    CHECK(testing::text_of(receive(stream, 20000)) == std::string(20000, static_cast<char>('a' + i)));
    const char byte = static_cast<char>('A' + i);
    send_all(stream, std::as_bytes(std::span(&byte, 1)));
  }
  CHECK(testing::text_of(receive(stream, 3)) == "end");
}

TEST_CASE("a server is trusted for its name or address, its dates and who signed, and for nothing else") {
  World world;
  const Certificate other = make_certificate({"another authority", ""});
  struct Case {
    Certificate certificate;
    std::string host, server_name;
    std::vector<std::string> refused;  // words of the error; none: accepted
  };
  const auto signed_for = [&](const std::string& names) {
    return make_certificate({"test", names}, &world.authority);
  };
  const std::vector<Case> cases{
      {world.certificate, "127.0.0.1", "", {}},
      {world.certificate, "localhost", "", {}},
      {signed_for("DNS:store.example"), "127.0.0.1", "store.example", {}},
      {signed_for("DNS:*.models.example"), "127.0.0.1", "store.models.example", {}},
      {signed_for("IP:10.0.0.5"), "127.0.0.1", "10.0.0.5", {}},
      {signed_for("IP:::1"), "127.0.0.1", "::1", {}},
      {signed_for("IP:10.0.0.5"), "127.0.0.1", "", {"IP address mismatch", "'127.0.0.1'", "server_name="}},
      {signed_for("DNS:127.0.0.1"), "127.0.0.1", "", {"IP address mismatch"}},
      {signed_for("DNS:store.example"), "localhost", "", {"ostname mismatch", "'localhost'", "server_name="}},
      {signed_for("DNS:*.models.example"), "127.0.0.1", "a.b.models.example", {"ostname mismatch"}},
      {signed_for("DNS:s*.models.example"), "127.0.0.1", "store.models.example", {"ostname mismatch"}},
      {make_certificate({}), "127.0.0.1", "", {"self-signed", "ca_file="}},
      {make_certificate({}, &other), "127.0.0.1", "", {"issuer", "ca_file="}},
      {make_certificate({"test", "IP:127.0.0.1", -9, -1}, &world.authority),
       "127.0.0.1",
       "",
       {"expired", "renew"}},
      {make_certificate({"test", "IP:127.0.0.1", 1, 9}, &world.authority),
       "127.0.0.1",
       "",
       {"not yet valid"}},
  };
  for (const Case& with : cases) {
    TlsSide side({with.certificate});
    RespServer server([](RespSession& session, int) { say_hello(session); }, "127.0.0.1", side.wrap());
    TlsOptions options = world.client();
    options.server_name = with.server_name;
    const auto use = [&] {
      ByteStream stream = open(server, options, with.host);
      const auto got = receive(stream, 5);
      CHECK(testing::text_of(got) == "hello");
    };
    if (with.refused.empty()) {
      const auto error = failure_of(use);
      const std::string said = error ? error->what() : "";
      CAPTURE(said);
      CHECK_FALSE(error.has_value());
    } else {
      check_failure(ErrorCode::kAuthentication, with.refused, use);
      options.verify = false;
      CHECK_FALSE(failure_of(use).has_value());
    }
  }
}

TEST_CASE("without a ca_file the system's store decides, which does not know a test's authority") {
  World world;
  TlsSide side({world.certificate});
  RespServer server([](RespSession& session, int) { say_hello(session); }, "127.0.0.1", side.wrap());
  check_failure(ErrorCode::kAuthentication, {"ca_file="}, [&] { open(server, TlsOptions{}); });
}

TEST_CASE("a directory of authorities under their hashed names is as good as a file") {
  World world;
  TlsSide side({world.certificate});
  RespServer server([](RespSession& session, int) { say_hello(session); }, "127.0.0.1", side.wrap());
  char name[32];
  std::snprintf(name, sizeof(name), "%08lx.0", X509_subject_name_hash(world.authority.x509.get()));
  write_pem(world.directory, name, world.authority.x509.get());
  TlsOptions options;
  options.ca_dir = world.directory.path().string();
  ByteStream stream = open(server, options);
  CHECK(testing::text_of(receive(stream, 5)) == "hello");
}

TEST_CASE("the server hears the name that is verified, and no address (SNI)") {
  World world;
  world.certificate =
      make_certificate({"test", "DNS:localhost,DNS:store.example,IP:127.0.0.1"}, &world.authority);
  TlsSide side({world.certificate});
  RespServer server([](RespSession& session, int) { say_hello(session); }, "127.0.0.1", side.wrap());
  TlsOptions options = world.client();
  struct Case {
    std::string host, server_name, asked;
  };
  for (const Case& with : std::vector<Case>{{"localhost", "", "localhost"},
                                            {"127.0.0.1", "store.example", "store.example"},
                                            {"127.0.0.1", "", ""}}) {
    options.server_name = with.server_name;
    ByteStream stream = open(server, options, with.host);
    CHECK(testing::text_of(receive(stream, 5)) == "hello");
    CHECK(side.asked_name() == with.asked);
  }
}

TEST_CASE("a server that wants a certificate gets ours, and one that refuses us is kAuthentication") {
  World world;
  const Certificate mine = make_certificate({"me"}, &world.authority);
  const Certificate stranger = make_certificate({"stranger"});
  const auto key_file = write_pem(world.directory, "key.pem", nullptr, mine.key.get());
  const auto cert_file = write_pem(world.directory, "cert.pem", mine.x509.get());
  const auto both_file = write_pem(world.directory, "both.pem", mine.x509.get(), mine.key.get());
  const auto stranger_file =
      write_pem(world.directory, "stranger.pem", stranger.x509.get(), stranger.key.get());
  for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
    TlsSide side({world.certificate, &world.authority, version, version});
    RespServer server([](RespSession& session, int) { say_hello(session); }, "127.0.0.1", side.wrap());
    TlsOptions options = world.client();
    const auto use = [&] {
      ByteStream stream = open(server, options);
      const auto got = receive(stream, 5);
      CHECK(testing::text_of(got) == "hello");
    };
    check_failure(ErrorCode::kAuthentication, {"refused us", "client_cert_file="}, use);
    options.client_cert_file = stranger_file;
    check_failure(ErrorCode::kAuthentication, {"refused us"}, use);
    options.client_cert_file = both_file;
    CHECK_FALSE(failure_of(use).has_value());
    options.client_cert_file = cert_file;
    options.client_key_file = key_file;
    CHECK_FALSE(failure_of(use).has_value());
  }
}

TEST_CASE("who is refused while it sends learns why, not only that the connection is gone") {
  World world;
  TlsSide side({world.certificate, &world.authority, TLS1_3_VERSION});
  RespServer server([](RespSession& session, int) { session.wait_for_close(); }, "127.0.0.1", side.wrap());
  for (int i = 0; i < 20; ++i) {
    check_failure(ErrorCode::kAuthentication, {"refused us"}, [&] {
      ByteStream stream = open(server, world.client());
      const std::vector<std::byte> many(100000);
      const Deadline deadline = Deadline::after(kSoon);
      while (!deadline.passed()) {
        // Only once nothing can be sent any more is there a look at what came.
        if (stream.try_send(many) > 0) continue;
        std::array<std::byte, 1> byte;
        stream.try_receive(std::span(byte));
        stream.wait(true, true, 20);
      }
    });
  }
}

TEST_CASE("a file that cannot be used is named with its option and the reason") {
  World world;
  const Certificate mine = make_certificate({"me"}, &world.authority);
  const auto cert = write_pem(world.directory, "cert.pem", mine.x509.get());
  const auto locked = write_pem(world.directory, "locked.pem", nullptr, mine.key.get(), "secret");
  const auto strange = write_pem(world.directory, "strange.pem", nullptr, make_certificate({}).key.get());
  world.directory.write("garbage.pem", testing::random_bytes(100, 5));
  const auto garbage = (world.directory.path() / "garbage.pem").string();
  const auto none = (world.directory.path() / "none").string();
  struct Case {
    TlsOptions options;
    std::vector<std::string> words;
  };
  for (const Case& with : std::vector<Case>{
           {{none, "", "", "", ""}, {"ca_file=" + none, "No such file"}},
           {{garbage, "", "", "", ""}, {"ca_file=" + garbage}},
           {{"", none, "", "", ""}, {"ca_dir=" + none, "No such file"}},
           {{"", "", none, "", ""}, {"client_cert_file=" + none, "No such file"}},
           {{"", "", garbage, "", ""}, {"client_cert_file=" + garbage}},
           {{"", "", cert, "", ""}, {"client_cert_file=" + cert}},  // without a key
           {{"", "", cert, none, ""}, {"client_key_file=" + none, "No such file"}},
           {{"", "", cert, strange, ""}, {"client_key_file=" + strange, "mismatch"}},
           {{"", "", cert, locked, ""}, {"client_key_file=" + locked}},
       }) {
    check_failure(ErrorCode::kAuthentication, with.words, [&] { TlsContext context(with.options); });
  }
}

TEST_CASE("an end with TLS's good-bye and one without are told apart, after the bytes that came before") {
  World world;
  for (const bool orderly : {true, false}) {
    TlsSide side({world.certificate});
    RespServer server(
        [orderly](RespSession& session, int) {
          session.send("hello");
          if (!orderly) session.shut_down();
        },
        "127.0.0.1", side.wrap());
    ByteStream stream = open(server, world.client());
    CHECK(testing::text_of(receive(stream, 5)) == "hello");
    check_failure(ErrorCode::kUnavailable, {"closed the connection"}, [&] { receive(stream, 1); });
    const auto again = failure_of([&] { receive(stream, 1); });
    REQUIRE(again.has_value());
    CHECK((std::string(again->what()).find("cut off") == std::string::npos) == orderly);
  }
}

TEST_CASE("a record that is cut off in its middle gives nothing of itself") {
  World world;
  TlsSide side({world.certificate});
  RespServer server([](RespSession& session, int) { say_hello(session); }, "127.0.0.1", side.wrap());
  // Between them somebody who passes on what the server says up to the middle of its last record.
  RespServer between([&](RespSession& session, int) {
    Socket upstream = Socket::connect("127.0.0.1", server.port(), Deadline::after(kSoon), never);
    char piece[4096];
    const ssize_t hello = session.receive(piece, sizeof(piece));
    if (hello <= 0) return;
    upstream.try_send(std::as_bytes(std::span(piece, static_cast<size_t>(hello))));
    std::string from_server;
    const Deadline deadline = Deadline::after(kSoon);
    bool finished = false;
    while (!deadline.passed()) {
      upstream.wait(true, false, 5);
      std::array<std::byte, 4096> bytes;
      const size_t got = upstream.try_receive(std::span(bytes));
      std::string_view text(reinterpret_cast<const char*>(bytes.data()), got);
      // "hello" and 17 bytes of TLS in a record: 27 bytes, which come last.
      if (finished && got > 0 && text.size() >= 27) {
        session.send(text.substr(0, text.size() - 10));
        return;
      }
      session.send(text);
      if (!finished && session.readable_within(5)) {
        const ssize_t more = session.receive(piece, sizeof(piece));
        if (more <= 0) return;
        upstream.try_send(std::as_bytes(std::span(piece, static_cast<size_t>(more))));
        finished = true;
      }
    }
  });
  ByteStream stream = open(between, world.client());
  std::vector<std::byte> got(5);
  check_failure(ErrorCode::kUnavailable, {"cut off"}, [&] { got = receive(stream, 5); });
  CHECK(got == std::vector<std::byte>(5));
}

TEST_CASE("who does not speak TLS, or not to the end, is a clear error in time") {
  World world;
  SUBCASE("silent") {
    RespServer server([](RespSession& session, int) { session.wait_for_close(); });
    check_failure(ErrorCode::kTimeout, {"TLS handshake", "TLS port"},
                  [&] { open(server, world.client(), "127.0.0.1", Deadline::after(kShort)); });
    int asked = 0;
    check_failure(ErrorCode::kCancelled, {"cancelled"}, [&] {
      open(server, world.client(), "127.0.0.1", Deadline::after(kSoon), [&asked] { return ++asked > 1; });
    });
  }
  SUBCASE("a plain server") {
    RespServer server([](RespSession& session, int) {
      session.send("-ERR Protocol error: unbalanced quotes in request\r\n");
      session.wait_for_close();
    });
    check_failure(ErrorCode::kUnavailable, {"not with TLS", "plain port"},
                  [&] { open(server, world.client()); });
  }
  SUBCASE("one that closes") {
    RespServer server([](RespSession& session, int) {
      char piece[4096];
      session.receive(piece, sizeof(piece));
    });
    check_failure(ErrorCode::kUnavailable, {"during the TLS handshake"},
                  [&] { open(server, world.client()); });
  }
  SUBCASE("one that knows only old versions") {
    TlsSide side({world.certificate, nullptr, TLS1_1_VERSION, TLS1_1_VERSION});
    RespServer server([](RespSession& session, int) { say_hello(session); }, "127.0.0.1", side.wrap());
    check_failure(ErrorCode::kNotSupported, {"TLS 1.2"}, [&] { open(server, world.client()); });
  }
}

TEST_CASE("a library that is not there is named, and what to install") {
  check_failure(ErrorCode::kNotSupported, {"libssl-of-nobody.so.9", "apt-get install libssl3"},
                [] { OpenSsl missing("libssl-of-nobody.so.9"); });
  check_failure(ErrorCode::kNotSupported, {"it lacks"}, [] { OpenSsl wrong("libc.so.6"); });
  CHECK(tls_library().starts_with("OpenSSL "));
}

TEST_CASE("a unix socket is reached by its path") {
  TempDir directory;
  const auto path = (directory.path() / "s").string();
  RespServer server([](RespSession& session, int) { say_hello(session); }, path);
  ByteStream stream = ByteStream::connect({"", 0, path}, nullptr, Deadline::after(kSoon), never);
  CHECK(testing::text_of(receive(stream, 5)) == "hello");
  check_failure(ErrorCode::kUnavailable, {path + "none", "No such file"},
                [&] { Socket::connect_unix(path + "none", Deadline::after(kSoon), never); });
  for (const std::string& bad : {""s, std::string(108, 'x')}) {
    check_failure(ErrorCode::kInvalid, {"1 to 107 bytes"},
                  [&] { Socket::connect_unix(bad, Deadline::after(kSoon), never); });
  }
}

TEST_CASE("a unix socket whose server does not accept is given up in time") {
  TempDir directory;
  const auto path = (directory.path() / "s").string();
  const int listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  path.copy(name.sun_path, sizeof(name.sun_path) - 1);
  REQUIRE(::bind(listener, reinterpret_cast<sockaddr*>(&name), sizeof(name)) == 0);
  REQUIRE(::listen(listener, 0) == 0);
  std::vector<Socket> fillers;
  check_failure(ErrorCode::kTimeout, {path, "too long"}, [&] {
    for (int i = 0; i < 10; ++i)
      fillers.push_back(Socket::connect_unix(path, Deadline::after(kShort), never));
  });
  int asked = 0;
  check_failure(ErrorCode::kCancelled, {path}, [&] {
    Socket::connect_unix(path, Deadline::after(kSoon), [&asked] { return ++asked > 1; });
  });
  ::close(listener);
}

TEST_CASE("a RESP transport says which way its bytes take") {
  World world;
  resp::TransportOptions options;
  CHECK(resp::RespTransport(options).path() == "resp-tcp");
  options.endpoint.socket_path = "/none";
  CHECK(resp::RespTransport(options).path() == "resp-unix");
  options.endpoint.socket_path.clear();
  options.endpoint.tls = std::make_shared<TlsContext>(world.client());
  CHECK(resp::RespTransport(options).path() == "resp-tls");
}

TEST_CASE("a server that falls silent over TLS is kTimeout after the inactivity time-out") {
  World world;
  TlsSide side({world.certificate});
  RespServer server(
      [](RespSession& session, int) {
        if (session.next_command()) session.send("$10\r\nhalf");
        session.wait_for_close();
      },
      "127.0.0.1", side.wrap());
  resp::TransportOptions options;
  options.connections = 1;
  options.endpoint.host = server.address();
  options.endpoint.port = server.port();
  options.endpoint.name = "rediss://test";
  options.endpoint.inactivity_timeout = kShort;
  options.endpoint.tls = std::make_shared<TlsContext>(world.client());
  testing::RecordingOwner owner;
  testing::TestRead prepared("k", 10, owner);
  resp::RespTransport transport(options);
  transport.submit(prepared.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.status_of(prepared.read).code() == ErrorCode::kTimeout);
  CHECK(owner.status_of(prepared.read).message().find("inactivity_timeout") != std::string::npos);
}

}  // namespace
}  // namespace rdmaload
