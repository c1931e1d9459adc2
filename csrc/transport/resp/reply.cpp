#include "transport/resp/reply.h"

#include <algorithm>
#include <charconv>

namespace rdmaload::resp {
namespace {

constexpr int64_t kMaxBulkBytes = int64_t{512} << 20;  // the protocol's own limit (proto-max-bulk-len)
constexpr int64_t kMaxAggregate = int64_t{1} << 31;
constexpr size_t kMaxReplyBytes = 1 << 20;
constexpr int64_t kMaxReplyElements = 1000;
constexpr int kMaxReplyDepth = 8;

std::string printable(std::string_view bytes) {
  std::string text;
  for (const char c : bytes.substr(0, 60)) text += (c >= ' ' && c < 127) ? c : '?';
  return text;
}

int64_t parse_integer(std::string_view text, int64_t minimum, int64_t maximum) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text.empty() || value < minimum ||
      value > maximum) {
    throw Error(ErrorCode::kFormat,
                "the server sent '" + printable(text) + "' where a length or number belongs");
  }
  return value;
}

bool starts_with_word(std::string_view text, std::string_view word) {
  return text.starts_with(word) && (text.size() == word.size() || text[word.size()] == ' ');
}

std::optional<Reply> parse_nested(std::string_view bytes, size_t& consumed, int depth,
                                  int64_t& elements_left) {
  const auto header = parse_header(bytes);
  if (!header) return std::nullopt;
  const bool blob_error = bytes[0] == '!';
  Reply reply;
  reply.type = header->type;
  reply.text = header->text;
  reply.integer = header->length;
  consumed += header->consumed;
  bytes.remove_prefix(header->consumed);
  if (header->type == Type::kBulk) {
    if (header->length > static_cast<int64_t>(kMaxReplyBytes)) {
      throw Error(ErrorCode::kFormat, "the server's answer to a small command is too long");
    }
    const auto length = static_cast<size_t>(header->length);
    if (bytes.size() < length + 2) return std::nullopt;
    if (bytes.substr(length, 2) != "\r\n") {
      throw Error(ErrorCode::kFormat, "a bulk string does not end with CRLF");
    }
    reply.text = bytes.substr(0, length);
    if (blob_error) reply.type = Type::kError;
    consumed += length + 2;
  } else if (header->type == Type::kAggregate) {
    if (depth >= kMaxReplyDepth || header->length > elements_left) {
      throw Error(ErrorCode::kFormat, "the server's answer to a small command has too many elements");
    }
    elements_left -= header->length;
    for (int64_t i = 0; i < header->length; ++i) {
      size_t item_bytes = 0;
      auto item = parse_nested(bytes, item_bytes, depth + 1, elements_left);
      if (!item) return std::nullopt;
      reply.items.push_back(std::move(*item));
      bytes.remove_prefix(item_bytes);
      consumed += item_bytes;
    }
  }
  return reply;
}

}  // namespace

std::optional<Header> parse_header(std::string_view bytes) {
  if (bytes.empty()) return std::nullopt;
  constexpr std::string_view kTypes = "+-:$*_#,(!=%~>";
  if (kTypes.find(bytes[0]) == std::string_view::npos) {
    throw Error(ErrorCode::kFormat, "the server sent '" + printable(bytes) + "', which is not RESP");
  }
  const size_t end = bytes.substr(0, kMaxLineBytes).find('\r');
  if (end == std::string_view::npos || end + 1 == bytes.size()) {
    if (bytes.size() >= kMaxLineBytes)
      throw Error(ErrorCode::kFormat, "a line of the server's reply is too long");
    return std::nullopt;
  }
  if (bytes[end + 1] != '\n') {
    throw Error(ErrorCode::kFormat, "the server sent '" + printable(bytes) + "', a line without CRLF");
  }
  const std::string_view line = bytes.substr(1, end - 1);
  Header header{Type::kOther, line, 0, end + 2};
  switch (bytes[0]) {
    case '+':
      header.type = Type::kSimple;
      break;
    case '-':
      header.type = Type::kError;
      break;
    case ':':
      header.type = Type::kInteger;
      header.length = parse_integer(line, INT64_MIN, INT64_MAX);
      break;
    case '_':
      if (!line.empty()) throw Error(ErrorCode::kFormat, "a null reply with content");
      header.type = Type::kNull;
      break;
    case '$':
      header.length = parse_integer(line, -1, kMaxBulkBytes);
      header.type = header.length < 0 ? Type::kNull : Type::kBulk;
      break;
    case '!':  // a blob error and a verbatim string: a bulk on the wire
    case '=':
      header.length = parse_integer(line, 0, kMaxBulkBytes);
      header.type = Type::kBulk;
      break;
    case '*':
      header.length = parse_integer(line, -1, kMaxAggregate);
      header.type = header.length < 0 ? Type::kNull : Type::kAggregate;
      break;
    case '~':
    case '>':
      header.length = parse_integer(line, 0, kMaxAggregate);
      header.type = Type::kAggregate;
      break;
    case '%':
      header.length = 2 * parse_integer(line, 0, kMaxAggregate);
      header.type = Type::kAggregate;
      break;
    default:  // booleans, doubles, big numbers: one line, of no use to us
      break;
  }
  return header;
}

std::optional<Reply> parse_reply(std::string_view bytes, size_t& consumed) {
  consumed = 0;
  int64_t elements_left = kMaxReplyElements;
  auto reply = parse_nested(bytes, consumed, 0, elements_left);
  if (!reply && bytes.size() > kMaxReplyBytes + kMaxLineBytes) {
    throw Error(ErrorCode::kFormat, "the server's answer to a small command is too long");
  }
  return reply;
}

Status status_of_error(std::string_view text, std::string_view context) {
  // "unknown command 'AUTH', with args beginning with: ..." repeats what we sent, a password too.
  text = text.substr(0, text.find(", with args"));
  const auto is = [text](std::string_view word) { return starts_with_word(text, word); };
  const std::string said = std::string(context) + ": the server answered '" + printable(text) + "'";
  if (is("NOAUTH") || is("WRONGPASS") || is("NOPERM") || is("DENIED") ||
      text.starts_with("ERR invalid password") || text.starts_with("ERR AUTH") ||
      text.starts_with("ERR Client sent AUTH")) {
    return Status(ErrorCode::kAuthentication, said + "; check user, password and the user's ACL");
  }
  if (is("MOVED") || is("ASK") || is("CROSSSLOT")) {
    return Status(ErrorCode::kNotSupported,
                  said +
                      "; it is a node of a cluster, which redis:// does not follow (redis+cluster:// is not "
                      "supported yet): use a server without cluster mode");
  }
  if (is("OOM")) {
    return Status(ErrorCode::kUnavailable,
                  said + "; it is over its maxmemory: raise maxmemory or lower bytes_in_flight");
  }
  if (is("LOADING") || is("BUSY") || is("TRYAGAIN") || is("MASTERDOWN") || is("CLUSTERDOWN") ||
      text.starts_with("ERR max number of clients reached")) {
    return Status(ErrorCode::kUnavailable, said);
  }
  if (is("WRONGTYPE")) {
    return Status(ErrorCode::kFormat, said + "; the key holds something that rdmaload did not write");
  }
  return Status(ErrorCode::kNotSupported, said);
}

void append_command(std::string& out, std::span<const std::string_view> arguments) {
  out += '*';
  out += std::to_string(arguments.size());
  out += "\r\n";
  for (const std::string_view argument : arguments) {
    out += '$';
    out += std::to_string(argument.size());
    out += "\r\n";
    out += argument;
    out += "\r\n";
  }
}

}  // namespace rdmaload::resp
