// The load plan: a pure function from (tensor index, store layout, selection, limits) to ordered reads.
//
// A destination region is a block of memory that exists only when the plan is executed: an arena that several
// tensors share, or the memory of one existing tensor. The plan says which bytes of which object go to which
// offset of which region; kDropped marks bytes that come along with a whole chunk and are wanted by nobody.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/crc.h"
#include "loader/tensor_index.h"

namespace rdmaload {

// How the store keeps one file.
struct StoredFile {
  std::string object;  // a file's path, or what its chunks' names start with ("model/chunks/<generation>/7/")
  uint64_t bytes = 0;
  uint64_t first_chunk = 0;  // position of its first checksum in StoreLayout::crcs
};

struct StoreLayout {
  std::vector<StoredFile> files;
  uint64_t chunk_bytes = 0;       // 0: files are not divided and have no checksums
  bool object_per_chunk = false;  // true: chunk n is the object "<object>n"; false: a range of the object
  std::vector<uint32_t> crcs;     // CRC32C per chunk, file by file; empty: none known
  std::vector<CrcKind> digests;   // per file, the CRC that the store has of all of it; empty: none known

  uint64_t chunk_count(uint32_t file) const;
  // Throws kFormat unless the checksums are those of exactly these files.
  void validate() const;
};

struct Placement {
  uint32_t tensor;  // position in TensorIndex::tensors()
  uint32_t region;
  uint64_t offset;
};

struct PlanLimits {
  bool whole_chunks = true;              // read whole chunks, so that their checksums can be verified
  uint64_t read_bytes = 8 << 20;         // longest read where the store has no chunks
  uint64_t coalesce_gap = 128 << 10;     // unwanted bytes that are cheaper to read than to skip
  uint64_t max_arena_bytes = 256 << 20;  // a kept tensor holds no more than this of its neighbours
  uint64_t alignment = 64;               // of each tensor in an arena: a cache line, an AVX-512 register
};

constexpr uint32_t kDropped = std::numeric_limits<uint32_t>::max();

struct PlannedSegment {
  uint32_t region;  // or kDropped
  uint64_t offset;  // in the region
  uint64_t size;
};

struct PlannedRead {
  uint32_t file;
  uint32_t segment_count;
  uint64_t chunk;   // with chunks: which one
  uint64_t offset;  // in the object
  uint64_t length;
  uint64_t first_segment;       // position in LoadPlan::segments
  std::optional<uint32_t> crc;  // of the whole read
};

struct LoadPlan {
  std::vector<Placement> placements;  // one per selected tensor, in file order
  std::vector<uint64_t> region_bytes;
  std::vector<PlannedRead> reads;
  std::vector<PlannedSegment> segments;
  uint64_t wanted_bytes = 0;  // bytes of the selected tensors
  uint64_t read_bytes = 0;    // what is asked of the store; read_bytes / wanted_bytes is the amplification

  // The files that are read, each once, in order.
  std::vector<uint32_t> files() const;
  std::string object_name(const StoreLayout& layout, const PlannedRead& read) const;
};

// Both throw kInvalid for limits that make no sense, a tensor that does not exist or lies outside of the
// layout's files, or one selected twice.

// Packs the selected tensors into arenas, in file order.
LoadPlan plan_into_arenas(const TensorIndex& index, const StoreLayout& layout,
                          std::vector<uint32_t> selection, const PlanLimits& limits);
// Tensor selection[i] goes to region i, which is exactly its size.
LoadPlan plan_into_tensors(const TensorIndex& index, const StoreLayout& layout,
                           std::span<const uint32_t> selection, const PlanLimits& limits);

}  // namespace rdmaload
