#include "transport/rdma/run_plan.h"

#include <functional>
#include <string>

namespace rdmaload::rdma {
namespace {

constexpr size_t kCrlfBytes = 2;

// Whether [begin, end) lies in `memory`. Addresses of different blocks are compared, which std::less orders.
bool within(std::span<std::byte> memory, const std::byte* begin, const std::byte* end) {
  const std::less_equal<const std::byte*> at_most;
  return !memory.empty() && at_most(memory.data(), begin) && at_most(end, memory.data() + memory.size());
}

}  // namespace

size_t bulk_header_bytes(uint64_t length) { return 1 + std::to_string(length).size() + kCrlfBytes; }

uint64_t bulk_reply_bytes(uint64_t length) { return bulk_header_bytes(length) + length + kCrlfBytes; }

RunValue value_of(const Read& read) {
  RunValue value;
  value.length = read.length;
  std::span<std::byte> stretch;
  bool is_front = true;
  const auto end_stretch = [&] {
    if (is_front) value.front = stretch;
    is_front = false;
  };
  for (const Segment& segment : read.segments) {
    if (segment.size == 0) continue;
    if (segment.data != nullptr && !stretch.empty() && stretch.data() + stretch.size() == segment.data) {
      stretch = {stretch.data(), stretch.size() + segment.size};
      continue;
    }
    if (!stretch.empty()) end_stretch();
    stretch = {};
    if (segment.data == nullptr) {
      is_front = false;
    } else {
      stretch = {segment.data, segment.size};
    }
  }
  if (!stretch.empty()) end_stretch();
  value.back = stretch;
  return value;
}

std::vector<RunStep> plan_run(std::span<const RunValue> values, uint64_t window_bytes) {
  std::vector<RunStep> steps(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const RunValue& value = values[i];
    RunStep& step = steps[i];
    const size_t header = bulk_header_bytes(value.length);
    step.reply_bytes = header + value.length + kCrlfBytes;
    step.fills_window = step.reply_bytes == window_bytes;
    if (i == 0 || i + 1 == values.size() || !step.fills_window || !value.contiguous()) continue;
    std::byte* begin = value.front.data();
    std::byte* end = begin + value.length;
    const std::span<std::byte> before = values[i - 1].back;
    const std::span<std::byte> behind = values[i + 1].front;
    if (before.size() < header || before.data() + before.size() != begin) continue;
    if (behind.size() < kCrlfBytes || behind.data() != end) continue;
    if (!within(value.registered, begin - header, end + kCrlfBytes)) continue;
    step.direct = true;
    step.window = begin - header;
    step.kept_bytes = steps[i - 1].direct ? header : 0;
    steps[i - 1].ends_after_next = true;
  }
  return steps;
}

}  // namespace rdmaload::rdma
