#include "loader/plan.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "core/error.h"
#include "support/models.h"

namespace rdmaload {
namespace {

using testing::kScalar;
using testing::Model;
using testing::pick;

// Which bytes of each file the plan should read, by the definition and byte by byte.
std::vector<std::vector<bool>> expected_bytes(const Model& model, const std::vector<uint32_t>& selection,
                                              const PlanLimits& limits) {
  std::vector<std::vector<bool>> wanted;
  for (const auto& file : model.files) wanted.emplace_back(file.size());
  for (const uint32_t tensor : selection) {
    const IndexedTensor& entry = model.index.tensors()[tensor];
    for (uint64_t i = entry.info.begin; i < entry.info.end; ++i) wanted[entry.file][i] = true;
  }
  auto expected = wanted;
  const uint64_t unit = model.layout.chunk_bytes;
  for (size_t file = 0; file < wanted.size(); ++file) {
    const auto& bytes = wanted[file];
    const uint64_t size = bytes.size();
    // Ranges are joined over small gaps in the whole file, over all gaps within a chunk, or chunks are whole.
    for (uint64_t begin = 0; begin < size; begin += unit > 0 ? unit : size) {
      const uint64_t end = unit > 0 ? std::min(size, begin + unit) : size;
      std::optional<uint64_t> last;
      for (uint64_t i = begin; i < end; ++i) {
        if (!bytes[i]) continue;
        const uint64_t gap = last ? i - *last - 1 : 0;
        if (last && (unit > 0 || gap <= limits.coalesce_gap)) {
          std::fill_n(expected[file].begin() + static_cast<ptrdiff_t>(*last + 1), gap, true);
        }
        last = i;
      }
      if (unit > 0 && limits.whole_chunks && last) {
        std::fill(expected[file].begin() + static_cast<ptrdiff_t>(begin),
                  expected[file].begin() + static_cast<ptrdiff_t>(end), true);
      }
    }
  }
  return expected;
}

// REQUIRE for the inner loops: millions of them hold, and doctest's own bookkeeping of each is slow.
#define PLAN_REQUIRE(...) \
  if (!(__VA_ARGS__)) FAIL("does not hold: " #__VA_ARGS__)

// Carries the plan out by plain copying and compares everything with the model.
void check(const Model& model, const LoadPlan& plan, const std::vector<uint32_t>& selection,
           const PlanLimits& limits) {
  constexpr std::byte kFill{0xcd};
  std::vector<std::vector<std::byte>> regions;
  std::vector<std::vector<int>> written;
  for (const uint64_t bytes : plan.region_bytes) {
    regions.emplace_back(bytes, kFill);
    written.emplace_back(bytes, 0);
  }
  std::vector<std::vector<int>> read_times;
  for (const auto& file : model.files) read_times.emplace_back(file.size(), 0);

  uint64_t read_bytes = 0;
  const uint64_t unit = model.layout.chunk_bytes;
  std::pair<uint32_t, uint64_t> previous{0, 0};
  for (const PlannedRead& read : plan.reads) {
    const std::string name = plan.object_name(model.layout, read);
    const auto object = model.object(name);
    PLAN_REQUIRE(read.length > 0);
    PLAN_REQUIRE(read.offset <= object.size());
    PLAN_REQUIRE(read.length <= object.size() - read.offset);
    const uint64_t begin = (model.layout.object_per_chunk ? read.chunk * unit : 0) + read.offset;
    PLAN_REQUIRE(std::pair(read.file, begin) >= previous);  // in file order
    previous = {read.file, begin + read.length};
    for (uint64_t i = begin; i < begin + read.length; ++i) ++read_times[read.file][i];
    read_bytes += read.length;

    uint64_t at = read.offset;
    PLAN_REQUIRE(read.first_segment + read.segment_count <= plan.segments.size());
    for (uint64_t i = read.first_segment; i < read.first_segment + read.segment_count; ++i) {
      const PlannedSegment& segment = plan.segments[i];
      PLAN_REQUIRE(segment.size > 0);
      PLAN_REQUIRE(segment.size <= read.offset + read.length - at);
      if (segment.region != kDropped) {
        PLAN_REQUIRE(segment.region < regions.size());
        PLAN_REQUIRE(segment.offset <= regions[segment.region].size());
        PLAN_REQUIRE(segment.size <= regions[segment.region].size() - segment.offset);
        for (uint64_t j = 0; j < segment.size; ++j) {
          regions[segment.region][segment.offset + j] = object[at + j];
          ++written[segment.region][segment.offset + j];
        }
      }
      at += segment.size;
    }
    PLAN_REQUIRE(at == read.offset + read.length);

    if (unit > 0) {
      PLAN_REQUIRE(read.chunk == begin / unit);
      PLAN_REQUIRE(read.chunk == (begin + read.length - 1) / unit);
      const auto chunk = model.chunk_of(read.file, read.chunk);
      const bool whole = begin == read.chunk * unit && read.length == chunk.size();
      PLAN_REQUIRE(read.crc.has_value() == (whole && !model.layout.crcs.empty()));
      if (read.crc) PLAN_REQUIRE(*read.crc == crc32c(0, chunk));
      if (limits.whole_chunks) PLAN_REQUIRE(whole);
    } else {
      PLAN_REQUIRE(!read.crc.has_value());
      PLAN_REQUIRE(read.length <= limits.read_bytes);
    }
  }
  const auto expected = expected_bytes(model, selection, limits);
  uint64_t wanted_bytes = 0;
  for (const uint32_t tensor : selection) wanted_bytes += model.bytes_of_tensor(tensor).size();
  for (size_t file = 0; file < expected.size(); ++file) {
    PLAN_REQUIRE(std::equal(expected[file].begin(), expected[file].end(), read_times[file].begin()));
  }
  CHECK(plan.read_bytes == read_bytes);
  CHECK(plan.wanted_bytes == wanted_bytes);

  PLAN_REQUIRE(plan.placements.size() == selection.size());
  std::vector<uint32_t> placed;
  for (const Placement& placement : plan.placements) {
    placed.push_back(placement.tensor);
    const auto bytes = model.bytes_of_tensor(placement.tensor);
    PLAN_REQUIRE(placement.region < regions.size());
    const auto& region = regions[placement.region];
    PLAN_REQUIRE(placement.offset <= region.size());
    PLAN_REQUIRE(bytes.size() <= region.size() - placement.offset);
    const auto offset = static_cast<ptrdiff_t>(placement.offset);
    PLAN_REQUIRE(std::equal(bytes.begin(), bytes.end(), region.begin() + offset));
    const std::span<int> times = std::span(written[placement.region]).subspan(placement.offset, bytes.size());
    PLAN_REQUIRE(std::all_of(times.begin(), times.end(), [](int count) { return count == 1; }));
    std::fill(times.begin(), times.end(), 0);
  }
  for (const auto& region : written) {  // nothing beside the tensors was written, and no two tensors overlap
    PLAN_REQUIRE(std::all_of(region.begin(), region.end(), [](int count) { return count == 0; }));
  }
  auto sorted = selection;
  std::sort(sorted.begin(), sorted.end());
  std::sort(placed.begin(), placed.end());
  CHECK(placed == sorted);
}

void check_arenas(const Model& model, const LoadPlan& plan, const PlanLimits& limits) {
  const auto& tensors = model.index.tensors();
  std::vector<size_t> members(plan.region_bytes.size());
  std::vector<uint64_t> end(plan.region_bytes.size());
  std::pair<uint32_t, uint64_t> previous{0, 0};
  for (const Placement& placement : plan.placements) {
    const IndexedTensor& entry = tensors[placement.tensor];
    const uint64_t bytes = entry.info.end - entry.info.begin;
    PLAN_REQUIRE(std::pair(entry.file, entry.info.begin) >= previous);
    previous = {entry.file, entry.info.begin};
    PLAN_REQUIRE(placement.offset % limits.alignment == 0);
    PLAN_REQUIRE(placement.offset >= end[placement.region]);
    PLAN_REQUIRE(placement.offset - end[placement.region] < limits.alignment);
    if (members[placement.region]++ == 0 && placement.region > 0) {
      // A new arena was begun because the one before had no room.
      const uint64_t before = plan.region_bytes[placement.region - 1];
      const uint64_t next = (before + limits.alignment - 1) / limits.alignment * limits.alignment;
      PLAN_REQUIRE(next + bytes > limits.max_arena_bytes);
    }
    end[placement.region] = placement.offset + bytes;
  }
  for (size_t region = 0; region < plan.region_bytes.size(); ++region) {
    PLAN_REQUIRE(members[region] > 0);
    PLAN_REQUIRE(plan.region_bytes[region] == end[region]);
    if (plan.region_bytes[region] > limits.max_arena_bytes) PLAN_REQUIRE(members[region] == 1);
  }
}

std::vector<uint32_t> all_of(const Model& model) {
  std::vector<uint32_t> selection(model.index.tensors().size());
  std::iota(selection.begin(), selection.end(), 0u);
  return selection;
}

TEST_CASE("random plans read exactly what they should and put every byte in its place") {
  std::mt19937_64 random(42);
  for (int round = 0; round < 400; ++round) {
    CAPTURE(round);
    Model model;
    for (uint64_t files = pick(random, 1, 4); files > 0; --files) {
      std::vector<int64_t> sizes;
      const uint64_t largest = pick(random, 0, 2) == 0 ? 20 : 1500;
      for (uint64_t tensors = pick(random, 0, 12); tensors > 0; --tensors) {
        const uint64_t kind = pick(random, 0, 7);
        sizes.push_back(kind == 0 ? 0 : kind == 1 ? kScalar : static_cast<int64_t>(pick(random, 1, largest)));
      }
      model.add_file(sizes, random());
    }
    if (round % 5 == 0) model.add_blocks(pick(random, 0, 500), pick(random, 1, 200), random());
    constexpr uint64_t kChunks[] = {0, 0, 1, 7, 64, 500, 4096, 100000};
    uint64_t chunk_bytes = kChunks[pick(random, 0, 7)];
    if (chunk_bytes == 64 && pick(random, 0, 1) == 0)
      chunk_bytes = model.files[0].size();  // the file ends with a chunk
    if (chunk_bytes == 500 && model.files[0].size() % 2 == 0) chunk_bytes = model.files[0].size() / 2;
    model.divide(chunk_bytes, chunk_bytes > 0 && pick(random, 0, 1) == 0,
                 chunk_bytes > 0 && pick(random, 0, 2) > 0);
    model.layout.validate();

    PlanLimits limits;
    limits.whole_chunks = pick(random, 0, 1) == 0;
    limits.read_bytes = pick(random, 1, pick(random, 0, 1) == 0 ? 50 : 5000);
    limits.coalesce_gap = pick(random, 0, 2) == 0 ? 0 : pick(random, 1, 600);
    limits.alignment = uint64_t{1} << pick(random, 0, 8);
    limits.max_arena_bytes = pick(random, 1, 4000);

    std::vector<uint32_t> selection;
    const uint64_t share = pick(random, 0, 4);
    for (const uint32_t tensor : all_of(model)) {
      if (pick(random, 1, 4) <= share) selection.push_back(tensor);
    }
    std::shuffle(selection.begin(), selection.end(), random);

    const LoadPlan packed = plan_into_arenas(model.index, model.layout, selection, limits);
    check(model, packed, selection, limits);
    check_arenas(model, packed, limits);
    const LoadPlan apart = plan_into_tensors(model.index, model.layout, selection, limits);
    check(model, apart, selection, limits);
    REQUIRE(apart.region_bytes.size() == selection.size());
    for (size_t i = 0; i < selection.size(); ++i) {
      REQUIRE(apart.placements[i].tensor == selection[i]);
      REQUIRE(apart.placements[i].region == i);
      REQUIRE(apart.placements[i].offset == 0);
      REQUIRE(apart.region_bytes[i] == model.bytes_of_tensor(selection[i]).size());
    }
  }
}

TEST_CASE("an empty selection and a selection of empty tensors read nothing") {
  Model model;
  model.add_file({0, 100, 0}, 1);
  model.divide(64, true, true);
  const LoadPlan none = plan_into_arenas(model.index, model.layout, {}, {});
  CHECK(none.reads.empty());
  CHECK(none.region_bytes.empty());
  CHECK(none.placements.empty());
  std::vector<uint32_t> empties;
  for (const uint32_t tensor : all_of(model)) {
    if (model.bytes_of_tensor(tensor).empty()) empties.push_back(tensor);
  }
  REQUIRE(empties.size() == 2);
  for (const LoadPlan& plan : {plan_into_arenas(model.index, model.layout, empties, {}),
                               plan_into_tensors(model.index, model.layout, empties, {})}) {
    CHECK(plan.reads.empty());
    CHECK(plan.read_bytes == 0);
    CHECK(plan.wanted_bytes == 0);
    CHECK(plan.placements.size() == 2);
  }
}

TEST_CASE("a plan names each file that it reads, once") {
  Model model;
  model.add_file({100, 200}, 1);
  model.add_file({0}, 2);
  model.add_file({300}, 3);
  PlanLimits limits;
  limits.read_bytes = 50;
  const LoadPlan plan = plan_into_arenas(model.index, model.layout, all_of(model), limits);
  CHECK(plan.reads.size() > 2);
  CHECK(plan.files() == std::vector<uint32_t>{0, 2});
}

TEST_CASE("neighbours that stay neighbours are one segment of one read") {
  Model model;
  model.add_blocks(64 * 10, 64, 1);
  const LoadPlan plan = plan_into_arenas(model.index, model.layout, all_of(model), {});
  REQUIRE(plan.reads.size() == 1);
  CHECK(plan.reads[0].segment_count == 1);
  CHECK(plan.region_bytes == std::vector<uint64_t>{640});
}

TEST_CASE("ranges are joined over a gap of just the bound, and not over one byte more") {
  Model model;
  model.add_blocks(100, 10, 1);
  PlanLimits limits;
  limits.coalesce_gap = 20;
  CHECK(plan_into_tensors(model.index, model.layout, std::vector<uint32_t>{0, 3}, limits).reads.size() == 1);
  limits.coalesce_gap = 19;
  CHECK(plan_into_tensors(model.index, model.layout, std::vector<uint32_t>{0, 3}, limits).reads.size() == 2);
  limits.coalesce_gap = 0;
  CHECK(plan_into_tensors(model.index, model.layout, std::vector<uint32_t>{0, 1}, limits).reads.size() == 1);
}

TEST_CASE("amplification: one wanted byte of a chunk costs the chunk, or one byte without verification") {
  Model model;
  model.add_blocks(10000, 1, 1);
  model.divide(1000, true, true);
  const std::vector<uint32_t> selection{2500};
  PlanLimits limits;
  const LoadPlan whole = plan_into_arenas(model.index, model.layout, selection, limits);
  CHECK(whole.wanted_bytes == 1);
  CHECK(whole.read_bytes == 1000);
  REQUIRE(whole.reads.size() == 1);
  CHECK(whole.object_name(model.layout, whole.reads[0]) == "model/0/2");
  CHECK(whole.reads[0].segment_count == 3);
  limits.whole_chunks = false;
  const LoadPlan part = plan_into_arenas(model.index, model.layout, selection, limits);
  CHECK(part.read_bytes == 1);
  CHECK(part.reads[0].offset == 500);
  CHECK_FALSE(part.reads[0].crc.has_value());
}

TEST_CASE("an arena is as large as allowed, and a larger tensor lives alone") {
  Model model;
  model.add_file({100, 28, 128, 1, 500, 1, 63}, 1);
  PlanLimits limits;
  limits.max_arena_bytes = 256;
  const LoadPlan plan = plan_into_arenas(model.index, model.layout, all_of(model), limits);
  CHECK(plan.region_bytes == std::vector<uint64_t>{156, 192 + 1 - 64, 500, 127});
  check_arenas(model, plan, limits);
}

TEST_CASE("a layout has a checksum for every chunk of every file, or none at all") {
  Model model;
  model.add_blocks(1000, 1000, 1);
  model.add_blocks(0, 1000, 2);
  model.add_blocks(1001, 1001, 3);
  model.divide(500, true, true);
  CHECK(model.layout.chunk_count(0) == 2);
  CHECK(model.layout.chunk_count(1) == 0);
  CHECK(model.layout.chunk_count(2) == 3);
  CHECK_NOTHROW(model.layout.validate());
  StoreLayout missing = model.layout, beyond = model.layout, none = model.layout;
  missing.crcs.pop_back();
  beyond.files[2].first_chunk = UINT64_MAX;
  none.crcs.clear();
  CHECK_THROWS_AS(missing.validate(), Error);
  CHECK_THROWS_AS(beyond.validate(), Error);
  CHECK_NOTHROW(none.validate());
}

TEST_CASE("selections and limits that make no sense are refused") {
  Model model;
  model.add_blocks(100, 10, 1);
  const auto tensors = static_cast<uint32_t>(model.index.tensors().size());
  REQUIRE(tensors > 0);
  CHECK_THROWS_AS(plan_into_arenas(model.index, model.layout, {0, 0}, {}), Error);
  CHECK_THROWS_AS(plan_into_tensors(model.index, model.layout, std::vector<uint32_t>{tensors}, {}), Error);
  PlanLimits limits;
  limits.read_bytes = 0;
  CHECK_THROWS_AS(plan_into_arenas(model.index, model.layout, {0}, limits), Error);
}

TEST_CASE("sizes near 2^64 do not wrap into a place that is taken") {
  constexpr uint64_t kHuge = uint64_t{1} << 62;
  TensorIndex index;
  StoreLayout layout;
  for (uint32_t file = 0; file < 3; ++file) {
    index.add_blocks(file, kHuge, kHuge);
    layout.files.push_back({"f", kHuge, 0});
  }
  const std::vector<uint32_t> all{0, 1, 2};
  PlanLimits limits;
  limits.read_bytes = kHuge;
  limits.max_arena_bytes = std::numeric_limits<uint64_t>::max();
  limits.alignment = 2 * kHuge;  // the second tensor begins there; for a third there is no room below 2^64
  const LoadPlan plan = plan_into_arenas(index, layout, all, limits);
  CHECK(plan.region_bytes == std::vector<uint64_t>{3 * kHuge, kHuge});
  CHECK(plan.placements[1].offset == 2 * kHuge);
  CHECK(plan.placements[2].region == 1);
}

TEST_CASE("the last chunk of a file near 2^64 is counted, and its checksum asked for") {
  const uint64_t bytes = std::numeric_limits<uint64_t>::max() - 2;
  StoreLayout layout;
  layout.files.push_back({"f/", bytes, 0});
  layout.chunk_bytes = uint64_t{1} << 63;
  CHECK(layout.chunk_count(0) == 2);
  layout.crcs = {7};
  CHECK_THROWS_AS(layout.validate(), Error);
}

TEST_CASE("a layout without a tensor's file or with a shorter one is refused") {
  Model model;
  model.add_blocks(100, 100, 1);
  model.add_blocks(100, 100, 2);
  const std::vector<uint32_t> second{1};
  CHECK(plan_into_tensors(model.index, model.layout, second, {}).read_bytes == 100);
  const auto code = [&] {
    try {
      plan_into_tensors(model.index, model.layout, second, {});
    } catch (const Error& error) {
      return error.code();
    }
    return ErrorCode::kCancelled;
  };
  model.layout.files[1].bytes = 99;
  CHECK(code() == ErrorCode::kInvalid);
  model.layout.files.pop_back();
  CHECK(code() == ErrorCode::kInvalid);
}

}  // namespace
}  // namespace rdmaload
