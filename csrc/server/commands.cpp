// The commands: what each of them does to the store and what it answers, as Redis would.
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
constexpr uint64_t kMaxScanBytes = 128 << 10;  // of keys in one reply
constexpr size_t kMaxNameBytes = 1024;

// Of one RDMALOAD.READ: a chunk's tensors, unless they are tiny. Each is a work request, of which a queue
// pair takes 1024.
constexpr size_t kMaxSegments = 256;

std::optional<int64_t> number_of(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<uint64_t> count_of(std::string_view text, uint64_t most) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value > most) return std::nullopt;
  return value;
}

// Takes as long for a wrong byte at the beginning as for one at the end.
bool same_secret(std::string_view a, std::string_view b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < a.size() && !b.empty(); ++i) {
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i % b.size()]);
  }
  return difference == 0;
}

}  // namespace

std::span<const Session::Command> Session::commands() {
  static constexpr Command kCommands[] = {
      {"AUTH", 2, 3, true, &Session::auth},
      {"CLIENT", 2, kAnyNumber, false, &Session::client},
      {"COMMAND", 1, kAnyNumber, false, &Session::command},
      {"CONFIG", 2, kAnyNumber, false, &Session::config},
      {"DBSIZE", 1, 1, false, &Session::dbsize},
      {"DEL", 2, kAnyNumber, false, &Session::remove},
      {"ECHO", 2, 2, false, &Session::echo},
      {"EXISTS", 2, kAnyNumber, false, &Session::exists},
      {"GET", 2, 2, false, &Session::get},
      {"GETRANGE", 4, 4, false, &Session::get_range},
      {"HELLO", 1, 7, true, &Session::hello},
      {"INFO", 1, kAnyNumber, false, &Session::info},
      {"MGET", 2, kAnyNumber, false, &Session::mget},
      {"PING", 1, 2, false, &Session::ping},
      {"QUIT", 1, kAnyNumber, true, &Session::quit},
      {"RDMALOAD.HELLO", 2, 2, false, &Session::rdma_hello, true},
      {"RDMALOAD.READ", 7, 3 + 4 * kMaxSegments, false, &Session::rdma_read, true},
      {"RESET", 1, 1, true, &Session::reset},
      {"SADD", 3, kAnyNumber, false, &Session::sadd},
      {"SCAN", 2, kAnyNumber, false, &Session::scan},
      {"SELECT", 2, 2, false, &Session::select},
      {"SET", 3, kAnyNumber, false, &Session::set},
      {"SHUTDOWN", 1, 2, false, &Session::shutdown},
      {"SISMEMBER", 3, 3, false, &Session::sismember},
      {"SMEMBERS", 2, 2, false, &Session::smembers},
      {"SREM", 3, kAnyNumber, false, &Session::srem},
      {"STRLEN", 2, 2, false, &Session::strlen},
      {"TYPE", 2, 2, false, &Session::type},
      {"UNLINK", 2, kAnyNumber, false, &Session::remove},
  };
  return kCommands;
}

const Session::Command* Session::find_command(std::string_view name) {
  for (const Command& command : commands()) {
    if (same_word(name, command.name)) return &command;
  }
  return nullptr;
}

// ---- who is asking -----------------------------------------------------------------------------

bool Session::check_password(std::string_view user, std::string_view password) {
  const auto now = AuthLimiter::Clock::now();
  if (!shared_.auth_limiter.may_try(address_, now)) {
    ++shared_.counters.auth_refused;
    // Our clients try again after this, and others report it.
    error("TRYAGAIN too many wrong passwords came from your address: wait a second");
    closing_ = true;
    return false;
  }
  const bool known =
      !shared_.password.empty() && user == "default" && same_secret(password, shared_.password);
  if (!known) {
    ++shared_.counters.auth_failures;
    const std::hash<std::string_view> hash;
    shared_.auth_limiter.failed(address_, hash(password) + 31 * hash(user), now);
    error("WRONGPASS invalid username-password pair or user is disabled.");
    return false;
  }
  authenticated_ = true;
  parser_.set_limits(RequestLimits{});
  return true;
}

