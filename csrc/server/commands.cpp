// The commands: which there are, and what those about keys do to the store and answer, as Redis would.
#include <charconv>
#include <cstring>
#include <limits>
#include <optional>

#include "server/command_table.h"
#include "server/glob.h"

namespace rdmaload::server {
namespace {

constexpr size_t kAnyNumber = std::numeric_limits<size_t>::max();
constexpr uint64_t kAnyBytes = std::numeric_limits<uint64_t>::max();
constexpr uint64_t kScanCount = 10;  // Redis' default
constexpr uint64_t kMaxScanCount =
    10'000;  // COUNT is a hint; this bounds how long the store is busy with one
constexpr uint64_t kMaxScanBytes = 128 << 10;  // of keys that one looks at
constexpr size_t kMaxPatternBytes = 1024;      // which each byte of those keys may be compared with

// Of one RDMALOAD.READ: a chunk's tensors, unless they are tiny. Each is a work request, of which a queue
// pair takes 1024.
constexpr size_t kMaxSegments = 256;

std::optional<uint64_t> count_of(std::string_view text, uint64_t most) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value > most) return std::nullopt;
  return value;
}

}  // namespace

std::span<const Session::Command> Session::commands() {
  static constexpr Command kCommands[] = {
      {"AUTH", 2, 3, true, &Session::auth},
      {"CLIENT", 2, kAnyNumber, false, &Session::client},
      {"COMMAND", 1, kAnyNumber, false, &Session::command},
      {"CONFIG", 2, kAnyNumber, false, &Session::config},
      {"DBSIZE", 1, 1, false, &Session::dbsize},
      {"DEL", 2, kAnyNumber, false, &Session::remove, false, {1, -1}},
      {"ECHO", 2, 2, false, &Session::echo},
      {"EXISTS", 2, kAnyNumber, false, &Session::exists, false, {1, -1}},
      {"GET", 2, 2, false, &Session::get, false, {1, 1}},
      {"GETRANGE", 4, 4, false, &Session::get_range, false, {1, 1}},
      {"HELLO", 1, 7, true, &Session::hello},
      {"INFO", 1, kAnyNumber, false, &Session::info},
      {"MGET", 2, kAnyNumber, false, &Session::mget, false, {1, -1}},
      {"PING", 1, 2, false, &Session::ping},
      {"QUIT", 1, kAnyNumber, true, &Session::quit},
      {"RDMALOAD.HELLO", 2, 2, false, &Session::rdma_hello, true},
      {"RDMALOAD.READ", 7, 3 + 4 * kMaxSegments, false, &Session::rdma_read, true, {1, 1}},
      {"RESET", 1, 1, true, &Session::reset},
      {"SADD", 3, kAnyNumber, false, &Session::sadd, false, {1, 1}},
      {"SCAN", 2, kAnyNumber, false, &Session::scan},
      {"SELECT", 2, 2, false, &Session::select},
      {"SET", 3, kAnyNumber, false, &Session::set, false, {1, 1}},
      {"SHUTDOWN", 1, 4, false, &Session::shutdown},
      {"SISMEMBER", 3, 3, false, &Session::sismember, false, {1, 1}},
      {"SMEMBERS", 2, 2, false, &Session::smembers, false, {1, 1}},
      {"SREM", 3, kAnyNumber, false, &Session::srem, false, {1, 1}},
      {"STRLEN", 2, 2, false, &Session::strlen, false, {1, 1}},
      {"TYPE", 2, 2, false, &Session::type, false, {1, 1}},
      {"UNLINK", 2, kAnyNumber, false, &Session::remove, false, {1, -1}},
  };
  return kCommands;
}

const Session::Command* Session::find_command(std::string_view name) {
  for (const Command& command : commands()) {
    if (same_word(name, command.name)) return &command;
  }
  return nullptr;
}

// ---- values ------------------------------------------------------------------------------------

void Session::get(const Arguments& arguments) {
  const Found found = shared_.store.get(arguments[1]);
  if (!passed(found.outcome)) return;
  if (std::holds_alternative<std::monostate>(found.content)) {
    ++shared_.counters.misses;
    return null();
  }
  ++shared_.counters.hits;
  content_reply(found.content, 0, content_bytes(found.content));
}

