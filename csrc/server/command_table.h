// What a command is to a session: its name, how many words it takes, and who may send it.
#pragma once

#include <algorithm>
#include <charconv>
#include <optional>
#include <string>
#include <string_view>

#include "server/session.h"

namespace rdmaload::server {

constexpr std::string_view kRedisVersion = "7.2.0";  // whose behaviour clients may expect of what is here

struct Session::Command {
  std::string_view name;  // in capitals
  size_t least;           // words, the name included
  size_t most;
  bool for_anybody;  // also before authentication
  void (Session::*run)(const Arguments&);
  bool over_rdma_only = false;  // to others it does not exist
  struct Keys {
    int first, last;  // which words are keys; counted from the end when negative
  } keys = {0, 0};    // none
};

inline char upper(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; }

inline std::string lower(std::string_view text) {
  std::string made(text);
  for (char& c : made) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return made;
}

// Whether `word` is `capitals` in any case.
inline bool same_word(std::string_view word, std::string_view capitals) {
  return std::equal(word.begin(), word.end(), capitals.begin(), capitals.end(),
                    [](char a, char b) { return upper(a) == b; });
}

inline std::optional<int64_t> number_of(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Error texts quote what clients send: no line ends, and not all of a long one.
inline std::string quoted(std::string_view text) {
  std::string safe;
  for (const char c : text.substr(0, 64)) safe.push_back(c >= ' ' && c < 127 ? c : '?');
  return safe;
}

}  // namespace rdmaload::server
