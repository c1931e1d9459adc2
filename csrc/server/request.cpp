#include "server/request.h"

#include <algorithm>
#include <cassert>
#include <charconv>
#include <optional>

namespace rdmaload::server {
namespace {

constexpr size_t kMaxHeaderLine = 32;        // a type byte and a 64-bit number
constexpr size_t kMaxInlineLine = 64 << 10;  // Redis' own bound
constexpr size_t kKeptCapacity = 64 << 10;   // what a connection may keep of a request that is done

std::optional<int64_t> number_of(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text.empty()) return std::nullopt;
  return value;
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

bool is_space(char c) { return c == ' ' || c == '\t'; }

}  // namespace

RequestParser::Event RequestParser::next(std::string_view& bytes) {
  if (done_) reset();
  while (true) {
    switch (state_) {
      case State::kFailed:
        return Event::kError;
      case State::kStart: {
        if (bytes.empty() && line_.empty()) return Event::kMore;
        const char first = line_.empty() ? bytes.front() : line_.front();
        const bool array = first == '*';
        if (!take_line(bytes, array ? kMaxHeaderLine : std::min(kMaxInlineLine, limits_.bytes))) {
          return state_ == State::kFailed ? Event::kError : Event::kMore;
        }
        const Event event = array ? begin_array() : inline_request();
        if (event != Event::kMore) return event;
        line_.clear();
        break;
      }
      case State::kLength: {
        if (!take_line(bytes, kMaxHeaderLine)) {
          return state_ == State::kFailed ? Event::kError : Event::kMore;
        }
        const Event event = begin_argument();
        line_.clear();
        if (event != Event::kMore) return event;
        break;
      }
      case State::kBody: {
        const auto part = bytes.substr(0, static_cast<size_t>(std::min<uint64_t>(body_left_, bytes.size())));
        text_.append(part);
        bytes.remove_prefix(part.size());
        body_left_ -= part.size();
        if (body_left_ > 0) return Event::kMore;
        ends_.push_back(text_.size());
        state_ = State::kBodyEnd;
        break;
      }
      case State::kLarge:
        return Event::kLargeArgument;
      case State::kBodyEnd: {
        const auto part = bytes.substr(0, 2 - line_.size());
        line_.append(part);
        bytes.remove_prefix(part.size());
        if (line_ != std::string_view("\r\n").substr(0, line_.size())) {
          return fail("Protocol error: an argument does not end where its length says");
        }
        if (line_.size() < 2) return Event::kMore;
        line_.clear();
        if (--arguments_left_ == 0) return complete();
        state_ = State::kLength;
        break;
      }
    }
  }
}

std::string_view RequestParser::argument_so_far(size_t index) const {
  assert(index < ends_.size());
  const size_t begin = index == 0 ? 0 : ends_[index - 1];
  return std::string_view(text_).substr(begin, ends_[index] - begin);
}

void RequestParser::large_argument_taken() {
  assert(state_ == State::kLarge);
  body_left_ = 0;
  ends_.push_back(text_.size());
  state_ = State::kBodyEnd;
}

bool RequestParser::take_line(std::string_view& bytes, size_t max_bytes) {
  const size_t end = bytes.find('\n');
  const auto part = bytes.substr(0, end == std::string_view::npos ? bytes.size() : end + 1);
  if (part.size() > max_bytes - std::min(max_bytes, line_.size())) {
    fail("Protocol error: too long a line");
    return false;
  }
  line_.append(part);
  bytes.remove_prefix(part.size());
  if (end == std::string_view::npos) return false;
  line_.pop_back();
  if (!line_.empty() && line_.back() == '\r') line_.pop_back();
  return true;
}

RequestParser::Event RequestParser::fail(std::string message) {
  reset();
  state_ = State::kFailed;
  error_ = std::move(message);
  return Event::kError;
}

RequestParser::Event RequestParser::begin_array() {
  const auto count = number_of(std::string_view(line_).substr(1));
  if (!count || (*count > 0 && static_cast<uint64_t>(*count) > limits_.arguments)) {
    return fail("Protocol error: invalid multibulk length");
  }
  if (*count <= 0) return Event::kMore;  // Redis ignores these, too
  arguments_left_ = static_cast<uint64_t>(*count);
  state_ = State::kLength;
  return Event::kMore;
}

RequestParser::Event RequestParser::begin_argument() {
  if (line_.empty() || line_.front() != '$') return fail("Protocol error: expected '$'");
  const auto length = number_of(std::string_view(line_).substr(1));
  if (!length || *length < 0 || static_cast<uint64_t>(*length) > kMaxArgumentBytes) {
    return fail("Protocol error: invalid bulk length");
  }
  body_left_ = static_cast<uint64_t>(*length);
  if (body_left_ > kSmallArgumentBytes) {
    state_ = State::kLarge;
    return Event::kLargeArgument;
  }
  if (body_left_ > limits_.bytes - std::min(limits_.bytes, text_.size())) {
    return fail("Protocol error: too big a request");
  }
  state_ = State::kBody;
  return Event::kMore;
}

RequestParser::Event RequestParser::inline_request() {
  if (!split_inline(line_)) return fail("Protocol error: unbalanced quotes or too many words in request");
  if (ends_.empty()) return Event::kMore;  // an empty line
  line_.clear();
  return complete();
}

// Words, with "double quotes" that know escapes and 'single quotes' that do not.
bool RequestParser::split_inline(std::string_view text) {
  size_t at = 0;
  std::string word;
  while (true) {
    while (at < text.size() && is_space(text[at])) ++at;
    if (at == text.size()) return true;
    word.clear();
    const char quote = text[at] == '"' || text[at] == '\'' ? text[at] : '\0';
    if (quote != '\0') ++at;
    bool closed = quote == '\0';
    for (; at < text.size(); ++at) {
      const char c = text[at];
      if (quote == '\0' && is_space(c)) break;
      if (quote != '\0' && c == quote) {
        closed = true;
        ++at;
        break;
      }
      if (quote == '"' && c == '\\' && at + 1 < text.size()) {
        const char next = text[++at];
        if (next == 'x' && at + 2 < text.size() && hex_digit(text[at + 1]) >= 0 &&
            hex_digit(text[at + 2]) >= 0) {
          word.push_back(static_cast<char>(hex_digit(text[at + 1]) * 16 + hex_digit(text[at + 2])));
          at += 2;
        } else {
          word.push_back(next == 'n' ? '\n' : next == 'r' ? '\r' : next == 't' ? '\t' : next);
        }
        continue;
      }
      word.push_back(c);
    }
    if (!closed || (at < text.size() && !is_space(text[at])) || !add_inline(word)) return false;
  }
}

bool RequestParser::add_inline(std::string_view word) {
  if (ends_.size() == limits_.arguments || word.size() > kSmallArgumentBytes) return false;
  text_.append(word);
  ends_.push_back(text_.size());
  return true;
}

RequestParser::Event RequestParser::complete() {
  arguments_.clear();
  for (size_t i = 0; i < ends_.size(); ++i) arguments_.push_back(argument_so_far(i));
  state_ = State::kStart;
  done_ = true;
  return Event::kRequest;
}

void RequestParser::reset() noexcept {
  done_ = false;
  state_ = State::kStart;
  arguments_left_ = 0;
  body_left_ = 0;
  line_.clear();
  if (text_.capacity() + line_.capacity() > kKeptCapacity) {
    std::string().swap(text_);
    std::string().swap(line_);
  }
  if (ends_.capacity() * sizeof(size_t) > kKeptCapacity) {
    std::vector<size_t>().swap(ends_);
    std::vector<std::string_view>().swap(arguments_);
  }
  text_.clear();
  ends_.clear();
  arguments_.clear();
}

}  // namespace rdmaload::server
