#include "transport/http/response.h"

#include <algorithm>
#include <charconv>

#include "core/error.h"

namespace rdmaload::http {
namespace {

constexpr size_t kMaxShownBytes = 300;  // of a server's words in a message of ours

[[noreturn]] void refuse(const std::string& what) {
  throw Error(ErrorCode::kFormat, "the server's answer is not HTTP/1.1 as we know it: " + what);
}

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }

bool equals_ignoring_case(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](char x, char y) { return lower(x) == lower(y); });
}

std::string_view trimmed(std::string_view text) {
  const auto blank = [](char c) { return c == ' ' || c == '\t'; };
  while (!text.empty() && blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && blank(text.back())) text.remove_suffix(1);
  return text;
}

std::optional<uint64_t> number(std::string_view text, int base = 10) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// "Sun, 06 Nov 1994 08:49:37 GMT", the one form that servers may send today; nullopt for any other text.
std::optional<std::chrono::sys_seconds> parse_date(std::string_view text) {
  constexpr std::string_view kMonths = "JanFebMarAprMayJunJulAugSepOctNovDec";
  constexpr size_t kLength = 29;
  if (text.size() != kLength || text.substr(3, 2) != ", " || !text.ends_with(" GMT")) return std::nullopt;
  const auto month = kMonths.find(text.substr(8, 3));
  const auto day = number(text.substr(5, 2)), year = number(text.substr(12, 4));
  const auto hour = number(text.substr(17, 2)), minute = number(text.substr(20, 2)),
             second = number(text.substr(23, 2));
  if (month == std::string_view::npos || month % 3 != 0 || !day || !year || !hour || !minute || !second) {
    return std::nullopt;
  }
  const std::chrono::year_month_day date{std::chrono::year(static_cast<int>(*year)),
                                         std::chrono::month(static_cast<unsigned>(month / 3 + 1)),
                                         std::chrono::day(static_cast<unsigned>(*day))};
  if (!date.ok() || *hour > 23 || *minute > 59 || *second > 60) return std::nullopt;
  return std::chrono::sys_days(date) + std::chrono::hours(*hour) + std::chrono::minutes(*minute) +
         std::chrono::seconds(*second);
}

// Whether a comma-separated list has this word.
bool has_token(std::string_view list, std::string_view token) {
  while (!list.empty()) {
    const auto comma = std::min(list.find(','), list.size());
    if (equals_ignoring_case(trimmed(list.substr(0, comma)), token)) return true;
    list.remove_prefix(std::min(comma + 1, list.size()));
  }
  return false;
}

ContentRange parse_content_range(std::string_view value) {
  ContentRange range;
  const auto fail = [] { refuse("a Content-Range that is not \"bytes FIRST-LAST/TOTAL\""); };
  if (value.size() < 6 || !equals_ignoring_case(value.substr(0, 6), "bytes ")) fail();
  value = trimmed(value.substr(6));
  const auto slash = value.find('/');
  if (slash == std::string_view::npos) fail();
  const std::string_view total = trimmed(value.substr(slash + 1));
  const std::string_view span = trimmed(value.substr(0, slash));
  if (total != "*") {
    range.total = number(total);
    if (!range.total) fail();
  }
  if (span == "*") return range;
  const auto dash = span.find('-');
  if (dash == std::string_view::npos) fail();
  const auto first = number(span.substr(0, dash)), last = number(span.substr(dash + 1));
  if (!first || !last || *first > *last || (range.total && *last >= *range.total)) fail();
  range.satisfied = true;
  range.first = *first;
  range.last = *last;
  return range;
}

void parse_header(std::string_view line, ResponseHead& head, bool& has_connection) {
  const auto colon = line.find(':');
  if (colon == std::string_view::npos || colon == 0) refuse("a header line without a name");
  const std::string_view name = line.substr(0, colon), value = trimmed(line.substr(colon + 1));
  // Blanks around a name, and lines that continue the one before, are how requests are smuggled.
  if (name.find_first_of(" \t") != std::string_view::npos) refuse("a header name with a blank in it");
  if (equals_ignoring_case(name, "content-length")) {
    const auto length = number(value);
    if (!length) refuse("a Content-Length that is no number");
    if (head.content_length && *head.content_length != *length) refuse("two different Content-Lengths");
    head.content_length = length;
  } else if (equals_ignoring_case(name, "content-range")) {
    head.content_range = parse_content_range(value);
  } else if (equals_ignoring_case(name, "transfer-encoding")) {
    if (!equals_ignoring_case(value, "chunked")) refuse("a Transfer-Encoding other than chunked");
    head.chunked = true;
  } else if (equals_ignoring_case(name, "connection")) {
    has_connection = true;
    if (has_token(value, "close")) head.keep_alive = false;
  } else if (equals_ignoring_case(name, "etag")) {
    head.etag = value;
  } else if (equals_ignoring_case(name, "location")) {
    head.location = value;
  } else if (equals_ignoring_case(name, "content-encoding")) {
    head.content_encoding = value;
  } else if (equals_ignoring_case(name, "retry-after")) {
    const auto seconds = number(value);
    if (seconds) head.retry_after_seconds = static_cast<int>(std::min<uint64_t>(*seconds, 1 << 20));
    if (!seconds) head.retry_after_date = parse_date(value);
  }
}

