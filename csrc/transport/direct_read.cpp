#include "transport/direct_read.h"

#include <algorithm>
#include <array>
#include <cerrno>

namespace rdmaload {
namespace {

// A way into a tensor of its own is worth a vector; less goes with its neighbours through the bounce buffer.
constexpr uint64_t kSmallestRunBytes = 16 << 10;
constexpr size_t kMaxVectors = 64;

// The blocks [begin, end) of the file as runs that end up in place and runs that are bounced, in turns.
class Runs {
 public:
  Runs(uint64_t begin, uint64_t end, std::span<std::byte> bounce) : end_(end), at_(begin), bounce_(bounce) {}

  bool has_room() const {
    return count_ + 3 <= kMaxVectors;
  }  // one in place, one bounced before and one after
  void add_in_place(uint64_t begin, uint64_t end, std::byte* data) {
    bounce_until(begin);
    vectors_[count_++] = {data, static_cast<size_t>(end - begin)};
    at_ = end;
  }
  void finish() { bounce_until(end_); }
  std::span<const iovec> vectors() const { return {vectors_.data(), count_}; }

 private:
  void bounce_until(uint64_t end) {
    if (end == at_) return;
    const auto size = static_cast<size_t>(end - at_);
    vectors_[count_++] = {bounce_.data(), size};
    bounce_ = bounce_.subspan(size);
    at_ = end;
  }

  const uint64_t end_;
  uint64_t at_;
  std::span<std::byte> bounce_;
  std::array<iovec, kMaxVectors> vectors_;
  size_t count_ = 0;
};

}  // namespace

ssize_t read_direct_piece(const FileCalls& calls, const OpenFile& file, uint64_t offset,
                          SegmentCursor& cursor, std::span<std::byte> bounce) {
  const uint64_t memory_alignment = file.direct_alignment().memory;
  const uint64_t block = file.direct_alignment().offset;
  const auto up = [block](uint64_t value) { return (value + block - 1) / block * block; };
  const uint64_t begin = offset / block * block;
  const uint64_t wanted_end = offset + std::min<uint64_t>(cursor.left(), begin + bounce.size() - offset);

  Runs runs(begin, up(wanted_end), bounce);
  uint64_t at = offset;
  cursor.peek(wanted_end - offset, [&](const Segment& segment) {
    const uint64_t first = up(at), last = (at + segment.size) / block * block;
    if (segment.data != nullptr && first < last && last - first >= kSmallestRunBytes && runs.has_room()) {
      std::byte* const place = segment.data + (first - at);
      if (reinterpret_cast<uintptr_t>(place) % memory_alignment == 0) runs.add_in_place(first, last, place);
    }
    at += segment.size;
  });
  runs.finish();

  const auto vectors = runs.vectors();
  const ssize_t got = calls.preadv_direct(file.direct_fd(), vectors.data(), static_cast<int>(vectors.size()),
                                          static_cast<off_t>(begin));
  if (got < 0) return -errno;

  // What arrived is handed over in order, without the parts of the first and last block that nobody asked
  // for.
  const uint64_t end = std::min(wanted_end, begin + static_cast<uint64_t>(got));
  uint64_t from = begin;
  for (const iovec& vector : vectors) {
    const uint64_t skipped = offset > from ? offset - from : 0;
    const uint64_t until = std::min(end, from + vector.iov_len);
    if (until > from + skipped) {
      auto* const data = static_cast<std::byte*>(vector.iov_base) + skipped;
      const auto size = static_cast<size_t>(until - from - skipped);
      const bool is_bounced = data >= bounce.data() && data < bounce.data() + bounce.size();
      if (is_bounced) {
        cursor.copy_from({data, size});
      } else {
        const iovec in_place{data, size};
        cursor.advance({&in_place, 1}, size);
      }
    }
    from += vector.iov_len;
  }
  return end > offset ? static_cast<ssize_t>(end - offset) : 0;
}

}  // namespace rdmaload
