#include "memory/huge_pages.h"

#include <fstream>
#include <string>

namespace rdmaload {
namespace {

constexpr char kSettings[] = "/sys/kernel/mm/transparent_hugepage/";

// The chosen one of a file such as "always within_size advise [never] deny force"; empty: there is none.
std::string chosen(const char* name) {
  std::ifstream file(std::string(kSettings) + name);
  std::string modes;
  std::getline(file, modes);
  const size_t begin = modes.find('[');
  const size_t end = modes.find(']');
  if (begin == std::string::npos || end == std::string::npos || end < begin) return {};
  return modes.substr(begin + 1, end - begin - 1);
}

}  // namespace

bool private_huge_pages() {
  const std::string mode = chosen("enabled");
  return mode == "always" || mode == "madvise";
}

}  // namespace rdmaload
