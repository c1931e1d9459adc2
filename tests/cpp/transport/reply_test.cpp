#include "transport/resp/reply.h"

#include <doctest/doctest.h>

#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "support/bytes.h"

namespace rdmaload::resp {
namespace {

using namespace std::string_literals;

ErrorCode code_of_header(std::string_view bytes) {
  try {
    parse_header(bytes);
  } catch (const Error& error) {
    return error.code();
  }
  FAIL_CHECK("no error for: " << std::string(bytes));
  return ErrorCode::kInvalid;
}

ErrorCode code_of_reply(std::string_view bytes) {
  try {
    size_t consumed;
    parse_reply(bytes, consumed);
  } catch (const Error& error) {
    return error.code();
  }
  FAIL_CHECK("no error for: " << std::string(bytes.substr(0, 80)));
  return ErrorCode::kInvalid;
}

Reply parsed(std::string_view bytes) {
  size_t consumed = 0;
  auto reply = parse_reply(bytes, consumed);
  REQUIRE(reply.has_value());
  CHECK(consumed == bytes.size());
  return *reply;
}

TEST_CASE("a header line says type, text, length and how much it took") {
  struct Case {
    std::string bytes;
    Type type;
    std::string_view text;
    int64_t length;
  };
  for (const Case& expected : std::vector<Case>{
           {"+OK\r\n", Type::kSimple, "OK", 0},
           {"+\r\n", Type::kSimple, "", 0},
           {"-ERR no such thing\r\n", Type::kError, "ERR no such thing", 0},
           {":42\r\n", Type::kInteger, "42", 42},
           {":-9223372036854775808\r\n", Type::kInteger, "-9223372036854775808", INT64_MIN},
           {"$0\r\n", Type::kBulk, "0", 0},
           {"$536870912\r\n", Type::kBulk, "536870912", 536870912},
           {"$-1\r\n", Type::kNull, "-1", -1},
           {"_\r\n", Type::kNull, "", 0},
           {"*0\r\n", Type::kAggregate, "0", 0},
           {"*-1\r\n", Type::kNull, "-1", -1},
           {"*3\r\n", Type::kAggregate, "3", 3},
           {"~2\r\n", Type::kAggregate, "2", 2},
           {">2\r\n", Type::kAggregate, "2", 2},
           {"%2\r\n", Type::kAggregate, "2", 4},
           {"!9\r\n", Type::kBulk, "9", 9},
           {"=9\r\n", Type::kBulk, "9", 9},
           {"#t\r\n", Type::kOther, "t", 0},
           {",1.5\r\n", Type::kOther, "1.5", 0},
           {"(123456789012345678901234567890\r\n", Type::kOther, "123456789012345678901234567890", 0},
       }) {
    CAPTURE(expected.bytes);
    const std::string followed = expected.bytes + "$5\r\nhello\r\n";
    for (const std::string& bytes : {expected.bytes, followed}) {
      const auto header = parse_header(bytes);
      REQUIRE(header.has_value());
      CHECK(header->type == expected.type);
      CHECK(header->text == expected.text);
      CHECK(header->length == expected.length);
      CHECK(header->consumed == expected.bytes.size());
    }
    for (size_t cut = 0; cut < expected.bytes.size(); ++cut) {
      CHECK_FALSE(parse_header(std::string_view(expected.bytes).substr(0, cut)).has_value());
    }
  }
}

TEST_CASE("a header line that can never become a reply is refused") {
  for (const std::string& bytes : {"hello\r\n"s,
                                   "\r\n"s,
                                   "\0"s,
                                   "HTTP/1.1 400 Bad Request\r\n"s,
                                   "|1\r\n"s,
                                   "?\r\n"s,
                                   "$\r\n"s,
                                   "$x\r\n"s,
                                   "$1x\r\n"s,
                                   "$ 1\r\n"s,
                                   "$+1\r\n"s,
                                   "$-2\r\n"s,
                                   "$536870913\r\n"s,
                                   "$99999999999999999999999\r\n"s,
                                   "$0x10\r\n"s,
                                   "$1.5\r\n"s,
                                   "*-2\r\n"s,
                                   "*2147483649\r\n"s,
                                   "~-1\r\n"s,
                                   ">-1\r\n"s,
                                   "%-1\r\n"s,
                                   "!-1\r\n"s,
                                   "=-1\r\n"s,
                                   ":\r\n"s,
                                   ":x\r\n"s,
                                   ":9223372036854775808\r\n"s,
                                   "_x\r\n"s,
                                   "+OK\rx"s,
                                   "$3\r\r\n"s,
                                   "*?\r\n"s}) {
    CAPTURE(bytes);
    CHECK(code_of_header(bytes) == ErrorCode::kFormat);
  }
}

TEST_CASE("a line is bounded, and one just within the bound is read") {
  const std::string longest = "-" + std::string(kMaxLineBytes - 3, 'x') + "\r\n";
  REQUIRE(longest.size() == kMaxLineBytes);
  const auto header = parse_header(longest);
  REQUIRE(header.has_value());
  CHECK(header->consumed == kMaxLineBytes);
  CHECK_FALSE(parse_header(std::string_view(longest).substr(0, kMaxLineBytes - 1)).has_value());
  CHECK(code_of_header("-" + std::string(kMaxLineBytes - 1, 'x')) == ErrorCode::kFormat);
  CHECK(code_of_header("-" + std::string(kMaxLineBytes + 100, 'x') + "\r\n") == ErrorCode::kFormat);
}

TEST_CASE("the refusal shows what came, made printable and short") {
  try {
    parse_header("\x01\x7f\xff" + std::string(500, 'a') + "\r\n");
    FAIL("accepted");
  } catch (const Error& error) {
    const std::string message = error.what();
    CHECK(message.find("???aaa") != std::string::npos);
    CHECK(message.size() < 200);
  }
}

TEST_CASE("whole replies are parsed, nested ones too") {
  CHECK(parsed("+OK\r\n").text == "OK");
  CHECK(parsed("-ERR x\r\n").type == Type::kError);
  CHECK(parsed(":7\r\n").integer == 7);
  CHECK(parsed("$5\r\nhe\r\no\r\n").text == "he\r\no");
  CHECK(parsed("$0\r\n\r\n").type == Type::kBulk);
  CHECK(parsed("$-1\r\n").type == Type::kNull);
  CHECK(parsed("*-1\r\n").type == Type::kNull);
  CHECK(parsed("_\r\n").type == Type::kNull);
  CHECK(parsed("*0\r\n").items.empty());
  const Reply reply = parsed("%2\r\n$6\r\nserver\r\n+redis\r\n+list\r\n*3\r\n:1\r\n*1\r\n_\r\n$1\r\nx\r\n");
  REQUIRE(reply.items.size() == 4);
  CHECK(reply.type == Type::kAggregate);
  CHECK(reply.items[0].text == "server");
  CHECK(reply.items[1].text == "redis");
  REQUIRE(reply.items[3].items.size() == 3);
  CHECK(reply.items[3].items[0].integer == 1);
  CHECK(reply.items[3].items[1].items[0].type == Type::kNull);
  CHECK(reply.items[3].items[2].text == "x");
}

TEST_CASE("a blob error is an error, a verbatim string is a bulk") {
  const Reply error = parsed("!10\r\nERR it was\r\n");
  CHECK(error.type == Type::kError);
  CHECK(error.text == "ERR it was");
  CHECK(parsed("=7\r\ntxt:abc\r\n").type == Type::kBulk);
}

TEST_CASE("only the first reply is consumed") {
  size_t consumed = 0;
  const auto reply = parse_reply("*1\r\n+a\r\n$3\r\nxyz\r\n", consumed);
  REQUIRE(reply.has_value());
  CHECK(consumed == 8);
}

TEST_CASE("a truncated reply never throws and is never a reply") {
  for (const std::string& bytes :
       {"+OK\r\n"s, "-ERR x\r\n"s, ":12\r\n"s, "$5\r\nhello\r\n"s, "$0\r\n\r\n"s, "$-1\r\n"s, "_\r\n"s,
        "#t\r\n"s, "%1\r\n$6\r\nserver\r\n*2\r\n:1\r\n~1\r\n,1.5\r\n"s, "*2\r\n*0\r\n!3\r\nabc\r\n"s}) {
    CAPTURE(bytes);
    for (size_t cut = 0; cut < bytes.size(); ++cut) {
      CAPTURE(cut);
      size_t consumed;
      CHECK_FALSE(parse_reply(std::string_view(bytes).substr(0, cut), consumed).has_value());
    }
    parsed(bytes);
  }
}

TEST_CASE("a reply is bounded in depth, elements and bytes") {
  const auto nested = [](int depth) {
    std::string bytes;
    for (int i = 0; i < depth; ++i) bytes += "*1\r\n";
    return bytes + ":1\r\n";
  };
  parsed(nested(8));
  CHECK(code_of_reply(nested(9)) == ErrorCode::kFormat);
  CHECK(code_of_reply(nested(100000)) == ErrorCode::kFormat);

  const auto elements = [](size_t count) {
    std::string bytes = "*" + std::to_string(count) + "\r\n";
    for (size_t i = 0; i < count; ++i) bytes += ":1\r\n";
    return bytes;
  };
  CHECK(parsed(elements(1000)).items.size() == 1000);
  CHECK(code_of_reply(elements(1001)) == ErrorCode::kFormat);
  CHECK(code_of_reply("*2147483648\r\n") == ErrorCode::kFormat);  // refused before anything is allocated
  CHECK(code_of_reply("%2147483648\r\n") == ErrorCode::kFormat);
  std::string spread = "*2\r\n" + elements(500);  // the bound is on the whole reply
  CHECK(code_of_reply(spread + elements(500)) == ErrorCode::kFormat);
  parsed(spread + elements(498));

  const std::string mebibyte(1 << 20, 'x');
  CHECK(parsed("$1048576\r\n" + mebibyte + "\r\n").text.size() == 1 << 20);
  CHECK(code_of_reply("$1048577\r\n") == ErrorCode::kFormat);
  CHECK(code_of_reply("*2\r\n$1048576\r\n" + mebibyte + "\r\n$1048576\r\n" + mebibyte) == ErrorCode::kFormat);
  CHECK(code_of_reply("$3\r\nabcd\r\n") == ErrorCode::kFormat);
  CHECK(code_of_reply("$3\r\nabc\r\r") == ErrorCode::kFormat);
}

TEST_CASE("random and mutated bytes give a reply, a wish for more, or kFormat") {
  std::mt19937_64 random(7);
  const std::string sane = "*3\r\n$5\r\nhello\r\n%1\r\n+k\r\n:12\r\n$-1\r\n";
  for (int round = 0; round < 20000; ++round) {
    std::string bytes = sane;
    for (uint64_t i = testing::pick(random, 1, 4); i > 0; --i) {
      constexpr std::string_view kAlphabet = "+-:$*_#,(!=%~>0123456789\r\nx";
      bytes[testing::pick(random, 0, bytes.size() - 1)] =
          kAlphabet[testing::pick(random, 0, kAlphabet.size() - 1)];
    }
    size_t consumed = 0;
    try {
      if (parse_reply(bytes, consumed)) REQUIRE(consumed <= bytes.size());
    } catch (const Error& error) {
      REQUIRE(error.code() == ErrorCode::kFormat);
    }
  }
}

TEST_CASE("every class of error reply maps to what the caller can do about it") {
  struct Case {
    ErrorCode code;
    std::string text;
  };
  for (const Case& expected : std::vector<Case>{
           {ErrorCode::kAuthentication, "NOAUTH Authentication required."},
           {ErrorCode::kAuthentication, "WRONGPASS invalid username-password pair or user is disabled."},
           {ErrorCode::kAuthentication, "NOPERM this user has no permissions to run the 'get' command"},
           {ErrorCode::kAuthentication, "DENIED Redis is running in protected mode"},
           {ErrorCode::kAuthentication, "ERR invalid password"},
           {ErrorCode::kAuthentication, "ERR Client sent AUTH, but no password is set"},
           {ErrorCode::kAuthentication, "ERR AUTH <password> called without any password configured"},
           {ErrorCode::kUnavailable, "LOADING Redis is loading the dataset in memory"},
           {ErrorCode::kUnavailable, "OOM command not allowed when used memory > 'maxmemory'."},
           {ErrorCode::kUnavailable, "BUSY Redis is busy running a script."},
           {ErrorCode::kUnavailable, "TRYAGAIN Multiple keys request during rehashing of slot"},
           {ErrorCode::kUnavailable, "MASTERDOWN Link with MASTER is down"},
           {ErrorCode::kUnavailable, "CLUSTERDOWN The cluster is down"},
           {ErrorCode::kUnavailable, "ERR max number of clients reached"},
           {ErrorCode::kNotSupported, "MOVED 3999 127.0.0.1:6381"},
           {ErrorCode::kNotSupported, "ASK 3999 127.0.0.1:6381"},
           {ErrorCode::kNotSupported, "CROSSSLOT Keys in request don't hash to the same slot"},
           {ErrorCode::kNotSupported, "ERR unknown command 'GETRANGE'"},
           {ErrorCode::kNotSupported, "NOPROTO unsupported protocol version"},
           {ErrorCode::kNotSupported, "LOADINGX not the word"},
           {ErrorCode::kNotSupported, ""},
           {ErrorCode::kFormat, "WRONGTYPE Operation against a key holding the wrong kind of value"},
       }) {
    CAPTURE(expected.text);
    const Status status = status_of_error(expected.text, "redis://host key 'k'");
    CHECK_FALSE(status.ok());
    CHECK(status.code() == expected.code);
    CHECK(status.message().find("redis://host key 'k'") != std::string::npos);
    CHECK(status.message().find(expected.text.substr(0, 40)) != std::string::npos);
  }
}

TEST_CASE("the arguments that a server repeats in its error are not shown: one of them may be a password") {
  for (const std::string& said :
       {"ERR unknown command `AUTH`, with args beginning with: `hunter2`, "s,
        "ERR unknown command 'AUTH', with args beginning with: 'user' 'hunter2' "s}) {
    const std::string message = status_of_error(said, "AUTH").message();
    CHECK(message.find("hunter2") == std::string::npos);
    CHECK(message.find("hunt") == std::string::npos);
    CHECK(message.find("ERR unknown command") != std::string::npos);
  }
}

TEST_CASE("a command is an array of bulk strings, appended") {
  std::string out = "before";
  append_command(out, {"GET", "a\r\nb", ""});
  CHECK(out == "before*3\r\n$3\r\nGET\r\n$4\r\na\r\nb\r\n$0\r\n\r\n");
}

}  // namespace
}  // namespace rdmaload::resp