void Session::mget(const Arguments& arguments) {
  array(arguments.size() - 1);
  for (size_t i = 1; i < arguments.size(); ++i) {
    const Found found = shared_.store.get(arguments[i]);
    // A set is no value: null, as in Redis.
    if (std::holds_alternative<std::monostate>(found.content)) {
      ++shared_.counters.misses;
      null();
    } else {
      ++shared_.counters.hits;
      content_reply(found.content, 0, content_bytes(found.content));
    }
  }
}

void Session::get_range(const Arguments& arguments) {
  const auto first = number_of(arguments[2]);
  const auto last = number_of(arguments[3]);
  if (!first || !last) return error("ERR value is not an integer or out of range");
  const Found found = shared_.store.get(arguments[1]);
  if (!passed(found.outcome)) return;
  // Counted from the end when negative; bytes of values are far below the limits of int64.
  const auto size = static_cast<int64_t>(content_bytes(found.content));
  const int64_t begin = *first >= 0 ? *first : *first < -size ? 0 : size + *first;
  const int64_t end = *last >= 0 ? std::min(*last, size - 1) : *last < -size ? -1 : size + *last;
  if (size == 0 || begin > end || (*last < -size)) return bulk("");
  content_reply(found.content, static_cast<uint64_t>(begin), static_cast<uint64_t>(end - begin + 1));
}

// ---- straight into the client's memory ---------------------------------------------------------

// RDMALOAD.HELLO version: what both sides may use, as names and values.
void Session::rdma_hello(const Arguments& arguments) {
  if (arguments[1] != "1") return error("NOPROTO this server speaks version 1");
  array(4);
  bulk("version");
  integer(1);
  bulk("max_segments");
  integer(kMaxSegments);
}

// RDMALOAD.READ key size [offset length address key]...: bytes of the value to places in the client's memory,
// then its size. Either all is in order or nothing is written.
void Session::rdma_read(const Arguments& arguments) {
  constexpr size_t kFirst = 3;
  constexpr size_t kWords = 4;
  if ((arguments.size() - kFirst) % kWords != 0) {
    return error("ERR RDMALOAD.READ: a segment is an offset, a length, an address and a key");
  }
  const auto expected = count_of(arguments[2], kAnyBytes);
  if (!expected) return error("ERR RDMALOAD.READ: the size is no number");
  const Found found = shared_.store.get(arguments[1]);
  if (!passed(found.outcome)) return;
  if (std::holds_alternative<std::monostate>(found.content)) {
    ++shared_.counters.misses;
    return error("NOTFOUND there is no such key");
  }
  ++shared_.counters.hits;
  const uint64_t size = content_bytes(found.content);
  if (*expected != 0 && *expected != size) return error("SIZE " + std::to_string(size));
  struct Segment {
    uint64_t offset, length;
    RemotePlace place;
  };
  std::vector<Segment> segments;
  segments.reserve((arguments.size() - kFirst) / kWords);
  for (size_t i = kFirst; i < arguments.size(); i += kWords) {
    const auto offset = count_of(arguments[i], kAnyBytes);
    const auto length = count_of(arguments[i + 1], kAnyBytes);
    const auto address = count_of(arguments[i + 2], kAnyBytes);
    const auto key = count_of(arguments[i + 3], std::numeric_limits<uint32_t>::max());
    if (!offset || !length || !address || !key) {
      return error("ERR RDMALOAD.READ: a segment has something that is no number");
    }
    if (*offset > size || *length > size - *offset) {
      return error("RANGE a segment ends beyond the value's " + std::to_string(size) + " bytes");
    }
    segments.push_back({*offset, *length, {*address, static_cast<uint32_t>(*key)}});
  }
  ++shared_.counters.rdma_reads;
  for (const Segment& segment : segments) {
    if (const auto* range = std::get_if<FileRange>(&found.content))
      range->file->will_read(range->offset + segment.offset, segment.length);
    replies_.placed(found.content, segment.offset, segment.length, segment.place);
  }
  integer(size);
}

void Session::strlen(const Arguments& arguments) {
  const Found found = shared_.store.get(arguments[1]);
  if (passed(found.outcome)) integer(content_bytes(found.content));
}

