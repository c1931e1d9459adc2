#include "loader/json.h"

#include <doctest/doctest.h>

#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"

using namespace std::string_literals;
using namespace std::string_view_literals;

namespace rdmaload {
namespace {

// "" when the text is one valid value, else the message.
std::string problem_with(std::string_view text) {
  try {
    JsonReader reader(text);
    reader.skip_value();
    reader.finish();
    return "";
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kFormat);
    return error.what();
  }
}

std::string string_of(std::string_view text) {
  JsonReader reader(text);
  std::string value = "left over";
  reader.read_string(value);
  reader.finish();
  return value;
}

uint64_t unsigned_of(std::string_view text) {
  JsonReader reader(text);
  const uint64_t value = reader.read_unsigned();
  reader.finish();
  return value;
}

std::string in_quotes(std::string_view bytes) {
  std::string text = "\"";
  text += bytes;
  text += '"';
  return text;
}

std::string problem_with_string(std::string_view bytes) { return problem_with(in_quotes(bytes)); }

}  // namespace

TEST_CASE("a document is walked in order") {
  JsonReader reader(R"( { "a" : [ 1 , 22 ] , "b":{}, "c" : null, "d":"x" } )");
  std::string name;
  std::string text;
  CHECK(reader.peek() == JsonReader::Kind::kObject);
  reader.begin_object();
  REQUIRE(reader.next_member(name));
  CHECK(name == "a");
  reader.begin_array();
  REQUIRE(reader.next_element());
  CHECK(reader.read_unsigned() == 1);
  REQUIRE(reader.next_element());
  CHECK(reader.read_unsigned() == 22);
  CHECK_FALSE(reader.next_element());
  REQUIRE(reader.next_member(name));
  CHECK(name == "b");
  reader.begin_object();
  CHECK_FALSE(reader.next_member(text));
  REQUIRE(reader.next_member(name));
  CHECK(name == "c");
  CHECK(reader.peek() == JsonReader::Kind::kNull);
  reader.read_null();
  REQUIRE(reader.next_member(name));
  CHECK(name == "d");
  reader.read_string(text);
  CHECK(text == "x");
  CHECK_FALSE(reader.next_member(name));
  reader.finish();
}

TEST_CASE("a skipped value leaves the reader behind it") {
  JsonReader reader(R"({"a":{"b":[1,{"c":[]},"]"],"d":-1.5e-3},"e":7})");
  std::string name;
  reader.begin_object();
  REQUIRE(reader.next_member(name));
  reader.skip_value();
  REQUIRE(reader.next_member(name));
  CHECK(name == "e");
  CHECK(reader.read_unsigned() == 7);
  CHECK_FALSE(reader.next_member(name));
  reader.finish();
}

TEST_CASE("an object may repeat a name: that is for the caller to judge") {
  CHECK(problem_with(R"({"a":1,"a":2})") == "");
}

TEST_CASE("valid documents are accepted") {
  for (const std::string_view text :
       {"null"sv, "true"sv, "false"sv, "0"sv, "-0"sv, "-12"sv, "1.5"sv, "0.25"sv, "1e5"sv, "1E+5"sv,
        "1.5e-10"sv, "1e99999"sv, "\"\""sv, "[]"sv, "{}"sv, "[[],{}]"sv, "[1,2,3]"sv, "\t\r\n [ ] \t\r\n "sv,
        R"({"":{"":""}})"sv}) {
    CAPTURE(text);
    CHECK(problem_with(text) == "");
  }
}

