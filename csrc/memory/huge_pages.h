// Which huge pages the system gives to whom asks for them, by its own settings. Reads files at each call.
#pragma once

namespace rdmaload {

// To private memory that is advised so (transparent_hugepage/enabled).
bool private_huge_pages();

}  // namespace rdmaload
