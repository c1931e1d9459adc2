// Which huge pages the system gives to whom asks for them, by its own settings. Reads files at each call.
#pragma once

#include <cstddef>

namespace rdmaload {

// To private memory that is advised so (transparent_hugepage/enabled).
bool private_huge_pages();
// Their size for shared memory that is advised so (transparent_hugepage/shmem_enabled, `never` on most
// systems); 0: none.
size_t shared_huge_page_bytes();

}  // namespace rdmaload