TEST_CASE("broken documents are refused with the offset at which they break") {
  struct Case {
    std::string_view text;
    std::string_view message;
  };
  for (const Case& broken : {
           Case{"", "byte 0: the text ends where a value is expected"},
           Case{"  ", "byte 2: the text ends where a value is expected"},
           Case{"[1,2", "byte 4: expected ',' or ']'"},
           Case{"[1,]", "byte 3: expected a value"},
           Case{"[,1]", "byte 1: expected a value"},
           Case{"[1 2]", "byte 3: expected ',' or ']'"},
           Case{"[1}", "byte 2: expected ',' or ']'"},
           Case{"{\"a\":1", "byte 6: expected ',' or '}'"},
           Case{"{\"a\":1,}", "byte 7: expected a name in quotes"},
           Case{"{,}", "byte 1: expected a name in quotes"},
           Case{"{\"a\" 1}", "byte 5: expected ':'"},
           Case{"{\"a\":}", "byte 5: expected a value"},
           Case{"{a:1}", "byte 1: expected a name in quotes"},
           Case{"{'a':1}", "byte 1: expected a name in quotes"},
           Case{"{1:1}", "byte 1: expected a name in quotes"},
           Case{"{\"a\":1]", "byte 6: expected ',' or '}'"},
           Case{"{} {}", "byte 3: unexpected text after the end"},
           Case{"1 1", "byte 2: unexpected text after the end"},
           Case{"nul", "byte 0: expected a value"},
           Case{"nulL", "byte 0: expected a value"},
           Case{"truefalse", "byte 4: unexpected text after the end"},
           Case{"True", "byte 0: expected a value"},
           Case{"NaN", "byte 0: expected a value"},
           Case{"Infinity", "byte 0: expected a value"},
           Case{"]", "byte 0: expected a value"},
           Case{"// no\n1", "byte 0: expected a value"},
           Case{"\f1", "byte 0: expected a value"},
           Case{"\xef\xbb\xbf{}", "byte 0: expected a value"},
           Case{"\"abc", "byte 0: the string is not closed"},
           Case{"[\"abc\\\"]", "byte 1: the string is not closed"},
       }) {
    CAPTURE(broken.text);
    CHECK(problem_with(broken.text) == broken.message);
  }
  CHECK(problem_with("{}\0"sv) == "byte 2: unexpected text after the end");
}

TEST_CASE("broken numbers are refused") {
  for (const std::string_view text : {"-", "+1", "01", "-01", "00", "1.", ".5", "1.e5", "1e", "1e+", "-e5",
                                      "0x10", "1_0", "--1", "1e5.5"}) {
    CAPTURE(text);
    CHECK(problem_with(text) != "");
  }
}

TEST_CASE("unsigned integers are read up to the last that fits") {
  CHECK(unsigned_of("0") == 0);
  CHECK(unsigned_of(" 42 ") == 42);
  CHECK(unsigned_of("18446744073709551615") == std::numeric_limits<uint64_t>::max());
}

