#include "loader/json.h"

#include <array>
#include <cassert>
#include <limits>

#include "core/error.h"

namespace rdmaload {
namespace {

// Bytes of a string that need no further look: ASCII except controls, quote and backslash.
constexpr auto kIsPlain = [] {
  std::array<bool, 256> plain{};
  for (size_t c = 0x20; c < 0x80; ++c) plain[c] = c != '"' && c != '\\';
  return plain;
}();

constexpr uint8_t byte_of(char c) noexcept { return static_cast<uint8_t>(c); }
constexpr bool is_digit(char c) noexcept { return c >= '0' && c <= '9'; }
constexpr bool is_high_surrogate(uint32_t unit) noexcept { return unit >= 0xd800 && unit < 0xdc00; }
constexpr bool is_low_surrogate(uint32_t unit) noexcept { return unit >= 0xdc00 && unit < 0xe000; }

void append_utf8(std::string& out, uint32_t code_point) {
  const auto continuation = [&](int shift) { return static_cast<char>(0x80 | (code_point >> shift & 0x3f)); };
  if (code_point < 0x80) {
    out += static_cast<char>(code_point);
  } else if (code_point < 0x800) {
    out += {static_cast<char>(0xc0 | code_point >> 6), continuation(0)};
  } else if (code_point < 0x10000) {
    out += {static_cast<char>(0xe0 | code_point >> 12), continuation(6), continuation(0)};
  } else {
    out += {static_cast<char>(0xf0 | code_point >> 18), continuation(12), continuation(6), continuation(0)};
  }
}

// What may follow the first byte of a UTF-8 sequence (RFC 3629, section 4): the range of the second byte is
// narrower where it would otherwise spell an overlong form, a surrogate, or more than U+10FFFF.
struct Utf8Sequence {
  size_t bytes;  // 0: not a first byte
  uint8_t second_min = 0x80;
  uint8_t second_max = 0xbf;
};
constexpr Utf8Sequence utf8_sequence(uint8_t first) noexcept {
  if (first >= 0xc2 && first <= 0xdf) return {2};
  if (first == 0xe0) return {3, 0xa0, 0xbf};
  if (first == 0xed) return {3, 0x80, 0x9f};
  if (first >= 0xe1 && first <= 0xef) return {3};
  if (first == 0xf0) return {4, 0x90, 0xbf};
  if (first >= 0xf1 && first <= 0xf3) return {4};
  if (first == 0xf4) return {4, 0x80, 0x8f};
  return {0};
}

}  // namespace

void JsonReader::fail_at(size_t offset, const std::string& what) {
  throw Error(ErrorCode::kFormat, "byte " + std::to_string(offset) + ": " + what);
}

void JsonReader::skip_space() noexcept {
  while (!at_end() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
    ++at_;
}

JsonReader::Kind JsonReader::peek() {
  skip_space();
  if (at_end()) fail("the text ends where a value is expected");
  switch (text_[at_]) {
    case '{':
      return Kind::kObject;
    case '[':
      return Kind::kArray;
    case '"':
      return Kind::kString;
    case 't':
    case 'f':
      return Kind::kBool;
    case 'n':
      return Kind::kNull;
    default:
      if (text_[at_] == '-' || is_digit(text_[at_])) return Kind::kNumber;
      fail("expected a value");
  }
}

void JsonReader::expect(Kind kind, const char* what) {
  if (peek() != kind) fail(std::string("expected ") + what);
}

void JsonReader::read_string(std::string& value) {
  expect(Kind::kString, "a string");
  take_string(value);
}

uint64_t JsonReader::read_unsigned() {
  expect(Kind::kNumber, "an integer");
  const size_t begin = at_;
  take_number();
  uint64_t value = 0;
  for (const char c : text_.substr(begin, at_ - begin)) {
    constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
    if (!is_digit(c)) fail_at(begin, "expected an integer without sign, fraction or exponent");
    const auto digit = static_cast<uint64_t>(c - '0');
    if (value > (kMax - digit) / 10) fail_at(begin, "the integer does not fit 64 bits");
    value = 10 * value + digit;
  }
  return value;
}

void JsonReader::read_null() {
  expect(Kind::kNull, "null");
  take_word("null");
}

void JsonReader::skip_value() {
  const size_t outside = depth_;
  do {
    switch (peek()) {
      case Kind::kObject:
        begin_object();
        break;
      case Kind::kArray:
        begin_array();
        break;
      case Kind::kString:
        take_string(skipped_);
        break;
      case Kind::kNumber:
        take_number();
        break;
      case Kind::kBool:
        take_word(text_[at_] == 't' ? "true" : "false");
        break;
      case Kind::kNull:
        take_word("null");
        break;
    }
    // To the next value, closing what ends here.
    while (depth_ > outside && !(is_object_[depth_ - 1] ? next_member(skipped_) : next_element())) {
    }
  } while (depth_ > outside);
}

void JsonReader::begin_object() {
  expect(Kind::kObject, "an object");
  open(true);
}

void JsonReader::begin_array() {
  expect(Kind::kArray, "an array");
  open(false);
}

void JsonReader::open(bool is_object) {
  if (depth_ == kMaxDepth) fail("nested more than " + std::to_string(kMaxDepth) + " deep");
  is_object_[depth_] = is_object;
  has_items_[depth_] = false;
  ++depth_;
  ++at_;
}

// Moves to the next item, or past the end of the innermost container.
bool JsonReader::next_in_container(char closing, const char* what) {
  skip_space();
  if (next_is(closing)) {
    ++at_;
    --depth_;
    return false;
  }
  if (has_items_[depth_ - 1]) {
    if (!next_is(',')) fail(what);
    ++at_;
    skip_space();
  }
  has_items_[depth_ - 1] = true;
  return true;
}

bool JsonReader::next_member(std::string& name) {
  assert(depth_ > 0 && is_object_[depth_ - 1]);
  if (!next_in_container('}', "expected ',' or '}'")) return false;
  if (!next_is('"')) fail("expected a name in quotes");
  take_string(name);
  skip_space();
  if (!next_is(':')) fail("expected ':'");
  ++at_;
  return true;
}

bool JsonReader::next_element() {
  assert(depth_ > 0 && !is_object_[depth_ - 1]);
  return next_in_container(']', "expected ',' or ']'");
}

void JsonReader::finish() {
  assert(depth_ == 0);
  skip_space();
  if (!at_end()) fail("unexpected text after the end");
}

void JsonReader::take_string(std::string& value) {
  const size_t opening = at_++;
  value.clear();
  for (;;) {
    const size_t run = at_;
    while (!at_end() && kIsPlain[byte_of(text_[at_])]) ++at_;
    value.append(text_.substr(run, at_ - run));
    if (at_end()) fail_at(opening, "the string is not closed");
    const char c = text_[at_];
    if (c == '"') {
      ++at_;
      return;
    }
    if (c == '\\') {
      take_escape(value);
    } else if (byte_of(c) < 0x20) {
      fail("a control character in a string must be escaped");
    } else {
      take_utf8(value);
    }
  }
}

void JsonReader::take_escape(std::string& value) {
  const size_t begin = at_++;
  const char c = at_end() ? '\0' : text_[at_++];
  switch (c) {
    case '"':
    case '\\':
    case '/':
      value += c;
      return;
    case 'b':
      value += '\b';
      return;
    case 'f':
      value += '\f';
      return;
    case 'n':
      value += '\n';
      return;
    case 'r':
      value += '\r';
      return;
    case 't':
      value += '\t';
      return;
    case 'u':
      break;
    default:
      fail_at(begin, "unknown escape in a string");
  }
  uint32_t code_point = take_hex4();
  if (is_low_surrogate(code_point)) fail_at(begin, "a low surrogate without a high one before it");
  if (is_high_surrogate(code_point)) {
    const bool escaped = next_is('\\') && text_.substr(at_, 2) == "\\u";
    if (escaped) at_ += 2;
    const uint32_t low = escaped ? take_hex4() : 0;
    if (!is_low_surrogate(low)) fail_at(begin, "a high surrogate without a low one after it");
    code_point = 0x10000 + ((code_point - 0xd800) << 10) + (low - 0xdc00);
  }
  append_utf8(value, code_point);
}

uint32_t JsonReader::take_hex4() {
  uint32_t unit = 0;
  for (int i = 0; i < 4; ++i) {
    const char c = at_end() ? '\0' : text_[at_];
    uint32_t digit;
    if (is_digit(c)) {
      digit = static_cast<uint32_t>(c - '0');
    } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
      digit = static_cast<uint32_t>((c | 0x20) - 'a') + 10;
    } else {
      fail("expected four hexadecimal digits after \\u");
    }
    unit = unit << 4 | digit;
    ++at_;
  }
  return unit;
}

void JsonReader::take_utf8(std::string& value) {
  const Utf8Sequence sequence = utf8_sequence(byte_of(text_[at_]));
  const std::string_view bytes = text_.substr(at_, sequence.bytes);
  bool valid = sequence.bytes != 0 && bytes.size() == sequence.bytes &&
               byte_of(bytes[1]) >= sequence.second_min && byte_of(bytes[1]) <= sequence.second_max;
  for (size_t i = 2; valid && i < bytes.size(); ++i) valid = (byte_of(bytes[i]) & 0xc0) == 0x80;
  if (!valid) fail("invalid UTF-8");
  value.append(bytes);
  at_ += bytes.size();
}

void JsonReader::take_number() {
  if (next_is('-')) ++at_;
  const bool leading_zero = next_is('0');
  const size_t begin = at_;
  take_digits();
  if (leading_zero && at_ - begin > 1) fail_at(begin, "a number may not begin with a zero");
  if (next_is('.')) {
    ++at_;
    take_digits();
  }
  if (next_is('e') || next_is('E')) {
    ++at_;
    if (next_is('+') || next_is('-')) ++at_;
    take_digits();
  }
}

void JsonReader::take_digits() {
  const size_t begin = at_;
  while (!at_end() && is_digit(text_[at_])) ++at_;
  if (at_ == begin) fail("expected a digit");
}

void JsonReader::take_word(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) fail("expected a value");
  at_ += word.size();
}

}  // namespace rdmaload