std::string element_text(std::string_view body, std::string_view name) {
  const std::string open = "<" + std::string(name) + ">", close = "</" + std::string(name) + ">";
  const auto begin = body.find(open);
  if (begin == std::string_view::npos) return {};
  const auto end = body.find(close, begin);
  if (end == std::string_view::npos) return {};
  std::string text(body.substr(begin + open.size(), end - begin - open.size()).substr(0, kMaxShownBytes));
  std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c >= 0x7f; }, '?');
  return text;
}

}  // namespace

std::optional<ResponseHead> parse_head(std::string_view bytes) {
  constexpr std::string_view kStart = "HTTP/1.";
  if (bytes.substr(0, kStart.size()) != kStart.substr(0, bytes.size()))
    refuse("it does not begin with HTTP/1.");
  const auto end = bytes.find("\r\n\r\n");
  if (end == std::string_view::npos) {
    if (bytes.size() >= kMaxHeadBytes)
      refuse("more than " + std::to_string(kMaxHeadBytes) + " bytes of headers");
    return std::nullopt;
  }
  if (end + 4 > kMaxHeadBytes) refuse("more than " + std::to_string(kMaxHeadBytes) + " bytes of headers");
  ResponseHead head;
  head.consumed = end + 4;
  std::string_view lines = bytes.substr(0, end + 2);
  const auto first_end = lines.find("\r\n");
  const std::string_view status_line = lines.substr(0, first_end);
  lines.remove_prefix(first_end + 2);
  // "HTTP/1.1 206 Partial Content"
  const bool shaped = status_line.size() >= 12 && status_line[8] == ' ' &&
                      (status_line[7] == '0' || status_line[7] == '1') &&
                      (status_line.size() == 12 || status_line[12] == ' ');
  const auto status = shaped ? number(status_line.substr(9, 3)) : std::nullopt;
  if (!status || *status < 100 || *status > 599) refuse("a status line without a status");
  head.status = static_cast<int>(*status);
  bool has_connection = false;
  while (!lines.empty()) {
    const auto line_end = lines.find("\r\n");
    const std::string_view line = lines.substr(0, line_end);
    if (line.find_first_of(std::string_view("\r\n\0", 3)) != std::string_view::npos) {
      refuse("a control character in a header");
    }
    parse_header(line, head, has_connection);
    lines.remove_prefix(line_end + 2);
  }
  if (head.chunked && head.content_length) refuse("both a Content-Length and a chunked body");
  if (status_line[7] == '0' && !has_connection) head.keep_alive = false;
  return head;
}

bool same_etag(std::string_view a, std::string_view b) {
  const auto strong = [](std::string_view tag) { return tag.starts_with("W/") ? tag.substr(2) : tag; };
  return strong(a) == strong(b);
}

ErrorDocument parse_error_document(std::string_view body) {
  return {element_text(body, "Code"), element_text(body, "Message")};
}

size_t ChunkedBody::take_framing(std::string_view bytes) {
  size_t taken = 0;
  while (taken < bytes.size() && payload_ == 0 && state_ != State::kDone) {
    const char c = bytes[taken++];
    if (state_ == State::kTrailer && ++trailer_bytes_ > kMaxTrailerBytes)
      refuse("too long a trailer of a chunked body");
    if (c != '\n') {
      if (line_.size() >= kMaxChunkLineBytes) refuse("too long a line in a chunked body");
      line_ += c;
      continue;
    }
    if (line_.empty() || line_.back() != '\r') refuse("a line in a chunked body that does not end with CRLF");
    line_.pop_back();
    line_ended();
    line_.clear();
  }
  return taken;
}

void ChunkedBody::line_ended() {
  switch (state_) {
    case State::kSize: {
      const auto size = number(trimmed(std::string_view(line_).substr(0, line_.find(';'))), 16);
      if (!size) refuse("a chunk without a size");
      payload_ = *size;
      state_ = *size == 0 ? State::kTrailer : State::kAfterPayload;
      return;
    }
    case State::kAfterPayload:
      if (!line_.empty()) refuse("a chunk that is longer than it said");
      state_ = State::kSize;
      return;
    case State::kTrailer:
      if (line_.empty()) state_ = State::kDone;
      return;
    case State::kDone:
      return;
  }
}

}  // namespace rdmaload::http
