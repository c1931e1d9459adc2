// transport/http/url.h
#include <doctest/doctest.h>

#include "core/error.h"
#include "transport/http/url.h"

namespace rdmaload::http {
namespace {

std::string refusal(std::string_view text) {
  try {
    parse_url(text);
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kInvalid);
    return error.what();
  }
  return "accepted";
}

TEST_CASE("a url is taken apart into what a request needs") {
  const Url url = parse_url("HTTPS://Example.COM:8443/a%20b/c?X-Amz-Signature=s#fragment");
  CHECK(url.tls);
  CHECK(url.host == "example.com");
  CHECK(url.port == 8443);
  CHECK(url.target == "/a%20b/c?X-Amz-Signature=s");
  CHECK(url.authority() == "example.com:8443");
  CHECK(parse_url("http://h").target == "/");
  CHECK(parse_url("http://h?q=1").target == "/?q=1");
  CHECK(parse_url("http://h:80/").authority() == "h");
  CHECK(parse_url("https://h").port == 443);
  CHECK(parse_url("http://[::1]:8080/x").host == "::1");
  CHECK(parse_url("http://[::1]:8080/x").authority() == "[::1]:8080");
}

TEST_CASE("what is shown of a url has no query") {
  CHECK(parse_url("https://h/a?X-Amz-Signature=SECRET").shown() == "https://h/a");
  CHECK(parse_url("https://h?SECRET").shown() == "https://h/");
  for (const char* text :
       {"https://h:0/a?SECRET", "https://SECRET@h/a", "ftp://h/a?SECRET", "http://h/a b?SECRET",
        "http://h:x/?SECRET", "http://[::1/?SECRET", "http://[::1]x/?SECRET"}) {
    CAPTURE(text);
    CHECK(refusal(text) != "accepted");
    CHECK(refusal(text).find("SECRET") == std::string::npos);
  }
}

TEST_CASE("what is no http url, or would break a request line, is refused") {
  for (const char* text :
       {"", "h/a", "://h", "http://", "http:///a", "ftp://h/", "http://h:65536/", "http://h:-1/",
        "http://h/a\r\nX: y", "http://h/\x7f", "http://h/\xc3\xa4", "http://h\t/", "http://u:p@h/"}) {
    CAPTURE(text);
    CHECK(refusal(text) != "accepted");
  }
}

TEST_CASE("a Location is an absolute url, or relative to what was asked") {
  const Url base = parse_url("http://h:81/dir/file?q");
  const auto shown = [&](std::string_view location) { return resolve_location(base, location).shown(); };
  CHECK(shown("https://other/x?y") == "https://other/x");
  CHECK(shown("//other/x") == "http://other/x");
  CHECK(shown("/x") == "http://h:81/x");
  CHECK(shown("x") == "http://h:81/dir/x");
  CHECK(shown("/x?next=http://evil/") == "http://h:81/x");
  CHECK(shown("x?next=http://evil/") == "http://h:81/dir/x");
  CHECK(resolve_location(base, "/x").same_server(base));
  CHECK(resolve_location(base, "/a b\xc3\xa9%20c?q=\xc3\xa9").target == "/a%20b%C3%A9%20c?q=%C3%A9");
  CHECK_FALSE(resolve_location(base, "https://h:81/x").same_server(base));
  CHECK_THROWS_AS(resolve_location(base, "ftp://h/x"), Error);
}

}  // namespace
}  // namespace rdmaload::http