void Session::set(const Arguments& arguments) {
  auto condition = SetCondition::kAlways;
  for (size_t i = 3; i < arguments.size(); ++i) {
    const bool absent = same_word(arguments[i], "NX");
    if (condition != SetCondition::kAlways || (!absent && !same_word(arguments[i], "XX"))) {
      return error("ERR syntax error: this server knows NX or XX only, and nothing expires");
    }
    condition = absent ? SetCondition::kIfAbsent : SetCondition::kIfPresent;
  }
  std::shared_ptr<Value> value = std::move(value_);
  if (value == nullptr) {
    value = shared_.store.memory()->allocate(arguments[2].size());
    if (value == nullptr) {
      passed(Outcome::kNoMemory);
      return;
    }
    if (!arguments[2].empty()) std::memcpy(value->fill().data(), arguments[2].data(), arguments[2].size());
  }
  const Outcome outcome = shared_.store.set(arguments[1], std::move(value), condition);
  if (!passed(outcome)) return;
  outcome == Outcome::kDone ? simple("OK") : null();
}

void Session::remove(const Arguments& arguments) {
  const Counted removed = shared_.store.remove(std::span(arguments).subspan(1));
  if (passed(removed.outcome)) integer(removed.count);
}

void Session::exists(const Arguments& arguments) {
  uint64_t count = 0;
  for (size_t i = 1; i < arguments.size(); ++i)
    count += shared_.store.kind(arguments[i]) != Kind::kNone ? 1 : 0;
  integer(count);
}

void Session::type(const Arguments& arguments) {
  const Kind kind = shared_.store.kind(arguments[1]);
  simple(kind == Kind::kNone ? "none" : kind == Kind::kSet ? "set" : "string");
}

// ---- sets of names -----------------------------------------------------------------------------

void Session::sadd(const Arguments& arguments) {
  const Counted added = shared_.store.add_members(arguments[1], std::span(arguments).subspan(2));
  if (passed(added.outcome)) integer(added.count);
}

void Session::srem(const Arguments& arguments) {
  const Counted removed = shared_.store.remove_members(arguments[1], std::span(arguments).subspan(2));
  if (passed(removed.outcome)) integer(removed.count);
}

void Session::sismember(const Arguments& arguments) {
  const Counted found = shared_.store.has_member(arguments[1], arguments[2]);
  if (passed(found.outcome)) integer(found.count);
}

void Session::smembers(const Arguments& arguments) {
  ValuePtr encoded;
  uint64_t count = 0;
  if (!passed(shared_.store.members(arguments[1], encoded, count))) return;
  replies_.text((protocol_ == 3 ? "~" : "*") + std::to_string(count) + "\r\n");
  if (encoded != nullptr) replies_.content(encoded, 0, encoded->bytes().size());
}

// ---- the keyspace ------------------------------------------------------------------------------

void Session::dbsize(const Arguments&) { integer(shared_.store.size()); }

void Session::scan(const Arguments& arguments) {
  uint64_t cursor = 0;
  const std::string_view from = arguments[1];
  const auto [end, failure] = std::from_chars(from.data(), from.data() + from.size(), cursor);
  if (failure != std::errc() || end != from.data() + from.size()) return error("ERR invalid cursor");
  uint64_t count = kScanCount;
  std::optional<std::string_view> pattern;
  std::optional<std::string_view> kind;
  if (arguments.size() % 2 != 0) return error("ERR syntax error");
  for (size_t i = 2; i < arguments.size(); i += 2) {
    if (same_word(arguments[i], "COUNT")) {
      const auto given = number_of(arguments[i + 1]);
      if (!given) return error("ERR value is not an integer or out of range");
      if (*given < 1) return error("ERR syntax error");
      count = std::min(static_cast<uint64_t>(*given), kMaxScanCount);
    } else if (same_word(arguments[i], "MATCH")) {
      pattern = arguments[i + 1];
      if (pattern->size() > kMaxPatternBytes) return error("ERR a pattern may have at most 1024 bytes");
    } else if (same_word(arguments[i], "TYPE")) {
      kind = arguments[i + 1];
    } else {
      return error("ERR syntax error");
    }
  }
  const ScanPage page = shared_.store.scan(cursor, count, kMaxScanBytes, [&](std::string_view key, Kind has) {
    if (kind && !same_word(*kind, has == Kind::kSet ? "SET" : "STRING")) return false;
    return !pattern || glob_matches(*pattern, key);
  });
  array(2);
  bulk(std::to_string(page.cursor));
  array(page.keys.size());
  for (const std::string& key : page.keys) bulk(key);
}

void Session::select(const Arguments& arguments) {
  const auto index = number_of(arguments[1]);
  if (!index) return error("ERR value is not an integer or out of range");
  *index == 0 ? simple("OK") : error("ERR DB index is out of range");
}

}  // namespace rdmaload::server
