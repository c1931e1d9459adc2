#include "server/glob.h"

#include <cstddef>
#include <utility>

namespace rdmaload::server {
namespace {

// Whether the first item of `pattern`, which is not `*`, takes `byte`; `used` is the item's length.
bool item_matches(std::string_view pattern, unsigned char byte, size_t& used) {
  used = 1;
  if (pattern[0] == '?') return true;
  if (pattern[0] == '\\' && pattern.size() > 1) {
    used = 2;
    return static_cast<unsigned char>(pattern[1]) == byte;
  }
  if (pattern[0] != '[') return static_cast<unsigned char>(pattern[0]) == byte;
  size_t at = 1;
  const bool inverted = at < pattern.size() && pattern[at] == '^';
  if (inverted) ++at;
  bool found = false;
  while (at < pattern.size() && pattern[at] != ']') {
    if (pattern[at] == '\\' && at + 1 < pattern.size()) ++at;
    auto low = static_cast<unsigned char>(pattern[at]);
    auto high = low;
    if (at + 2 < pattern.size() && pattern[at + 1] == '-' && pattern[at + 2] != ']') {
      high = static_cast<unsigned char>(pattern[at + 2]);
      if (high < low) std::swap(low, high);
      at += 2;
    }
    found = found || (low <= byte && byte <= high);
    ++at;
  }
  used = at < pattern.size() ? at + 1 : pattern.size();  // an unclosed class ends with the pattern
  return found != inverted;
}

}  // namespace

bool glob_matches(std::string_view pattern, std::string_view text) {
  size_t p = 0;
  size_t t = 0;
  // Where to go on when something does not match: after the last star, one more byte given to it.
  size_t star = std::string_view::npos;
  size_t star_text = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = ++p;
      star_text = t;
      continue;
    }
    size_t used = 0;
    if (p < pattern.size() && item_matches(pattern.substr(p), static_cast<unsigned char>(text[t]), used)) {
      p += used;
      ++t;
      continue;
    }
    if (star == std::string_view::npos) return false;
    p = star;
    t = ++star_text;
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

}  // namespace rdmaload::server
