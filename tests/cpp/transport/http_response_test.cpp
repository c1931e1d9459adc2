// transport/http/response.h
#include <doctest/doctest.h>

#include <random>

#include "core/error.h"
#include "transport/http/response.h"

namespace rdmaload::http {
namespace {

ResponseHead whole(const std::string& text) {
  const auto head = parse_head(text);
  REQUIRE(head.has_value());
  return *head;
}

std::string head_with(const std::string& header) {
  return "HTTP/1.1 206 Partial Content\r\n" + header + "\r\n\r\n";
}

bool refused(const std::string& text) {
  try {
    parse_head(text);
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kFormat);
    return true;
  }
  return false;
}

TEST_CASE("a head is parsed only when all of it is there, wherever it was split") {
  const std::string text =
      "HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\ncontent-range: bytes 5-14/100\r\nETag: "
      "\"abc\"\r\n"
      "Connection: keep-alive\r\nX-Whatever:\r\n\r\n";
  for (size_t size = 0; size < text.size(); ++size) CHECK_FALSE(parse_head(text.substr(0, size)).has_value());
  for (const std::string& rest : {std::string(), std::string("body\r\n\r\n")}) {
    const ResponseHead head = whole(text + rest);
    CHECK(head.status == 206);
    CHECK(head.consumed == text.size());
    CHECK(head.keep_alive);
    CHECK_FALSE(head.chunked);
    CHECK(head.content_length == 10);
    REQUIRE(head.content_range.has_value());
    CHECK(head.content_range->satisfied);
    CHECK(head.content_range->first == 5);
    CHECK(head.content_range->last == 14);
    CHECK(head.content_range->total == 100);
    CHECK(head.etag == "\"abc\"");
  }
}

TEST_CASE("headers mean what they mean in any case and with any blanks around the value") {
  CHECK(whole(head_with("CONTENT-LENGTH:  7 \t")).content_length == 7);
  CHECK(whole(head_with("Transfer-Encoding: Chunked")).chunked);
  CHECK_FALSE(whole(head_with("Connection: x, Close")).keep_alive);
  CHECK(whole(head_with("Retry-After: 3")).retry_after_seconds == 3);
  const auto dated = whole(head_with("Retry-After: Sun, 06 Nov 1994 08:49:37 GMT"));
  CHECK_FALSE(dated.retry_after_seconds.has_value());
  REQUIRE(dated.retry_after_date.has_value());
  CHECK(dated.retry_after_date->time_since_epoch().count() == 784111777);
  for (const char* text : {"Sun, 06 Nov 1994 24:49:37 GMT", "Sun, 31 Feb 1994 08:49:37 GMT", "soon",
                           "Sun, 06 anF 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:37 CET"}) {
    CHECK_FALSE(whole(head_with("Retry-After: " + std::string(text))).retry_after_date.has_value());
  }
  CHECK(whole(head_with("Location: /x?y=1:2")).location == "/x?y=1:2");
  CHECK(whole(head_with("Content-Encoding: gzip")).content_encoding == "gzip");
  CHECK(whole("HTTP/1.1 200\r\n\r\n").status == 200);
  CHECK_FALSE(whole("HTTP/1.0 200 OK\r\n\r\n").keep_alive);
  CHECK(whole("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\n").keep_alive);
  CHECK(whole(head_with("Content-Length: 7\r\nContent-Length: 7")).content_length == 7);
}

TEST_CASE("a Content-Range is exact or refused") {
  const auto range = [](const std::string& value) {
    return *whole(head_with("Content-Range: " + value)).content_range;
  };
  CHECK_FALSE(range("bytes 0-0/*").total.has_value());
  CHECK(range("bytes 0-0/*").satisfied);
  CHECK_FALSE(range("bytes */12").satisfied);
  CHECK(range("bytes */12").total == 12);
  for (const char* value :
       {"", "bytes", "bytes 0-0", "bytes 1-0/5", "bytes 0-5/5", "bytes -5/10", "bytes 0-/10", "bytes 0-1/x",
        "items 0-1/2", "bytes 0x0-1/2", "bytes 0-99999999999999999999/*", "bytes 0-1/2, bytes 3-4/5"}) {
    CAPTURE(value);
    CHECK(refused(head_with(std::string("Content-Range: ") + value)));
  }
}

TEST_CASE("what is not a response, or could be read in two ways, is refused") {
  for (const char* text :
       {"HTTP/2 200 OK\r\n\r\n", "SSH-2.0-OpenSSH", "HTTP/1.1 20 OK\r\n\r\n", "HTTP/1.2 200 OK\r\n\r\n",
        "HTTP/1.1 099 OK\r\n\r\n", "HTTP/1.1  200\r\n\r\n", "HTTP/1.1 2000 OK\r\n\r\n", "x"}) {
    CAPTURE(text);
    CHECK(refused(text));
  }
  for (const char* header :
       {"no colon", ": no name", "Content-Length : 5", "Content-Length: -5", "Content-Length: 5x",
        "Content-Length:", "Content-Length: 99999999999999999999", "Content-Length: 5\r\nContent-Length: 6",
        "Transfer-Encoding: gzip", "Transfer-Encoding: chunked\r\nContent-Length: 5", "A: b\r\n folded: line",
        "A: b\nc: d", "A: b\rc"}) {
    CAPTURE(header);
    CHECK(refused(head_with(header)));
  }
  CHECK(refused(head_with(std::string("A: \0", 4))));
}

TEST_CASE("a head longer than the bound is refused, however it comes") {
  const std::string start = "HTTP/1.1 200 OK\r\nA: ";
  CHECK_FALSE(parse_head(start + std::string(kMaxHeadBytes - start.size() - 1, 'a')).has_value());
  CHECK(refused(start + std::string(kMaxHeadBytes, 'a')));
  CHECK(refused(start + std::string(kMaxHeadBytes, 'a') + "\r\n\r\n"));
}

TEST_CASE("ETags of one content are the same, weak or strong") {
  CHECK(same_etag("\"a\"", "\"a\""));
  CHECK(same_etag("W/\"a\"", "\"a\""));
  CHECK_FALSE(same_etag("\"a\"", "\"b\""));
  CHECK_FALSE(same_etag("\"a\"", ""));
}

TEST_CASE("an error document gives its code and message, fit for a terminal, and nothing else") {
  const auto document = parse_error_document(
      "<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>Please\nreduce</Message>"
      "<StringToSign>SECRET</StringToSign></Error>");
  CHECK(document.code == "SlowDown");
  CHECK(document.message == "Please?reduce");
  CHECK(parse_error_document("<html>no</html>").code.empty());
  CHECK(parse_error_document("<Code>never closed").code.empty());
  CHECK(parse_error_document("<Message>" + std::string(100000, 'm') + "</Message>").message.size() <= 300);
}

// The payload of a chunked body that comes in pieces of `step` bytes; `rest` is what follows the body.
std::string payload_of(const std::string& body, size_t step, std::string* rest = nullptr) {
  ChunkedBody chunked;
  std::string pending, payload;
  size_t at = 0;
  for (;;) {
    pending.erase(0, chunked.take_framing(pending));
    const auto size = std::min<size_t>(chunked.payload(), pending.size());
    payload += pending.substr(0, size);
    pending.erase(0, size);
    chunked.payload_received(size);
    if (chunked.done()) break;
    if (size > 0) continue;
    if (at == body.size()) return payload + " (unfinished)";
    pending += body.substr(at, step);
    at = std::min(body.size(), at + step);
  }
  if (rest != nullptr) *rest = pending + body.substr(at);
  return payload;
}

TEST_CASE("a chunked body gives its payload, wherever it was split") {
  const std::string body =
      "5\r\nhello\r\n1;name=value\r\n,\r\n00A\r\n chunked !\r\n0\r\nTrailer: x\r\n\r\nHTTP/1.1";
  for (size_t step = 1; step <= body.size(); ++step) {
    std::string rest;
    CHECK(payload_of(body, step, &rest) == "hello, chunked !");
    CHECK(rest == "HTTP/1.1");
  }
  CHECK(payload_of("0\r\n\r\n", 1) == "");
  CHECK(payload_of("5\r\nhel", 3) == "hel (unfinished)");
}

TEST_CASE("a broken or endless chunked body is refused") {
  for (const char* body :
       {"x\r\n", "\r\n", "-1\r\n", "5\nhello", "2\r\nabc\r\n", "0x5\r\n", "11111111111111111\r\n"}) {
    CAPTURE(body);
    CHECK_THROWS_AS(payload_of(body, 100), Error);
  }
  CHECK_THROWS_AS(payload_of("5;" + std::string(kMaxChunkLineBytes, 'e') + "\r\n", 100), Error);
  std::string trailers = "0\r\n";
  while (trailers.size() < 2 * kMaxTrailerBytes) trailers += "Name: " + std::string(1000, 'v') + "\r\n";
  CHECK_THROWS_AS(payload_of(trailers + "\r\n", 1000), Error);
}

TEST_CASE("random bytes are refused or wait for more, and never crash") {
  std::mt19937_64 random(21);
  const std::string seed =
      head_with("Content-Length: 5\r\nContent-Range: bytes 0-4/5\r\nTransfer-Encoding: chunked");
  for (int round = 0; round < 20000; ++round) {
    std::string text = seed;
    for (int change = 0; change < 3; ++change) text[random() % text.size()] = static_cast<char>(random());
    try {
      parse_head(text);
      ChunkedBody chunked;
      chunked.take_framing(text.substr(random() % text.size()));
    } catch (const Error& error) {
      REQUIRE(error.code() == ErrorCode::kFormat);
    }
  }
}

}  // namespace
}  // namespace rdmaload::http