TEST_CASE("anything but an unsigned 64-bit integer is refused as one") {
  for (const std::string_view text :
       {"18446744073709551616", "18446744073709551620", "28446744073709551615", "99999999999999999999999999",
        "-1", "-0", "1.0", "1e0", "1E2", "01", "\"1\"", "null", "true", "[1]", "{}", "", "NaN"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(unsigned_of(text), Error);
  }
}

TEST_CASE("strings are unescaped") {
  CHECK(string_of(R"("")") == "");
  CHECK(string_of(R"("plain")") == "plain");
  CHECK(string_of(R"("\"\\\/\b\f\n\r\t")") == "\"\\/\b\f\n\r\t");
  CHECK(string_of(R"("a\u0041\u00e9\u20ACz")") == "aA\u00e9\u20acz");
  CHECK(string_of(R"("\ud83d\ude00\uDBFF\uDFFF")") == "\U0001f600\U0010ffff");
  CHECK(string_of(R"("\ud800\udc00\uffff\ud7ff\ue000")") == "\U00010000\uffff\ud7ff\ue000");
  CHECK(string_of(R"("nul\u0000!")") == "nul\0!"s);
  CHECK(string_of("\"\x7f\"") == "\x7f");
}

TEST_CASE("broken escapes are refused") {
  for (const std::string_view bytes :
       {R"(\x)", R"(\')", R"(\U0041)", R"(\u12)", R"(\u123g)", R"(\u+123)", R"(\u 123)", R"(\ud83d)",
        R"(\ud83dx)", R"(\ud83d\n)", R"(\ud83d\u0041)", R"(\ud83d\ud83d)", R"(\ude00)", R"(\udc00\ud800)",
        R"(\ud83d\u12)"}) {
    CAPTURE(bytes);
    CHECK(problem_with_string(bytes) != "");
  }
  // Cut off by the end of the text.
  for (const std::string_view text :
       {R"("\)", R"("\u)", R"("\u00)", R"("\ud83d)", R"("\ud83d\)", R"("\ud83d\u)"}) {
    CAPTURE(text);
    CHECK(problem_with(text) != "");
  }
}

TEST_CASE("control characters in strings must be escaped") {
  for (int c = 0; c < 0x20; ++c) {
    CAPTURE(c);
    CHECK(problem_with_string(std::string(1, static_cast<char>(c))) ==
          "byte 1: a control character in a string must be escaped");
  }
}

TEST_CASE("well-formed UTF-8 passes unchanged") {
  for (const std::string_view bytes :
       {"\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xec\xbf\xbf", "\xed\x9f\xbf", "\xee\x80\x80",
        "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf3\xbf\xbf\xbf", "\xf4\x8f\xbf\xbf"}) {
    CAPTURE(bytes);
    CHECK(string_of(in_quotes(bytes)) == bytes);
  }
}

TEST_CASE("ill-formed UTF-8 is refused") {
  for (const std::string_view bytes : {
           "\x80", "\xbf", "\xfe", "\xff",                              // not a first byte
           "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf",  // overlong
           "\xed\xa0\x80", "\xed\xbf\xbf",                              // surrogates
           "\xf4\x90\x80\x80", "\xf5\x80\x80\x80",                      // beyond U+10FFFF
           "\xc2", "\xe2\x82", "\xf0\x9f\x98", "\xc2g", "\xe2\x82g", "\xf0\x9f\x98g",
           "\xc2\xc2\x80"  // cut short
       }) {
    CAPTURE(bytes);
    CHECK(problem_with_string(bytes) == "byte 1: invalid UTF-8");
  }
  CHECK(problem_with("\"\xf0\x9f") == "byte 1: invalid UTF-8");  // by the end of the text
}

TEST_CASE("nesting is accepted up to the limit and refused beyond it") {
  constexpr size_t kMax = JsonReader::kMaxDepth;
  CHECK(problem_with(std::string(kMax, '[') + std::string(kMax, ']')) == "");
  CHECK(problem_with(std::string(kMax + 1, '[') + std::string(kMax + 1, ']')) ==
        "byte 127: nested more than 127 deep");
  std::string objects;
  for (size_t i = 0; i <= kMax; ++i) objects += "{\"a\":";
  CHECK(problem_with(objects) == "byte 635: nested more than 127 deep");
}

TEST_CASE("ten million brackets neither overflow the stack nor take time") {
  CHECK(problem_with(std::string(10'000'000, '[')) == "byte 127: nested more than 127 deep");
  std::string siblings = "[";
  for (int i = 0; i < 1'000'000; ++i) siblings += "[],";
  CHECK(problem_with(siblings + "[]]") == "");
}

TEST_CASE("every prefix of a document is refused") {
  const std::string text = R"({"a":[1,-2.5e3,true,false,null],"b":{"c":"\u00e9\ud83d\ude00x"}})";
  CHECK(problem_with(text) == "");
  for (size_t size = 0; size < text.size(); ++size) {
    CAPTURE(size);
    // In memory of exactly this size, so that an address sanitizer sees a read beyond the end.
    const std::vector<char> prefix(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(size));
    CHECK(problem_with({prefix.data(), prefix.size()}) != "");
  }
}

}  // namespace rdmaload
