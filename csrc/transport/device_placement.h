// From one block of device memory, where a read's bytes have arrived or will, to the places of its segments:
// by a kernel where they are many, else by copies; and the checksum of the whole.
//
// What is enqueued reads the table in page-locked memory and writes the checksum there: both, and the block,
// stay as they are until the stream has come past it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/kernels.h"
#include "transport/transport.h"

namespace rdmaload {

struct PlacementBlock {
  cuda::Pointer bytes;  // the read's first byte
  cuda::Pointer table;  // room for `entries` of the table of pieces
  std::byte* host_table;
  uint64_t entries;
  cuda::Pointer crc;  // a word each
  std::byte* host_crc;
};

struct PlacementCounters {
  uint64_t copies = 0;  // from host to device
  uint64_t scattered_pieces = 0;
};

// Segments that are wanted and not empty.
size_t wanted_pieces(const std::vector<Segment>& segments);

// Enqueues it on `stream`, with the device current. `kernels` may be nullptr without `checksum`; pieces are
// placed by one from `scatter_pieces` on.
Status place_pieces(const Driver& driver, const Kernels* kernels, const Read& read,
                    const PlacementBlock& block, bool checksum, size_t scatter_pieces, cuda::Stream stream,
                    PlacementCounters& counters);

}  // namespace rdmaload
