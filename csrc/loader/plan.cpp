#include "loader/plan.h"

#include <algorithm>

#include "core/checked.h"
#include "core/error.h"

namespace rdmaload {
namespace {

// Wanted bytes of one file: [begin, end) goes to `region` from `offset` on.
struct Wanted {
  uint64_t begin;
  uint64_t end;
  uint32_t region;
  uint64_t offset;
};

class Planner {
 public:
  Planner(const StoreLayout& layout, const PlanLimits& limits, LoadPlan& plan)
      : layout_(layout), limits_(limits), plan_(plan) {}

  void add_file(uint32_t file, std::vector<Wanted> wanted) {
    file_ = file;
    wanted_ = std::move(wanted);
    cursor_ = 0;
    if (layout_.chunk_bytes > 0) {
      read_by_chunk();
    } else {
      read_by_range();
    }
  }

 private:
  void read_by_chunk() {
    const uint64_t unit = layout_.chunk_bytes;
    const StoredFile& stored = layout_.files[file_];
    uint64_t next_chunk = 0;
    for (size_t i = 0; i < wanted_.size(); ++i) {
      const uint64_t last = (wanted_[i].end - 1) / unit;
      for (uint64_t chunk = std::max(next_chunk, wanted_[i].begin / unit); chunk <= last; ++chunk) {
        const uint64_t chunk_begin = chunk * unit;
        const uint64_t chunk_end = chunk_begin + std::min(unit, stored.bytes - chunk_begin);
        uint64_t begin = chunk_begin, end = chunk_end;
        if (!limits_.whole_chunks) {
          size_t final = i;
          while (final + 1 < wanted_.size() && wanted_[final + 1].begin < chunk_end) ++final;
          begin = std::max(begin, wanted_[i].begin);
          end = std::min(end, wanted_[final].end);
        }
        std::optional<uint32_t> crc;
        if (begin == chunk_begin && end == chunk_end && !layout_.crcs.empty()) {
          crc = layout_.crcs[stored.first_chunk + chunk];
        }
        emit(begin, end, chunk, layout_.object_per_chunk ? begin - chunk_begin : begin, crc);
      }
      next_chunk = last + 1;
    }
  }

  void read_by_range() {
    for (size_t i = 0; i < wanted_.size();) {
      const uint64_t begin = wanted_[i].begin;
      uint64_t end = wanted_[i].end;
      size_t next = i + 1;
      while (next < wanted_.size() && wanted_[next].begin - end <= limits_.coalesce_gap)
        end = wanted_[next++].end;
      for (uint64_t at = begin; at < end;) {
        const uint64_t length = std::min(limits_.read_bytes, end - at);
        emit(at, at + length, 0, at, std::nullopt);
        at += length;
      }
      i = next;
    }
  }

  // One read of the file's bytes [begin, end), which are visited in order.
  void emit(uint64_t begin, uint64_t end, uint64_t chunk, uint64_t offset, std::optional<uint32_t> crc) {
    PlannedRead read{file_, 0, chunk, offset, end - begin, plan_.segments.size(), crc};
    while (cursor_ < wanted_.size() && wanted_[cursor_].end <= begin) ++cursor_;
    uint64_t at = begin;
    for (size_t i = cursor_; at < end; ++i) {
      const bool more = i < wanted_.size() && wanted_[i].begin < end;
      const uint64_t start = more ? std::max(wanted_[i].begin, at) : end;
      if (start > at) plan_.segments.push_back({kDropped, 0, start - at});
      if (!more) break;
      const uint64_t stop = std::min(wanted_[i].end, end);
      plan_.segments.push_back(
          {wanted_[i].region, wanted_[i].offset + (start - wanted_[i].begin), stop - start});
      at = stop;
    }
    read.segment_count = static_cast<uint32_t>(plan_.segments.size() - read.first_segment);
    plan_.read_bytes += read.length;
    plan_.reads.push_back(read);
  }

