#include "server/auth_limiter.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>

namespace rdmaload::server {
namespace {

constexpr size_t kNetworkBytes = 8;  // of an IPv6 address: what one site has is a /64 at least

// What the ports of one host, or one IPv6 network, have in common.
std::string key_of(std::string_view address) {
  const std::string host(address.substr(0, address.rfind(':')));
  if (!host.starts_with('[') || !host.ends_with(']')) return host;
  in6_addr binary{};
  if (inet_pton(AF_INET6, host.substr(1, host.size() - 2).c_str(), &binary) != 1) return host;
  const auto* bytes = reinterpret_cast<const char*>(binary.s6_addr);
  // An IPv4 client of an IPv6 socket is one host.
  return std::string(bytes, IN6_IS_ADDR_V4MAPPED(&binary) ? sizeof(binary.s6_addr) : kNetworkBytes);
}

}  // namespace

double AuthLimiter::left(const Entry& entry, Clock::time_point now) {
  const double seconds = std::chrono::duration<double>(now - entry.when).count();
  return std::max(0.0, entry.guesses - kGuessesPerSecond * seconds);
}

bool AuthLimiter::may_try(std::string_view address, Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  const auto at = entries_.find(key_of(address));
  return at == entries_.end() || left(at->second, now) + 1 <= kGuesses;
}

void AuthLimiter::failed(std::string_view address, size_t guess, Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  std::string key = key_of(address);
  auto at = entries_.find(key);
  if (at == entries_.end()) {
    if (entries_.size() >= kMaxAddresses) {
      std::erase_if(entries_, [now](const auto& one) { return left(one.second, now) == 0; });
    }
    // So many guess at once that one more or less makes no difference.
    if (entries_.size() >= kMaxAddresses) entries_.erase(entries_.begin());
    at = entries_.emplace(std::move(key), Entry{0, now, ~guess}).first;
  }
  Entry& entry = at->second;
  entry.guesses = left(entry, now) + (entry.last == guess ? 0 : 1);
  entry.when = now;
  entry.last = guess;
}

size_t AuthLimiter::addresses() const {
  const std::lock_guard lock(mutex_);
  return entries_.size();
}

}  // namespace rdmaload::server
