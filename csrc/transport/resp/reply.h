// RESP2 and RESP3 replies: a parser that does no I/O.
//
// parse_header() reads one type line; parse_reply() a whole small reply (the answers to AUTH, HELLO, SELECT).
// Both are pure functions of the bytes received so far. Values of weights never pass through here: only their
// header line does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"

namespace rdmaload::resp {

constexpr size_t kMaxLineBytes = 64 << 10;  // error texts and big numbers; anything longer is refused

enum class Type { kSimple, kError, kInteger, kBulk, kAggregate, kNull, kOther };

// The first line of a reply.
struct Header {
  Type type;
  std::string_view text;  // of simple strings, errors and others: views the input
  int64_t length =
      0;  // bytes of a bulk, elements of an aggregate (maps count keys and values), an integer's value
  size_t consumed = 0;  // bytes of the line, CRLF included
};

// nullopt: more bytes are needed. Throws Error(kFormat) for what can never become a reply.
std::optional<Header> parse_header(std::string_view bytes);

struct Reply {
  Type type = Type::kNull;
  std::string text;  // simple, error, bulk
  int64_t integer = 0;
  std::vector<Reply> items;
};

// Parses one whole reply of at most a mebibyte, a thousand elements and eight levels; sets `consumed`.
std::optional<Reply> parse_reply(std::string_view bytes, size_t& consumed);

// What an error reply means to the caller; the message keeps the server's words.
Status status_of_error(std::string_view text, std::string_view context);

// One command as a RESP array of bulk strings, appended to `out`.
void append_command(std::string& out, std::span<const std::string_view> arguments);
inline void append_command(std::string& out, std::initializer_list<std::string_view> arguments) {
  append_command(out, std::span(arguments.begin(), arguments.size()));
}

}  // namespace rdmaload::resp
