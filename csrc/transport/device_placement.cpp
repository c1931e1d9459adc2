#include "transport/device_placement.h"

#include <algorithm>

namespace rdmaload {

size_t wanted_pieces(const std::vector<Segment>& segments) {
  return static_cast<size_t>(std::count_if(segments.begin(), segments.end(), [](const Segment& piece) {
    return piece.data != nullptr && piece.size > 0;
  }));
}

Status place_pieces(const Driver& driver, const Kernels* kernels, const Read& read,
                    const PlacementBlock& block, bool checksum, size_t scatter_pieces, cuda::Stream stream,
                    PlacementCounters& counters) {
  auto* const table = reinterpret_cast<ScatterPiece*>(block.host_table);
  const bool scatter = kernels != nullptr && wanted_pieces(read.segments) >= scatter_pieces;
  uint32_t count = 0;
  uint64_t at = 0;
  std::vector<ScatterPiece> rest;  // what no kernel places, or the table has no room for
  for (const Segment& piece : read.segments) {
    if (piece.data != nullptr && piece.size > 0) {
      const uint64_t longest = scatter ? kScatterPieceBytes : piece.size;
      for (uint64_t done = 0; done < piece.size; done += longest) {
        const ScatterPiece part{at + done, reinterpret_cast<cuda::Pointer>(piece.data) + done,
                                std::min(longest, piece.size - done)};
        if (scatter && count < block.entries) {
          table[count++] = part;
        } else {
          rest.push_back(part);
        }
      }
    }
    at += piece.size;
  }
  Status status;
  if (checksum) {
    status = driver.status("cuMemsetD32Async", driver.fill_words(block.crc, 0, 1, stream));
    if (status.ok()) status = kernels->crc32c(block.bytes, read.length, block.crc, stream);
    if (status.ok()) {
      status = driver.status("cuMemcpyDtoHAsync", driver.copy_to_host(block.host_crc, block.crc, 4, stream));
    }
  }
  if (status.ok() && count > 0) {
    ++counters.copies;
    status = driver.status("cuMemcpyHtoDAsync",
                           driver.copy_to_device(block.table, table, count * sizeof(ScatterPiece), stream));
    if (status.ok()) status = kernels->scatter(block.bytes, block.table, count, stream);
    counters.scattered_pieces += count;
  }
  for (size_t i = 0; i < rest.size() && status.ok(); ++i) {
    status = driver.status("cuMemcpyDtoDAsync", driver.copy_on_device(rest[i].to, block.bytes + rest[i].from,
                                                                      rest[i].bytes, stream));
  }
  return status;
}

}  // namespace rdmaload
