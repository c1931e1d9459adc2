#include "loader/weight_map.h"

#include "core/error.h"
#include "loader/json.h"

namespace rdmaload {

std::set<std::string> files_of_weight_map(std::string_view text) {
  std::set<std::string> files;
  bool found = false;
  std::string name, file;
  const std::string* last = nullptr;
  JsonReader reader(text);
  reader.begin_object();
  while (reader.next_member(name)) {
    if (name != "weight_map") {
      reader.skip_value();
      continue;
    }
    found = true;
    reader.begin_object();
    while (reader.next_member(name)) {
      reader.read_string(file);
      // Most tensors lie in the file of the one before.
      if (last == nullptr || *last != file) last = &*files.insert(file).first;
    }
  }
  reader.finish();
  if (!found) throw Error(ErrorCode::kFormat, "it has no \"weight_map\" of tensor names to file names");
  return files;
}

}  // namespace rdmaload
