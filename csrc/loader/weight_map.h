// The files that a `*.safetensors.index.json` names: JSON with a "weight_map" of tensor names to file names.
// Nothing is kept of the tensor names, of which large models have ten thousands.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace rdmaload {

// Throws kFormat for what is not JSON, is no object, or has no such map.
std::set<std::string> files_of_weight_map(std::string_view text);

}  // namespace rdmaload
