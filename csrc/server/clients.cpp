// Who is asking: passwords, the protocol's version, names of clients.
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>

#include "server/command_table.h"

namespace rdmaload::server {
namespace {

constexpr size_t kMaxNameBytes = 1024;
constexpr std::string_view kBadNameText =
    "ERR Client names cannot contain spaces, newlines or special characters.";

// One line of CLIENT LIST must stay one line.
bool is_client_name(std::string_view name) {
  return std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c <= '~'; });
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
      if (!is_client_name(*name)) return error(kBadNameText);
      at += 2;
    } else {
      return error("ERR Syntax error in HELLO option '" + quoted(arguments[at]) + "'");
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

void Session::client(const Arguments& arguments) {
  const std::string_view what = arguments[1];
  const size_t count = arguments.size();
  if (same_word(what, "SETNAME") && count == 3) {
    if (!is_client_name(arguments[2])) return error(kBadNameText);
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
  if (same_word(what, "SETINFO") && count == 4) {
    const bool known = same_word(arguments[2], "LIB-NAME") || same_word(arguments[2], "LIB-VER");
    return known ? simple("OK") : error("ERR Unrecognized option '" + quoted(arguments[2]) + "'");
  }
  if ((same_word(what, "NO-EVICT") || same_word(what, "NO-TOUCH")) && count == 3) {
    const bool known = same_word(arguments[2], "ON") || same_word(arguments[2], "OFF");
    return known ? simple("OK") : error("ERR syntax error");
  }
  error("ERR unknown subcommand or wrong number of arguments for 'client'");
}

}  // namespace rdmaload::server
