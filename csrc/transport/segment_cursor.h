// Walks the segments of a read as bytes arrive: where the next bytes go, and the checksum of what came.
//
// A value tied to one Read; used by one thread. Dropped bytes land in a scratch buffer of the caller.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <cstring>
#include <span>

#include "core/crc32c.h"
#include "transport/transport.h"

namespace rdmaload {

class SegmentCursor {
 public:
  SegmentCursor() = default;
  explicit SegmentCursor(Read& read) : read_(&read), left_(read.length) {
    read.crc = 0;
    read.digest = 0;
    read.copied_bytes = 0;
    read.checksum_time = {};
    skip_empty();
  }
  // Goes on after the bytes that an earlier attempt left in place (Read::received), with their checksum.
  static SegmentCursor resumed(Read& read) {
    SegmentCursor cursor;
    cursor.read_ = &read;
    cursor.left_ = read.length - read.received;
    if (read.received == 0) read.crc = 0;
    if (read.received == 0) read.digest = 0;
    read.copied_bytes = 0;
    read.checksum_time = {};
    cursor.skip_empty();
    for (uint64_t skip = read.received; skip > 0;) {
      const uint64_t size = std::min<uint64_t>(skip, read.segments[cursor.segment_].size - cursor.within_);
      cursor.step(size);
      skip -= size;
    }
    return cursor;
  }

  uint64_t left() const noexcept { return left_; }
  bool checksums() const noexcept { return read_->checksum || read_->digest_kind != CrcKind::kNone; }

  // Fills `vectors` with the places of the next bytes, at most max_bytes of them. Dropped bytes go to
  // `scratch` (over and over: they are checksummed before the next call). Returns how many vectors were
  // filled.
  size_t next(std::span<iovec> vectors, size_t max_bytes, std::span<std::byte> scratch) const noexcept {
    size_t count = 0;
    size_t segment = segment_, within = within_, scratch_used = 0;
    while (count < vectors.size() && max_bytes > 0 && segment < read_->segments.size()) {
      const Segment& piece = read_->segments[segment];
      size_t size = std::min(piece.size - within, max_bytes);
      if (piece.data == nullptr) {
        size = std::min(size, scratch.size() - scratch_used);
        if (size == 0) break;
        vectors[count++] = {scratch.data() + scratch_used, size};
        scratch_used += size;
      } else if (size > 0) {
        vectors[count++] = {piece.data + within, size};
      }
      max_bytes -= size;
      within += size;
      if (within == piece.size) {
        ++segment;
        within = 0;
      } else {
        break;
      }
    }
    return count;
  }

  // Calls visit(segment) with what is left of each segment that the next max_bytes bytes belong to, in order.
  template <typename Visit>
  void peek(uint64_t max_bytes, Visit&& visit) const {
    size_t within = within_;
    for (size_t segment = segment_; max_bytes > 0 && segment < read_->segments.size();
         ++segment, within = 0) {
      const Segment& piece = read_->segments[segment];
      const size_t size = std::min<uint64_t>(piece.size - within, max_bytes);
      if (size > 0) visit(Segment{piece.data == nullptr ? nullptr : piece.data + within, size});
      max_bytes -= size;
    }
  }

  // `bytes` have arrived in the places that next() gave: checksum them, in order, and move on.
  void advance(std::span<const iovec> vectors, size_t bytes) noexcept {
    left_ -= bytes;
    const bool first = read_->times.first_byte == Clock::time_point{};
    const auto begin = checksums() || first ? Clock::now() : Clock::time_point{};
    if (first) read_->times.first_byte = begin;
    for (const iovec& vector : vectors) {
      const size_t size = std::min(vector.iov_len, bytes);
      if (size == 0) break;
      check({static_cast<const std::byte*>(vector.iov_base), size});
      bytes -= size;
      step(size);
    }
    if (checksums()) read_->checksum_time += Clock::now() - begin;
    skip_empty();
  }

  // Bytes that are in user memory already are copied to their places (and counted).
  void copy_from(std::span<const std::byte> bytes) noexcept {
    left_ -= bytes.size();
    if (read_->times.first_byte == Clock::time_point{}) read_->times.first_byte = Clock::now();
    read_->copied_bytes += bytes.size();
    check(bytes);
    while (!bytes.empty()) {
      const Segment& piece = read_->segments[segment_];
      const size_t size = std::min(piece.size - within_, bytes.size());
      if (piece.data != nullptr && size > 0) std::memcpy(piece.data + within_, bytes.data(), size);
      bytes = bytes.subspan(size);
      step(size);
    }
    skip_empty();
  }

 private:
  void check(std::span<const std::byte> bytes) noexcept {
    if (read_->checksum) read_->crc = crc32c(read_->crc, bytes);
    if (read_->digest_kind != CrcKind::kNone) read_->digest = crc(read_->digest_kind, read_->digest, bytes);
  }
  void step(size_t size) noexcept {
    within_ += size;
    if (within_ == read_->segments[segment_].size) {
      ++segment_;
      within_ = 0;
      skip_empty();
    }
  }
  void skip_empty() noexcept {
    while (segment_ < read_->segments.size() && read_->segments[segment_].size == 0) ++segment_;
  }

  Read* read_ = nullptr;
  uint64_t left_ = 0;
  size_t segment_ = 0;
  size_t within_ = 0;
};

}  // namespace rdmaload