  const StoreLayout& layout_;
  const PlanLimits& limits_;
  LoadPlan& plan_;
  uint32_t file_ = 0;
  std::vector<Wanted> wanted_;  // of file_, in order, not overlapping, not empty
  size_t cursor_ = 0;           // the first of wanted_ that a later read may still need
};

void check(const TensorIndex& index, const StoreLayout& layout, std::span<const uint32_t> selection,
           const PlanLimits& limits) {
  if (limits.read_bytes == 0 || limits.alignment == 0) {
    throw Error(ErrorCode::kInvalid, "read_bytes and alignment must not be 0");
  }
  std::vector<bool> selected(index.tensors().size());
  for (const uint32_t tensor : selection) {
    if (tensor >= selected.size())
      throw Error(ErrorCode::kInvalid, "there is no tensor " + std::to_string(tensor));
    if (selected[tensor])
      throw Error(ErrorCode::kInvalid, "tensor " + std::to_string(tensor) + " is selected twice");
    selected[tensor] = true;
    const IndexedTensor& entry = index.tensors()[tensor];
    if (entry.file >= layout.files.size() || entry.info.end > layout.files[entry.file].bytes) {
      throw Error(ErrorCode::kInvalid,
                  "tensor " + std::to_string(tensor) + " lies outside of the layout's files");
    }
  }
}

void plan_reads(const TensorIndex& index, const StoreLayout& layout, const PlanLimits& limits,
                LoadPlan& plan) {
  const auto& tensors = index.tensors();
  std::vector<Placement> ordered = plan.placements;
  std::sort(ordered.begin(), ordered.end(), [&](const Placement& a, const Placement& b) {
    const IndexedTensor &x = tensors[a.tensor], &y = tensors[b.tensor];
    return std::pair(x.file, x.info.begin) < std::pair(y.file, y.info.begin);
  });
  Planner planner(layout, limits, plan);
  for (size_t i = 0; i < ordered.size();) {
    const uint32_t file = tensors[ordered[i].tensor].file;
    std::vector<Wanted> wanted;
    for (; i < ordered.size() && tensors[ordered[i].tensor].file == file; ++i) {
      const TensorInfo& info = tensors[ordered[i].tensor].info;
      if (info.begin == info.end) continue;
      const Placement& placed = ordered[i];
      plan.wanted_bytes += info.end - info.begin;
      if (!wanted.empty()) {
        Wanted& last = wanted.back();
        const bool follows = last.end == info.begin && last.region == placed.region &&
                             last.offset + (last.end - last.begin) == placed.offset;
        if (follows) {
          last.end = info.end;
          continue;
        }
      }
      wanted.push_back({info.begin, info.end, placed.region, placed.offset});
    }
    if (!wanted.empty()) planner.add_file(file, std::move(wanted));
  }
}

}  // namespace

uint64_t StoreLayout::chunk_count(uint32_t file) const {
  const uint64_t bytes = files[file].bytes;
  return chunk_bytes == 0 ? 0 : bytes / chunk_bytes + (bytes % chunk_bytes != 0 ? 1 : 0);
}

void StoreLayout::validate() const {
  if (!digests.empty() && digests.size() != files.size()) {
    throw Error(ErrorCode::kInvalid, "a layout has a checksum of every whole file, or of none");
  }
  if (crcs.empty()) return;
  for (uint32_t file = 0; file < files.size(); ++file) {
    const uint64_t count = chunk_count(file);
    if (files[file].first_chunk > crcs.size() || count > crcs.size() - files[file].first_chunk) {
      throw Error(ErrorCode::kFormat,
                  "the index has no checksums for all chunks of '" + files[file].object + "'");
    }
  }
}

std::vector<uint32_t> LoadPlan::files() const {
  std::vector<uint32_t> files;
  for (const PlannedRead& read : reads) {  // those of one file follow each other
    if (files.empty() || files.back() != read.file) files.push_back(read.file);
  }
  return files;
}

std::string LoadPlan::object_name(const StoreLayout& layout, const PlannedRead& read) const {
  const std::string& object = layout.files[read.file].object;
  return layout.object_per_chunk ? object + std::to_string(read.chunk) : object;
}

LoadPlan plan_into_arenas(const TensorIndex& index, const StoreLayout& layout,
                          std::vector<uint32_t> selection, const PlanLimits& limits) {
  check(index, layout, selection, limits);
  const auto& tensors = index.tensors();
  std::stable_sort(selection.begin(), selection.end(), [&](uint32_t a, uint32_t b) {
    return std::pair(tensors[a].file, tensors[a].info.begin) <
           std::pair(tensors[b].file, tensors[b].info.begin);
  });
  LoadPlan plan;
  plan.placements.reserve(selection.size());
  for (const uint32_t tensor : selection) {
    const uint64_t bytes = tensors[tensor].info.end - tensors[tensor].info.begin;
    // Where it would begin in the last arena; nullopt: there is none, or beyond 2^64.
    std::optional<uint64_t> offset;
    if (!plan.region_bytes.empty()) {
      const uint64_t used = plan.region_bytes.back(), odd = used % limits.alignment;
      offset = checked_add(used, odd == 0 ? 0 : limits.alignment - odd);
    }
    if (!offset || *offset > limits.max_arena_bytes || bytes > limits.max_arena_bytes - *offset) {
      plan.region_bytes.push_back(0);
      offset = 0;
    }
    plan.region_bytes.back() = *offset + bytes;
    plan.placements.push_back({tensor, static_cast<uint32_t>(plan.region_bytes.size() - 1), *offset});
  }
  plan_reads(index, layout, limits, plan);
  return plan;
}

LoadPlan plan_into_tensors(const TensorIndex& index, const StoreLayout& layout,
                           std::span<const uint32_t> selection, const PlanLimits& limits) {
  check(index, layout, selection, limits);
  LoadPlan plan;
  for (const uint32_t tensor : selection) {
    const TensorInfo& info = index.tensors()[tensor].info;
    plan.placements.push_back({tensor, static_cast<uint32_t>(plan.region_bytes.size()), 0});
    plan.region_bytes.push_back(info.end - info.begin);
  }
  plan_reads(index, layout, limits, plan);
  return plan;
}

}  // namespace rdmaload
