// transport/http/http_transport.h against servers that do what no server should.
#include <doctest/doctest.h>

#include <atomic>
#include <deque>

#include "core/crc32c.h"
#include "support/http_server.h"
#include "support/reads.h"
#include "support/temp_dir.h"
#include "support/tls_server.h"
#include "transport/http/http_transport.h"

namespace rdmaload::http {
namespace {

using rdmaload::testing::HttpRequest;
using rdmaload::testing::HttpServer;
using rdmaload::testing::HttpSession;
using rdmaload::testing::HttpStore;
using rdmaload::testing::next_request;
using rdmaload::testing::RecordingOwner;
using rdmaload::testing::response;
using rdmaload::testing::TestRead;
using rdmaload::testing::text_of;

constexpr std::chrono::duration<double> kMilliseconds50{0.05};

TransportOptions options_for(const HttpServer& server, int connections = 1) {
  TransportOptions options;
  const std::string base = "http://" + server.address() + ":" + std::to_string(server.port()) + "/";
  options.addresses = [base](const std::string& object, bool) {
    return Address{base + object + "?X-Signature=SECRET", {}, "\"1\"", "", "", Clock::time_point::max()};
  };
  options.connections = connections;
  options.name = "s3://bucket/model";
  return options;
}

// One object "o" of these bytes, and a server that runs `script` with them.
struct Fixture {
  using Script = std::function<void(HttpSession&, int connection, const HttpRequest&, int request)>;
  explicit Fixture(Script script, size_t size = 100000)
      : bytes(rdmaload::testing::random_bytes(size, 5)),
        text(text_of(bytes)),
        server([this, script](HttpSession& session, int connection) {
          while (const auto request = next_request(session)) {
            const int number = requests++;
            script(session, connection, *request, number);
          }
        }) {}

  // The answer of an honest store to a range, whole.
  std::string honest(const HttpRequest& request, const std::string& etag = "\"1\"", size_t total = 0) const {
    const auto [first, last] = request.range();
    return response("206 Partial Content",
                    HttpStore::range_headers(first, last, total ? total : text.size(), etag),
                    std::string_view(text).substr(first, last - first + 1));
  }
  // Reads the whole object once; the status of that attempt.
  Status read_once(TestRead& prepared, RecordingOwner& owner) {
    const HttpTransport transport(options_for(server));
    const_cast<HttpTransport&>(transport).Transport::submit(prepared.read);
    REQUIRE(owner.wait_for(owner.count() + 1));
    return owner.status_of(prepared.read);
  }
  // The status of one attempt to read the whole object.
  Status status() {
    RecordingOwner owner;
    TestRead prepared("o", bytes.size(), owner);
    const Status found = read_once(prepared, owner);
    if (found.ok()) CHECK(prepared.holds(bytes));
    CHECK(found.message().find("SECRET") == std::string::npos);
    return found;
  }

