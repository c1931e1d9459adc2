// The plan, on made-up indexes, layouts, selections and limits, sizes beyond any memory included: each wanted
// byte is read exactly once and goes to its place, nothing else is written, no read leaves its object, and
// limits hold. Checked on intervals, not on bytes, so that a file of 2^63 bytes costs no more than one of
// ten.
//
// Layouts and indexes that do not belong together, and limits without sense, must be refused as kInvalid.
#include <algorithm>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/checked.h"
#include "core/error.h"
#include "fuzz_input.h"
#include "loader/plan.h"

namespace rdmaload {
namespace {

constexpr uint64_t kMaxReads = 5000;  // what one run may cost
constexpr uint64_t kMaxTensors = 24;  // per file

// Small, around a power of two, or anything.
uint64_t size_from(fuzz::FuzzInput& input) {
  switch (input.byte() % 4) {
    case 0:
      return input.byte();
    case 1:
      return input.below_or(65535);
    case 2:
      return (uint64_t{1} << input.byte() % 64) + static_cast<uint64_t>(static_cast<int8_t>(input.byte()));
    default:
      return input.u64();
  }
}

// The header of U8 vectors of these sizes, and the size of its file; false when no file can have that size.
bool make_file(const std::vector<uint64_t>& sizes, std::string& header, uint64_t& file_bytes) {
  header = "{";
  std::optional<uint64_t> at = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto end = checked_add(*at, sizes[i]);
    if (!end || sizes[i] > uint64_t{1} << 60) return false;
    header += (i > 0 ? ",\"" : "\"") + std::to_string(i) + "\":{\"dtype\":\"U8\",\"shape\":[" +
              std::to_string(sizes[i]) + "],\"data_offsets\":[" + std::to_string(*at) + "," +
              std::to_string(*end) + "]}";
    at = end;
  }
  header += "}";
  const auto bytes = checked_add(8 + header.size(), *at);
  file_bytes = bytes.value_or(0);
  return bytes.has_value();
}

struct Piece {  // bytes of a file on their way to a region
  uint64_t offset;
  uint64_t size;
  uint32_t file;
  uint64_t from;
};

void check(const TensorIndex& index, const StoreLayout& layout, const PlanLimits& limits,
           std::vector<uint32_t> selection, const LoadPlan& plan, bool arenas) {
  const auto& tensors = index.tensors();
  std::vector<std::vector<Piece>> regions(plan.region_bytes.size());
  std::pair<uint32_t, uint64_t> previous{0, 0};
  uint64_t read_bytes = 0, segments = 0;
  const uint64_t unit = layout.chunk_bytes;
  for (const PlannedRead& read : plan.reads) {
    FUZZ_CHECK(read.file < layout.files.size());
    const StoredFile& stored = layout.files[read.file];
    const uint64_t begin = read.offset + (layout.object_per_chunk && unit > 0 ? read.chunk * unit : 0);
    FUZZ_CHECK(read.length > 0 && begin < stored.bytes && read.length <= stored.bytes - begin);
    FUZZ_CHECK(std::pair(read.file, begin) >= previous);  // in order, and nothing is read twice
    previous = {read.file, begin + read.length};
    if (unit > 0) {
      FUZZ_CHECK(read.chunk == begin / unit && read.chunk == (begin + read.length - 1) / unit);
      const uint64_t chunk_begin = read.chunk * unit;
      const bool whole = begin == chunk_begin && read.length == std::min(unit, stored.bytes - chunk_begin);
      FUZZ_CHECK(whole || !limits.whole_chunks);
      FUZZ_CHECK(read.crc.has_value() == (whole && !layout.crcs.empty()));
      if (read.crc) FUZZ_CHECK(*read.crc == layout.crcs[stored.first_chunk + read.chunk]);
    } else {
      FUZZ_CHECK(read.length <= limits.read_bytes && !read.crc);
    }
    const std::string name = plan.object_name(layout, read);
    FUZZ_CHECK(name == stored.object + (layout.object_per_chunk ? std::to_string(read.chunk) : ""));

    FUZZ_CHECK(read.first_segment == segments && read.segment_count > 0);
    segments += read.segment_count;
    FUZZ_CHECK(segments <= plan.segments.size());
    uint64_t left = read.length;
    for (uint64_t i = read.first_segment; i < segments; ++i) {
      const PlannedSegment& segment = plan.segments[i];
      FUZZ_CHECK(segment.size > 0 && segment.size <= left);
      if (segment.region != kDropped) {
        FUZZ_CHECK(segment.region < regions.size());
        const uint64_t room = plan.region_bytes[segment.region];
        FUZZ_CHECK(segment.offset <= room && segment.size <= room - segment.offset);
        regions[segment.region].push_back(
            {segment.offset, segment.size, read.file, begin + (read.length - left)});
      }
      left -= segment.size;
    }
    FUZZ_CHECK(left == 0);
    read_bytes += read.length;
  }
  FUZZ_CHECK(segments == plan.segments.size());
  FUZZ_CHECK(read_bytes == plan.read_bytes);

  uint64_t wanted_bytes = 0;
  FUZZ_CHECK(plan.placements.size() == selection.size());
  std::vector<std::vector<const Placement*>> placed(regions.size());
  std::vector<uint32_t> seen;
  for (const Placement& placement : plan.placements) {
    FUZZ_CHECK(placement.tensor < tensors.size() && placement.region < regions.size());
    if (arenas) FUZZ_CHECK(placement.offset % limits.alignment == 0);
    seen.push_back(placement.tensor);
    placed[placement.region].push_back(&placement);
    wanted_bytes += tensors[placement.tensor].info.end - tensors[placement.tensor].info.begin;
  }
  FUZZ_CHECK(wanted_bytes == plan.wanted_bytes);
  std::sort(seen.begin(), seen.end());
  std::sort(selection.begin(), selection.end());
  FUZZ_CHECK(seen == selection);

  for (size_t region = 0; region < regions.size(); ++region) {
    auto& pieces = regions[region];
    std::sort(pieces.begin(), pieces.end(),
              [](const Piece& a, const Piece& b) { return a.offset < b.offset; });
    auto& here = placed[region];
    FUZZ_CHECK(!here.empty());
    if (arenas && here.size() > 1) FUZZ_CHECK(plan.region_bytes[region] <= limits.max_arena_bytes);
    std::stable_sort(here.begin(), here.end(),
                     [](const auto* a, const auto* b) { return a->offset < b->offset; });
    // The tensors and the pieces, both in the order of their places, must cover the same bytes.
    size_t next = 0;
    uint64_t within = 0;  // of pieces[next]
    uint64_t free_from = 0;
    for (const Placement* placement : here) {
      const IndexedTensor& tensor = tensors[placement->tensor];
      uint64_t left = tensor.info.end - tensor.info.begin;
      FUZZ_CHECK(placement->offset <= plan.region_bytes[region]);
      FUZZ_CHECK(left <= plan.region_bytes[region] - placement->offset);
      if (left > 0) FUZZ_CHECK(placement->offset >= free_from);
      uint64_t at = placement->offset, from = tensor.info.begin;
      while (left > 0) {
        FUZZ_CHECK(next < pieces.size());
        const Piece& piece = pieces[next];
        FUZZ_CHECK(piece.offset + within == at && piece.file == tensor.file && piece.from + within == from);
        const uint64_t size = std::min(left, piece.size - within);
        left -= size;
        at += size;
        from += size;
        within += size;
        if (within == piece.size) {
          ++next;
          within = 0;
        }
        free_from = at;
      }
    }
    FUZZ_CHECK(next == pieces.size());
  }
}

// An upper bound of the number of reads, and of checksums.
uint64_t most_reads(const TensorIndex& index, const StoreLayout& layout, const PlanLimits& limits) {
  const uint64_t unit = layout.chunk_bytes > 0 ? layout.chunk_bytes : limits.read_bytes;
  if (unit == 0) return 0;  // refused
  uint64_t reads = 0;
  for (const StoredFile& file : layout.files) reads += std::min(file.bytes / unit, kMaxReads) + 1;
  return reads + index.tensors().size();
}

}  // namespace
}  // namespace rdmaload

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rdmaload;
  fuzz::FuzzInput input(data, size);
  TensorIndex index;
  StoreLayout layout;
  const uint32_t files = input.below_or(4);
  for (uint32_t file = 0; file < files; ++file) {
    uint64_t file_bytes = 0;
    if (input.byte() % 8 == 7) {
      file_bytes = size_from(input);
      const uint64_t block_bytes = size_from(input);
      if (block_bytes > 0 && file_bytes / block_bytes > kMaxTensors) return 0;
      try {
        index.add_blocks(file, file_bytes, block_bytes);
      } catch (const Error& error) {
        FUZZ_CHECK(error.code() == ErrorCode::kInvalid);
        return 0;
      }
    } else {
      std::vector<uint64_t> sizes(input.below_or(kMaxTensors));
      for (uint64_t& tensor : sizes) tensor = size_from(input);
      std::string header;
      if (!make_file(sizes, header, file_bytes)) return 0;
      index.add_file(file, "file", file_bytes, header);
    }
    layout.files.push_back({"file-" + std::to_string(file) + "/", file_bytes, 0});
  }
  uint64_t total = 0;
  for (const IndexedTensor& tensor : index.tensors()) {
    FUZZ_CHECK(tensor.info.end >= tensor.info.begin && tensor.info.end <= layout.files[tensor.file].bytes);
    FUZZ_CHECK(
        std::all_of(tensor.info.shape.begin(), tensor.info.shape.end(), [](auto n) { return n >= 0; }));
    // The sums in a plan are of bytes that fit into memory; sums beyond 2^64 are not its business.
    const auto sum = checked_add(total, tensor.info.end - tensor.info.begin);
    if (!sum) return 0;
    total = *sum;
  }

  const uint8_t flags = input.byte();
  layout.chunk_bytes = flags & 1 ? size_from(input) : 0;
  layout.object_per_chunk = layout.chunk_bytes > 0 && flags & 2;
  PlanLimits limits;
  limits.whole_chunks = flags & 4;
  if (flags & 8) limits.read_bytes = size_from(input);
  if (flags & 16) limits.coalesce_gap = size_from(input);
  if (flags & 32) limits.max_arena_bytes = size_from(input);
  if (flags & 64) limits.alignment = size_from(input);
  if (most_reads(index, layout, limits) > kMaxReads) return 0;
  if (layout.chunk_bytes > 0 && flags & 128) {
    for (uint32_t file = 0; file < files; ++file) {
      layout.files[file].first_chunk = layout.crcs.size();
      const uint64_t bytes = layout.files[file].bytes, unit = layout.chunk_bytes;
      const uint64_t chunks = bytes / unit + (bytes % unit != 0);
      for (uint64_t chunk = 0; chunk < chunks; ++chunk)
        layout.crcs.push_back(static_cast<uint32_t>(1000 * file + chunk));
    }
    if (input.byte() % 16 == 15 && !layout.crcs.empty()) layout.crcs.pop_back();
  }
  const uint8_t damage = input.byte();
  bool fits = true;
  if (damage == 255 && files > 0) {
    layout.files.pop_back();
  } else if (damage == 254 && files > 0) {
    layout.files.back().bytes /= 2;
  }
  for (const IndexedTensor& tensor : index.tensors()) {
    fits = fits && tensor.file < layout.files.size() && tensor.info.end <= layout.files[tensor.file].bytes;
  }

  // A random subset in a random order; sometimes with a tensor twice or one that is not there.
  std::vector<uint32_t> all(index.tensors().size());
  std::iota(all.begin(), all.end(), 0);
  std::vector<uint32_t> selection;
  while (!all.empty() && !input.empty()) {
    const size_t at = input.below_or(static_cast<uint32_t>(all.size() - 1));
    selection.push_back(all[at]);
    all.erase(all.begin() + static_cast<ptrdiff_t>(at));
  }
  bool good = limits.read_bytes > 0 && limits.alignment > 0;
  if (damage == 253 && !selection.empty()) {
    selection.push_back(selection.front());
    good = false;
  } else if (damage == 252) {
    selection.push_back(static_cast<uint32_t>(index.tensors().size()));
    good = false;
  }

  try {
    layout.validate();
  } catch (const Error& error) {
    FUZZ_CHECK(error.code() == ErrorCode::kFormat);
    return 0;
  }
  for (const bool arenas : {true, false}) {
    try {
      const LoadPlan plan = arenas ? plan_into_arenas(index, layout, selection, limits)
                                   : plan_into_tensors(index, layout, selection, limits);
      FUZZ_CHECK(good);
      check(index, layout, limits, selection, plan, arenas);
    } catch (const Error& error) {
      FUZZ_CHECK(error.code() == ErrorCode::kInvalid);
      FUZZ_CHECK(!good || !fits);
    }
  }
  return 0;
}
