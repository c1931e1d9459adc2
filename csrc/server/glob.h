// Redis' patterns: `*`, `?`, `[a-z]`, `[^a]`, and a backslash that takes the next byte literally. Bytes, not
// characters.
#pragma once

#include <string_view>

namespace rdmaload::server {

// Time is bounded by the product of the lengths, whatever the pattern is.
bool glob_matches(std::string_view pattern, std::string_view text);

}  // namespace rdmaload::server
