// What a command is to a session: its name, how many words it takes, and who may send it.
#pragma once

#include <algorithm>
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
};

inline char upper(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; }

// Whether `word` is `capitals` in any case.
inline bool same_word(std::string_view word, std::string_view capitals) {
  return std::equal(word.begin(), word.end(), capitals.begin(), capitals.end(),
                    [](char a, char b) { return upper(a) == b; });
}

}  // namespace rdmaload::server