  std::vector<std::byte> bytes;
  std::string text;
  std::atomic<int> requests{0};
  HttpServer server;
};

Fixture::Script always(std::string answer) {
  return [answer](HttpSession& session, int, const HttpRequest&, int) { session.send(answer); };
}

TEST_CASE("a request asks for exactly its range of that version, in no encoding") {
  HttpRequest seen;
  Fixture fixture([&](HttpSession& session, int, const HttpRequest& request, int) {
    seen = request;
    session.send("HTTP/1.1 100 Continue\r\n\r\n" + fixture.honest(request));
  });
  RecordingOwner owner;
  TestRead range("o", fixture.bytes.size(), 1000, {{5000}, {7, true}, {1}}, owner);
  CHECK(fixture.read_once(range, owner).ok());
  CHECK(range.holds(fixture.bytes));
  CHECK(range.read.crc == crc32c(0, std::span(fixture.bytes).subspan(1000, 5008)));
  CHECK(seen.method == "GET");
  CHECK(seen.target == "/o?X-Signature=SECRET");
  CHECK(seen.header("range") == "bytes=1000-6007");
  CHECK(seen.header("if-match") == "\"1\"");
  CHECK(seen.header("accept-encoding") == "identity");
  CHECK(seen.header("host") == fixture.server.address() + ":" + std::to_string(fixture.server.port()));
}

TEST_CASE("answers that are not the range that was asked for are refused") {
  const auto status = [](std::function<std::string(const Fixture&, const HttpRequest&)> answer) {
    Fixture fixture([&](HttpSession& session, int, const HttpRequest& request, int) {
      session.send(answer(fixture, request));
    });
    return fixture.status();
  };
  using Headers = std::string;
  const auto lie = [&](const std::string& range, const Headers& more = "") {
    return status([&](const Fixture& fixture, const HttpRequest&) {
      return response("206 Partial Content", (range.empty() ? "" : "Content-Range: " + range + "\r\n") + more,
                      fixture.text);
    });
  };
  CHECK(lie("bytes 0-99999/100000").ok());
  CHECK(lie("bytes 1-99999/100000").code() == ErrorCode::kFormat);
  CHECK(lie("bytes 0-99998/100000").code() == ErrorCode::kFormat);
  CHECK(lie("").code() == ErrorCode::kFormat);
  CHECK(lie("bytes */100000").code() == ErrorCode::kFormat);
  CHECK(lie("bytes 0-99999/100001").code() == ErrorCode::kIntegrity);
  CHECK(lie("bytes 0-99999/100000", "ETag: \"2\"\r\n").code() == ErrorCode::kIntegrity);
  CHECK(lie("bytes 0-99999/100000", "ETag: \"1\"\r\n").ok());
  CHECK(lie("bytes 0-99999/*").ok());
  CHECK(lie("bytes 0-99999/100000", "Content-Encoding: gzip\r\n").code() == ErrorCode::kFormat);
  CHECK(status([](const Fixture& fixture, const HttpRequest&) {
          return response("200 OK", "", fixture.text);
        }).code() == ErrorCode::kNotSupported);
  CHECK(status([](const Fixture& fixture, const HttpRequest&) {
          return response("200 OK", "Content-Range: bytes 0-99999/100000\r\n", fixture.text);
        }).ok());
  CHECK(status([](const Fixture& fixture, const HttpRequest&) {
          return response("200 OK", "Content-Range: bytes 1-99999/100000\r\n", fixture.text);
        }).code() == ErrorCode::kFormat);
  CHECK(status([](const Fixture&, const HttpRequest&) {
          return response("206 Partial Content", HttpStore::range_headers(0, 99999, 100000, "\"1\""),
                          "short");
        }).code() == ErrorCode::kFormat);
  CHECK(status([](const Fixture&, const HttpRequest&) {
          return std::string("220 mail.example ESMTP\r\n");
        }).code() == ErrorCode::kFormat);
}

TEST_CASE("a refusal has the code of what the caller can do, and the server's words") {
  const auto answered = [](const std::string& status, const std::string& code,
                           const std::string& headers = "") {
    Fixture fixture(always(response(status, headers, "<Error><Code>" + code + "</Code></Error>")));
    const Status found = fixture.status();
    CHECK(found.message().find(code) != std::string::npos);
    CHECK(found.message().find("s3://bucket/model file 'o'") != std::string::npos);
    return found.code();
  };
  CHECK(answered("404 Not Found", "NoSuchKey") == ErrorCode::kNotFound);
  CHECK(answered("403 Forbidden", "AccessDenied") == ErrorCode::kAuthentication);
  CHECK(answered("401 Unauthorized", "Who") == ErrorCode::kAuthentication);
  CHECK(answered("412 Precondition Failed", "PreconditionFailed") == ErrorCode::kIntegrity);
  CHECK(answered("416 Range Not Satisfiable", "InvalidRange", "Content-Range: bytes */50\r\n") ==
        ErrorCode::kIntegrity);
  CHECK(answered("429 Too Many Requests", "Slow") == ErrorCode::kUnavailable);
  CHECK(answered("503 Slow Down", "SlowDown") == ErrorCode::kUnavailable);
  CHECK(answered("500 Internal Server Error", "InternalError") == ErrorCode::kUnavailable);
  CHECK(answered("501 Not Implemented", "NotImplemented") == ErrorCode::kNotSupported);
  CHECK(answered("400 Bad Request", "ExpiredToken") == ErrorCode::kAuthentication);
  CHECK(answered("400 Bad Request", "RequestTimeout") == ErrorCode::kUnavailable);
  CHECK(answered("400 Bad Request", "InvalidArgument") == ErrorCode::kInvalid);
  CHECK(answered("301 Moved Permanently", "PermanentRedirect") == ErrorCode::kInvalid);
}

TEST_CASE("what arrived before a reset stays, and the next attempt asks for the rest only") {
  std::vector<std::string> ranges;
  Fixture fixture([&](HttpSession& session, int, const HttpRequest& request, int number) {
    ranges.push_back(request.header("range"));
    std::string answer = fixture.honest(request);
    if (number < 3) {
      const size_t head = answer.find("\r\n\r\n") + 4;
      session.send(answer.substr(0, head + 1000));
      session.wait_until_taken();
      number == 1 ? session.reset() : session.shut_down();
    } else {
      session.send(answer);
    }
  });
  RecordingOwner owner;
  TestRead prepared("o", fixture.bytes.size(), 0, {{500}, {600, true}, {98900}}, owner);
  HttpTransport transport(options_for(fixture.server));
  for (size_t attempt = 1; attempt <= 4; ++attempt) {
    transport.Transport::submit(prepared.read);
    REQUIRE(owner.wait_for(attempt));
    const Status status = owner.status_of(prepared.read);
    CAPTURE(status.message());
    CHECK(status.ok() == (attempt == 4));
    if (!status.ok()) CHECK(status.code() == ErrorCode::kUnavailable);
    CHECK(prepared.read.received == (attempt == 4 ? 100000 : attempt * 1000));
  }
  CHECK(prepared.holds(fixture.bytes));
  CHECK(prepared.read.crc == crc32c(0, fixture.bytes));
  CHECK(ranges == std::vector<std::string>{"bytes=0-99999", "bytes=1000-99999", "bytes=2000-99999",
                                           "bytes=3000-99999"});
}

TEST_CASE("a connection that stalls is given up and the rest asked for on another") {
  for (const size_t before : {size_t{0}, size_t{1}, size_t{5000}}) {
    CAPTURE(before);
    Fixture fixture([&](HttpSession& session, int connection, const HttpRequest& request, int) {
      std::string answer = fixture.honest(request);
      if (connection == 0) {
        session.send(answer.substr(0, before == 0 ? 0 : answer.find("\r\n\r\n") + 4 + before));
        session.wait_for_close();
      } else {
        session.send(answer);
      }
    });
    RecordingOwner owner;
    TestRead prepared("o", fixture.bytes.size(), owner);
    TransportOptions options = options_for(fixture.server);
    options.stall_timeout = kMilliseconds50;
    HttpTransport transport(std::move(options));
    transport.Transport::submit(prepared.read);
    REQUIRE(owner.wait_for(1));
    CHECK(owner.status_of(prepared.read).ok());
    CHECK(prepared.holds(fixture.bytes));
    CHECK(prepared.read.reissues >= 1);
  }
}

TEST_CASE("a server that stays silent is kTimeout after the inactivity time-out") {
  Fixture fixture([](HttpSession& session, int, const HttpRequest&, int) { session.wait_for_close(); });
  RecordingOwner owner;
  TestRead prepared("o", fixture.bytes.size(), owner);
  TransportOptions options = options_for(fixture.server);
  options.stall_timeout = kMilliseconds50;
  options.inactivity_timeout = 2 * kMilliseconds50;
  HttpTransport transport(std::move(options));
  transport.Transport::submit(prepared.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.status_of(prepared.read).code() == ErrorCode::kTimeout);
  CHECK(owner.status_of(prepared.read).message().find("inactivity_timeout") != std::string::npos);
}

TEST_CASE("cancelling, or destroying the transport, ends a read that waits for a silent server") {
  for (const bool destroy : {true, false}) {
    Fixture fixture([](HttpSession& session, int, const HttpRequest&, int) { session.wait_for_close(); });
    RecordingOwner owner;
    TestRead prepared("o", fixture.bytes.size(), owner);
    auto transport = std::make_unique<HttpTransport>(options_for(fixture.server));
    transport->Transport::submit(prepared.read);
    while (fixture.requests == 0) std::this_thread::yield();
    if (destroy) {
      transport.reset();
    } else {
      owner.set_cancelled();
      transport->cancel(owner);
    }
    REQUIRE(owner.wait_for(1));
    CHECK(owner.status_of(prepared.read).code() == ErrorCode::kCancelled);
  }
}

TEST_CASE("Retry-After is passed on, within reason") {
  const auto asked = [](const std::string& header) {
    Fixture fixture(always(response("503 Slow Down", header, "")));
    RecordingOwner owner;
    TestRead prepared("o", fixture.bytes.size(), owner);
    CHECK(fixture.read_once(prepared, owner).code() == ErrorCode::kUnavailable);
    return prepared.read.retry_after;
  };
  CHECK(asked("Retry-After: 2\r\n") == std::chrono::seconds(2));
  CHECK(asked("Retry-After: 100000\r\n") == std::chrono::seconds(30));
  CHECK(asked("") == std::chrono::seconds(0));
}

TEST_CASE("a connection is used again, and one that the server closed meanwhile is no failure") {
  for (const bool polite : {true, false}) {
    Fixture fixture([&](HttpSession& session, int, const HttpRequest& request, int number) {
      std::string answer = fixture.honest(request);
      if (number % 2 == 1) {  // every second answer is the connection's last, said or not
        if (polite) answer.insert(answer.find("\r\n") + 2, "Connection: close\r\n");
        session.send(answer);
        session.shut_down();
      } else {
        session.send(answer);
      }
    });
    RecordingOwner owner;
    std::deque<TestRead> reads;
    HttpTransport transport(options_for(fixture.server));
    for (size_t i = 0; i < 10; ++i) {
      reads.emplace_back("o", fixture.bytes.size(), owner);
      transport.Transport::submit(reads.back().read);
      REQUIRE(owner.wait_for(i + 1));
      CAPTURE(owner.status_of(reads.back().read).message());
      CHECK(owner.status_of(reads.back().read).ok());
      CHECK(reads.back().holds(fixture.bytes));
    }
    // Unsaid, the end may come only after the next request was sent on it, which is then sent again.
    if (polite) CHECK(fixture.server.connections() == 5);
    if (polite) CHECK(fixture.requests == 10);
    CHECK(fixture.server.connections() >= 5);
  }
}

TEST_CASE("bodies may be chunked or end with the connection") {
  for (const bool chunked : {true, false}) {
    Fixture fixture([&](HttpSession& session, int, const HttpRequest& request, int) {
      const auto [first, last] = request.range();
      const std::string headers = HttpStore::range_headers(first, last, fixture.text.size(), "\"1\"");
      session.send("HTTP/1.1 206 Partial Content\r\n" + headers +
                   (chunked ? "Transfer-Encoding: chunked\r\n" : "") + "\r\n");
      if (!chunked) {
        session.send(fixture.text);
        session.shut_down();
        return;
      }
      for (size_t at = 0; at < fixture.text.size(); at += 30001) {
        const std::string part = fixture.text.substr(at, 30001);
        char size[16];
        std::snprintf(size, sizeof(size), "%zx\r\n", part.size());
        session.send(size + part + "\r\n");
      }
      session.send("0\r\n\r\n");
    });
    RecordingOwner owner;
    TestRead one("o", fixture.bytes.size(), owner), two("o", fixture.bytes.size(), owner);
    HttpTransport transport(options_for(fixture.server));
    for (TestRead* prepared : {&one, &two}) {
      transport.Transport::submit(prepared->read);
      REQUIRE(owner.wait_for(prepared == &one ? 1 : 2));
      CHECK(owner.status_of(prepared->read).ok());
      CHECK(prepared->holds(fixture.bytes));
      CHECK(prepared->read.crc == crc32c(0, fixture.bytes));
    }
    CHECK(fixture.server.connections() == (chunked ? 1 : 2));
  }
}

TEST_CASE("a chunked body that ends early is unavailable, and one that is too long is not used again") {
  Fixture fixture([&](HttpSession& session, int, const HttpRequest& request, int number) {
    const auto [first, last] = request.range();
    const std::string head = "HTTP/1.1 206 Partial Content\r\n" +
                             HttpStore::range_headers(first, last, fixture.text.size(), "\"1\"") +
                             "Transfer-Encoding: chunked\r\n\r\n";
    if (number == 0) {
      session.send(head + "5\r\n" + fixture.text.substr(0, 5) + "\r\n0\r\n\r\n");
    } else {
      session.send(head + "186ab\r\n" + fixture.text.substr(first) + "too long");
    }
  });
  RecordingOwner owner;
  TestRead prepared("o", fixture.bytes.size(), owner);
  CHECK(fixture.read_once(prepared, owner).code() == ErrorCode::kUnavailable);
  CHECK(prepared.read.received == 5);
}

TEST_CASE("redirects are followed, without the headers of the first server, and remembered") {
  std::atomic<int> secrets_leaked{0}, targets{0};
  Fixture target([&](HttpSession& session, int, const HttpRequest& request, int) {
    ++targets;
    if (!request.header("authorization").empty()) ++secrets_leaked;
    session.send(target.honest(request));
  });
  Fixture first([&](HttpSession& session, int, const HttpRequest& request, int) {
    const bool has_header = request.header("authorization") == "Bearer SECRET";
    const std::string location = "Location: http://" + target.server.address() + ":" +
                                 std::to_string(target.server.port()) + "/cdn?sig=SECRET\r\n";
    session.send(response(has_header ? "302 Found" : "401 Unauthorized", has_header ? location : "", ""));
  });
  RecordingOwner owner;
  TransportOptions options = options_for(first.server);
  options.addresses = [ask = options.addresses](const std::string& object, bool refused) {
    Address address = ask(object, refused);
    address.headers = {{"Authorization", "Bearer SECRET"}};
    return address;
  };
  std::deque<TestRead> reads;
  HttpTransport transport(std::move(options));
  for (size_t i = 0; i < 3; ++i) {
    reads.emplace_back("o", target.bytes.size(), owner);
    transport.Transport::submit(reads.back().read);
    REQUIRE(owner.wait_for(i + 1));
    CAPTURE(owner.status_of(reads.back().read).message());
    CHECK(owner.status_of(reads.back().read).ok());
    CHECK(reads.back().holds(target.bytes));
  }
  CHECK(secrets_leaked == 0);
  CHECK(targets == 3);
  CHECK(first.requests == 1);
}

TEST_CASE("redirects without end are an error") {
  Fixture fixture(always(response("302 Found", "Location: /o?again=SECRET\r\n", "")));
  CHECK(fixture.status().code() == ErrorCode::kInvalid);
  CHECK(fixture.requests == 6);
}

TEST_CASE("an address that has expired, or was refused as expired, is asked for anew, once") {
  std::atomic<int> asked{0}, asked_refused{0};
  Fixture fixture([&](HttpSession& session, int, const HttpRequest& request, int number) {
    const bool expired = request.target == "/o?version=1" || number > 100;
    session.send(expired ? response("403 Forbidden", "",
                                    "<Code>AccessDenied</Code><Message>Request has expired</Message>")
                         : fixture.honest(request));
  });
  const std::string base = "http://" + fixture.server.address() + ":" + std::to_string(fixture.server.port());
  TransportOptions options = options_for(fixture.server);
  options.addresses = [&, base](const std::string&, bool refused) {
    asked_refused += refused ? 1 : 0;
    const auto expires =
        asked == 1 ? Clock::now() : Clock::time_point::max();  // the second answer is over at once
    return Address{base + "/o?version=" + std::to_string(++asked), {}, "\"1\"", "", "", expires};
  };
  RecordingOwner owner;
  TestRead one("o", fixture.bytes.size(), owner), two("o", fixture.bytes.size(), owner);
  HttpTransport transport(std::move(options));
  transport.Transport::submit(one.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.status_of(one.read).ok());
  CHECK(asked == 2);
  CHECK(asked_refused == 1);
  transport.Transport::submit(two.read);
  REQUIRE(owner.wait_for(2));
  CHECK(owner.status_of(two.read).ok());
  CHECK(asked == 3);
  CHECK(asked_refused == 1);
}

TEST_CASE("credentials that stay wrong are asked for twice and no more") {
  Fixture fixture(always(response("403 Forbidden", "", "<Code>SignatureDoesNotMatch</Code>")));
  CHECK(fixture.status().code() == ErrorCode::kAuthentication);
  CHECK(fixture.requests == 2);
}

TEST_CASE("an error of the addresses is the read's error") {
  Fixture fixture(always(""));
  TransportOptions options = options_for(fixture.server);
  options.addresses = [](const std::string&, bool) -> Address {
    throw Error(ErrorCode::kAuthentication, "no credentials");
  };
  RecordingOwner owner;
  TestRead prepared("o", 100, owner);
  HttpTransport transport(std::move(options));
  transport.Transport::submit(prepared.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.status_of(prepared.read).code() == ErrorCode::kAuthentication);
}

TEST_CASE("a proxy is asked for the whole url, with its own credentials") {
  HttpRequest seen;
  Fixture proxy([&](HttpSession& session, int, const HttpRequest& request, int) {
    seen = request;
    session.send(proxy.honest(request));
  });
  TransportOptions options = options_for(proxy.server);
  options.addresses = [&](const std::string&, bool) {
    return Address{"http://store.invalid/o?sig=SECRET",
                   {},
                   "\"1\"",
                   "http://" + proxy.server.address() + ":" + std::to_string(proxy.server.port()),
                   "Basic eDp5",
                   Clock::time_point::max()};
  };
  RecordingOwner owner;
  TestRead prepared("o", proxy.bytes.size(), owner);
  HttpTransport transport(std::move(options));
  transport.Transport::submit(prepared.read);
  REQUIRE(owner.wait_for(1));
  CHECK(owner.status_of(prepared.read).ok());
  CHECK(prepared.holds(proxy.bytes));
  CHECK(seen.target == "http://store.invalid/o?sig=SECRET");
  CHECK(seen.header("host") == "store.invalid");
  CHECK(seen.header("proxy-authorization") == "Basic eDp5");
}

TEST_CASE("https goes through a proxy as a tunnel, which sees neither the request nor its secrets") {
  rdmaload::testing::TempDir directory;
  const auto authority = rdmaload::testing::make_certificate({"authority", ""});
  rdmaload::testing::TlsSide side{{rdmaload::testing::make_certificate({}, &authority)}};
  // Proxy and server in one: after CONNECT the same connection speaks TLS, so the tunnel is one hop shorter.
  for (const int answer : {200, 407, 502}) {
    std::string seen;
    HttpServer proxy([&](HttpSession& session, int) {
      const auto asked = session.receive_until("\r\n\r\n");
      if (!asked) return;
      seen = *asked;
      session.send("HTTP/1.1 " + std::to_string(answer) + " answer\r\n\r\n");
      session.wait_for_close();
    });
    TransportOptions options = options_for(proxy);
    TlsOptions tls;
    tls.ca_file = rdmaload::testing::write_pem(directory, "ca.pem", authority.x509.get());
    options.tls = [context = std::make_shared<const TlsContext>(tls)] { return context; };
    options.connect_timeout = 4 * kMilliseconds50;
    options.addresses = [&](const std::string&, bool) {
      return Address{"https://store.invalid/o?sig=SECRET",
                     {},
                     "",
                     "http://" + proxy.address() + ":" + std::to_string(proxy.port()),
                     "Basic eDp5",
                     Clock::time_point::max()};
    };
    RecordingOwner owner;
    TestRead prepared("o", 100, owner);
    {
      HttpTransport transport(std::move(options));
      transport.Transport::submit(prepared.read);
      REQUIRE(owner.wait_for(1));
    }
    const ErrorCode code = owner.status_of(prepared.read).code();
    CHECK(code == (answer == 200   ? ErrorCode::kTimeout  // this one never says a word of TLS
                   : answer == 407 ? ErrorCode::kAuthentication
                                   : ErrorCode::kUnavailable));
    CHECK(seen.starts_with("CONNECT store.invalid:443 HTTP/1.1\r\n"));
    CHECK(seen.find("Proxy-Authorization: Basic eDp5") != std::string::npos);
    CHECK(seen.find("SECRET") == std::string::npos);
  }
}

TEST_CASE("https in a build without TLS is refused by name, and a header cannot smuggle another") {
  Fixture fixture(always(""));
  for (const bool tls : {true, false}) {
    TransportOptions options = options_for(fixture.server);
    options.addresses = [&, tls, ask = options.addresses](const std::string& object, bool) {
      Address address = ask(object, false);
      if (tls) {
        address.url = "https://store.invalid/o";
      } else {
        address.headers = {{"X", "y\r\nHost: evil"}};
      }
      return address;
    };
    RecordingOwner owner;
    TestRead prepared("o", 100, owner);
    HttpTransport transport(std::move(options));
    transport.Transport::submit(prepared.read);
    REQUIRE(owner.wait_for(1));
    CHECK(owner.status_of(prepared.read).code() == (tls ? ErrorCode::kNotSupported : ErrorCode::kInvalid));
  }
}

}  // namespace
}  // namespace rdmaload::http
