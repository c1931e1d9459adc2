// Names of paths that are put together while a load runs, with the life of a literal.
#pragma once

#include <string>
#include <string_view>

namespace rdmaload {

// The same text, kept for the process's life. There are few of them: ways of reading times ways to a device.
std::string_view kept_path_name(const std::string& name);

}  // namespace rdmaload
