// The request parser: what a request is does not depend on how its bytes arrive, and nothing is kept beyond
// bounds.
#include "server/request.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace rdmaload::server;
using Event = RequestParser::Event;

namespace {

struct Parsed {
  std::vector<std::vector<std::string>> requests;
  std::vector<std::string> large;
  std::string error;
  bool operator==(const Parsed&) const = default;
};

// Feeds `pieces` as a connection would, taking large arguments from the stream.
Parsed parse(const std::vector<std::string_view>& pieces, RequestLimits limits = {}) {
  RequestParser parser;
  parser.set_limits(limits);
  Parsed parsed;
  uint64_t large_left = 0;
  for (std::string_view bytes : pieces) {
    while (!bytes.empty()) {
      if (large_left > 0) {
        const auto part = bytes.substr(0, large_left);
        parsed.large.back().append(part);
        bytes.remove_prefix(part.size());
        large_left -= part.size();
        if (large_left == 0) parser.large_argument_taken();
        continue;
      }
      const Event event = parser.next(bytes);
      if (event == Event::kMore) REQUIRE(bytes.empty());
      if (event == Event::kRequest) {
        parsed.requests.emplace_back(parser.arguments().begin(), parser.arguments().end());
      }
      if (event == Event::kLargeArgument) {
        large_left = parser.large_bytes();
        parsed.large.emplace_back();
      }
      if (event == Event::kError) {
        parsed.error = parser.error();
        return parsed;
      }
    }
  }
  return parsed;
}

Parsed parse(std::string_view whole, RequestLimits limits = {}) {
  return parse(std::vector<std::string_view>{whole}, limits);
}

}  // namespace

TEST_CASE("requests are the same however their bytes are split") {
  const std::string large(kSmallArgumentBytes + 1, 'w');
  const std::string stream =
      "*2\r\n$3\r\nGET\r\n$3\r\na\r\n\r\nPING\r\n\r\n*0\r\n*3\r\n$3\r\nSET\r\n$0\r\n\r\n$2\r\n\r\n\r\n"
      "echo \"a b\\x41\\n\" 'c\\d'\n*1\r\n$4\r\nQUIT\r\n";
  const Parsed whole = parse(stream);
  REQUIRE(whole.error.empty());
  REQUIRE(whole.requests ==
          std::vector<std::vector<std::string>>{
              {"GET", "a\r\n"}, {"PING"}, {"SET", "", "\r\n"}, {"echo", "a bA\n", "c\\d"}, {"QUIT"}});
  const std::string_view view = stream;
  for (size_t first = 0; first <= view.size(); ++first) {
    for (size_t second = first; second <= view.size(); ++second) {
      CHECK(parse({view.substr(0, first), view.substr(first, second - first), view.substr(second)}) == whole);
    }
  }
  std::vector<std::string_view> bytes;
  for (size_t i = 0; i < view.size(); ++i) bytes.push_back(view.substr(i, 1));
  CHECK(parse(bytes) == whole);
}

TEST_CASE("a large argument is taken from the stream by the caller") {
  const std::string value(kSmallArgumentBytes + 1, 'w');
  const std::string stream = "*4\r\n$3\r\nSET\r\n$1\r\nk\r\n$" + std::to_string(value.size()) + "\r\n" +
                             value + "\r\n$2\r\nNX\r\nPING\r\n";
  const Parsed whole = parse(stream);
  CHECK(whole.requests == std::vector<std::vector<std::string>>{{"SET", "k", "", "NX"}, {"PING"}});
  CHECK(whole.large == std::vector<std::string>{value});
  const std::string_view view = stream;
  const size_t body = stream.find("w");
  for (size_t at = 0; at <= view.size(); ++at) {
    if (at > body + 40 && at + 40 < view.size()) continue;  // inside the value one split is like another
    CHECK(parse({view.substr(0, at), view.substr(at)}) == whole);
  }
}

TEST_CASE("what can never become a request is refused") {
  for (const std::string_view stream :
       {"*1\r\n+OK\r\n", "*x\r\n", "*1x\r\n", "*\r\n", "*99999999999999999999\r\n", "*16385\r\n",
        "*1\r\n$-1\r\n", "*1\r\n$\r\n", "*1\r\n$x\r\n", "*1\r\n$536870913\r\n",
        "*1\r\n$18446744073709551616\r\n", "*1\r\n$1\r\nabc", "*1\r\n$1\r\na\n\n", "GET \"a\r\n",
        "GET 'a'b\r\n", "*00000000000000000000000000000000000001\r\n"}) {
    CAPTURE(stream);
    CHECK(parse(stream).error.substr(0, 14) == "Protocol error");
  }
  CHECK(parse("*1\r\n$536870912\r\n").error.empty());
}

TEST_CASE("a refused stream stays refused") {
  RequestParser parser;
  std::string_view bytes = "*x\r\nPING\r\n";
  CHECK(parser.next(bytes) == Event::kError);
  CHECK(parser.next(bytes) == Event::kError);
}

TEST_CASE("limits hold for arguments, bytes and lines") {
  CHECK(parse("*11\r\n", kUnknownClientLimits).error == "Protocol error: invalid multibulk length");
  CHECK(parse("*10\r\n", kUnknownClientLimits).error.empty());
  std::string many = "*300\r\n";
  for (int i = 0; i < 300; ++i) many += "$16384\r\n" + std::string(16384, 'k') + "\r\n";
  CHECK(parse(many).error == "Protocol error: too big a request");  // above 4 MiB
  CHECK(parse(std::string(70'000, 'a')).error == "Protocol error: too long a line");
  std::string words;
  for (int i = 0; i < 11; ++i) words += "a ";
  CHECK(!parse(words + "\r\n", kUnknownClientLimits).error.empty());
}

TEST_CASE("partial says whether a request has begun") {
  RequestParser parser;
  CHECK(!parser.partial());
  std::string_view bytes = "*1\r\n$4\r\nPI";
  CHECK(parser.next(bytes) == Event::kMore);
  CHECK(parser.partial());
  bytes = "NG\r\n";
  CHECK(parser.next(bytes) == Event::kRequest);
  CHECK(!parser.partial());
  bytes = "P";
  CHECK(parser.next(bytes) == Event::kMore);
  CHECK(parser.partial());
}