void Session::auth(const Arguments& arguments) {
  if (arguments.size() == 2 && shared_.password.empty()) {
    error(
        "ERR AUTH <password> called without any password configured for the default user. "
        "Are you sure your configuration is correct?");
    return;
  }
  const bool named = arguments.size() == 3;
  // Without a password anybody is the default user, whatever password they say.
  const bool open = named && shared_.password.empty() && arguments[1] == "default";
  if (open || check_password(named ? arguments[1] : "default", arguments.back())) simple("OK");
}

void Session::hello(const Arguments& arguments) {
  int protocol = protocol_;
  size_t at = 1;
  if (arguments.size() > 1) {
    const auto wanted = number_of(arguments[at++]);
    if (!wanted) return error("ERR Protocol version is not an integer or out of range");
    if (*wanted != 2 && *wanted != 3) return error("NOPROTO unsupported protocol version");
    protocol = static_cast<int>(*wanted);
  }
  std::optional<std::string_view> name;
  while (at < arguments.size()) {
    if (same_word(arguments[at], "AUTH") && at + 2 < arguments.size()) {
      const bool open = shared_.password.empty() && arguments[at + 1] == "default";
      if (!open && !check_password(arguments[at + 1], arguments[at + 2])) return;
      at += 3;
    } else if (same_word(arguments[at], "SETNAME") && at + 1 < arguments.size()) {
      name = arguments[at + 1];
      at += 2;
    } else {
      return error("ERR Syntax error in HELLO option");
    }
  }
  if (!authenticated_) {
    return error(
        "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> "
        "AUTH <user> <pass> option can be used to authenticate the client and select the RESP protocol "
        "version at the same time");
  }
  if (name) {
    const std::lock_guard lock(name_mutex_);
    name_ = name->substr(0, kMaxNameBytes);
  }
  protocol_ = protocol;
  map(7);
  bulk("server");
  bulk("rdmaload");
  bulk("version");
  bulk(kRedisVersion);
  bulk("proto");
  integer(static_cast<uint64_t>(protocol_));
  bulk("id");
  integer(id_);
  bulk("mode");
  bulk("standalone");
  bulk("role");
  bulk("master");
  bulk("modules");
  array(0);
}

void Session::reset(const Arguments&) {
  protocol_ = 2;
  authenticated_ = shared_.password.empty();
  if (!authenticated_) parser_.set_limits(kUnknownClientLimits);
  const std::lock_guard lock(name_mutex_);
  name_.clear();
  simple("RESET");
}

void Session::quit(const Arguments&) {
  simple("OK");
  closing_ = true;
}

void Session::shutdown(const Arguments&) {
  closing_ = true;
  shared_.shut_down();
}

void Session::client(const Arguments& arguments) {
  const std::string_view what = arguments[1];
  const size_t count = arguments.size();
  if (same_word(what, "SETNAME") && count == 3) {
    for (const char c : arguments[2]) {
      if (c <= ' ' || c > '~')
        return error("ERR Client names cannot contain spaces, newlines or special characters.");
    }
    const std::lock_guard lock(name_mutex_);
    name_ = arguments[2].substr(0, kMaxNameBytes);
    return simple("OK");
  }
  if (same_word(what, "GETNAME") && count == 2) {
    const std::lock_guard lock(name_mutex_);
    return name_.empty() ? null() : bulk(name_);
  }
  if (same_word(what, "ID") && count == 2) return integer(id_);
  if (same_word(what, "INFO") && count == 2) return bulk(list_line());
  if (same_word(what, "LIST")) return bulk(shared_.client_lines());
  if ((same_word(what, "SETINFO") && count == 4) || (same_word(what, "NO-EVICT") && count == 3) ||
      (same_word(what, "NO-TOUCH") && count == 3)) {
    return simple("OK");
  }
  error("ERR unknown subcommand or wrong number of arguments for 'client'");
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

// ---- about the server --------------------------------------------------------------------------

void Session::ping(const Arguments& arguments) {
  arguments.size() == 2 ? bulk(arguments[1]) : simple("PONG");
}

void Session::echo(const Arguments& arguments) { bulk(arguments[1]); }

void Session::command(const Arguments& arguments) {
  // Enough for clients that ask at the beginning: nothing is described.
  if (arguments.size() == 2 && same_word(arguments[1], "COUNT")) return integer(commands().size());
  if (arguments.size() > 1 && same_word(arguments[1], "DOCS")) return map(0);
  array(0);
}

}  // namespace rdmaload::server
