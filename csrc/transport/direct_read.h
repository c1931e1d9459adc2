// One piece of a read, past the page cache.
//
// The kernel wants block-aligned file ranges and aligned memory. Whole blocks whose place in memory allows it
// arrive there; the others (the edges of a range, tensors whose place and file offset disagree) arrive in a
// bounce buffer and are copied, which Read::copied_bytes counts. One call reads both.
#pragma once

#include <span>

#include "transport/open_file.h"
#include "transport/segment_cursor.h"

namespace rdmaload {

// Longest piece, and the size of the bounce buffer, which is one huge page: a disk fills memory that lies
// together more than twice as fast as pages that do not (docs/performance.md).
constexpr size_t kDirectPieceBytes = 2 << 20;

// Reads from file offset `offset`, where `cursor` stands, and moves the cursor on. `bounce` has
// kDirectPieceBytes and starts at a page. Returns how many bytes were delivered, 0 at the end of the file, or
// -errno.
ssize_t read_direct_piece(const FileCalls& calls, const OpenFile& file, uint64_t offset,
                          SegmentCursor& cursor, std::span<std::byte> bounce);

}  // namespace rdmaload
