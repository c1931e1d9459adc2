#include "transport/path_name.h"

#include <mutex>
#include <set>

namespace rdmaload {

std::string_view kept_path_name(const std::string& name) {
  static auto* mutex = new std::mutex;  // both for ever, as the names
  static auto* names = new std::set<std::string>;
  std::lock_guard lock(*mutex);
  return *names->insert(name).first;
}

}  // namespace rdmaload
