#include "server/reply_queue.h"

#include <algorithm>
#include <cassert>

namespace rdmaload::server {
namespace {

// Above, a new piece of text is begun: appending must not move what is long.
constexpr size_t kTextPieceBytes = 16 << 10;

// Copying less costs less than a work request of its own.
constexpr uint64_t kApartBytes = 32 << 10;

// A reference to one byte keeps the huge page of 2 MiB that it lies in: at most four times what was asked
// for.
constexpr uint64_t kByReferenceBytes = 512 << 10;

}  // namespace

void ReplyQueue::text(std::string_view text) {
  if (text.empty()) return;
  text_bytes_ += text.size();
  bytes_ += text.size();
  if (!pieces_.empty()) {
    Piece& last = pieces_.back();
    auto* held = std::get_if<std::string>(&last.source);
    if (held != nullptr && held->size() + text.size() <= kTextPieceBytes) {
      held->append(text);
      last.length += text.size();
      return;
    }
  }
  pieces_.push_back(Piece{std::string(text), 0, text.size(), std::nullopt, text.size()});
}

void ReplyQueue::content(const Content& content, uint64_t offset, uint64_t length) {
  add(content, offset, length, std::nullopt);
}

void ReplyQueue::placed(const Content& content, uint64_t offset, uint64_t length, RemotePlace place) {
  add(content, offset, length, place);
}

void ReplyQueue::add(const Content& content, uint64_t offset, uint64_t length,
                     std::optional<RemotePlace> place) {
  if (length == 0) return;
  bytes_ += length;
  if (const auto* value = std::get_if<ValuePtr>(&content)) {
    pieces_.push_back(Piece{*value, offset, length, place, length});
  } else {
    const auto& range = std::get<FileRange>(content);
    pieces_.push_back(Piece{range, range.offset + offset, length, place, length});
  }
}

bool ReplyQueue::by_reference(const Piece& piece, Large large) {
  if (piece.place) return true;
  const auto* value = std::get_if<ValuePtr>(&piece.source);
  if (value == nullptr) return std::holds_alternative<FileRange>(piece.source);
  switch (large) {
    case Large::kAsMemory:
      return false;
    case Large::kApart:
      return piece.length >= kApartBytes && (*value)->in_slab();
    case Large::kByReference:
      return piece.asked >= kByReferenceBytes && (*value)->can_refer();
  }
  return false;
}

size_t ReplyQueue::gather(std::span<iovec> vectors, uint64_t max_bytes, Large large) const {
  size_t count = 0;
  uint64_t bytes = 0;
  for (const Piece& piece : pieces_) {
    if (count == vectors.size() || bytes >= max_bytes) break;
    const char* data = nullptr;
    if (const auto* text = std::get_if<std::string>(&piece.source)) {
      data = text->data() + piece.offset;
    } else if (const auto* value = std::get_if<ValuePtr>(&piece.source);
               value != nullptr && !by_reference(piece, large)) {
      data = reinterpret_cast<const char*>((*value)->bytes().data()) + piece.offset;
    } else {
      break;
    }
    const uint64_t length = std::min(piece.length, max_bytes - bytes);
    vectors[count++] = iovec{const_cast<char*>(data), static_cast<size_t>(length)};
    bytes += length;
  }
  return count;
}

ReplyQueue::Front ReplyQueue::front() const {
  const Piece& piece = pieces_.front();
  const bool more_placed = pieces_.size() > 1 && pieces_[1].place.has_value();
  Front front{{}, nullptr, nullptr, piece.offset, piece.length, piece.place, more_placed};
  if (const auto* text = std::get_if<std::string>(&piece.source)) {
    front.text = std::string_view(*text).substr(piece.offset, piece.length);
  } else if (const auto* value = std::get_if<ValuePtr>(&piece.source)) {
    front.value = *value;
  } else {
    front.file = std::get<FileRange>(piece.source).file;
  }
  return front;
}

void ReplyQueue::sent(uint64_t bytes) {
  assert(bytes <= bytes_);
  bytes_ -= bytes;
  while (bytes > 0) {
    Piece& piece = pieces_.front();
    const uint64_t part = std::min(bytes, piece.length);
    piece.offset += part;
    piece.length -= part;
    if (piece.place) piece.place->address += part;
    bytes -= part;
    if (std::holds_alternative<std::string>(piece.source)) text_bytes_ -= part;
    if (piece.length == 0) pieces_.pop_front();
  }
}

void ReplyQueue::clear() {
  pieces_.clear();
  text_bytes_ = 0;
  bytes_ = 0;
}

}  // namespace rdmaload::server
