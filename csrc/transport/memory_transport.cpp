#include "transport/memory_transport.h"

#include "transport/segment_cursor.h"

namespace rdmaload {

MemoryTransport::MemoryTransport(int threads) : ThreadedTransport(threads) { start(); }

void MemoryTransport::put(const std::string& object, std::vector<std::byte> bytes) {
  std::lock_guard lock(mutex_);
  objects_[object] = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
}

void MemoryTransport::remove(const std::string& object) {
  std::lock_guard lock(mutex_);
  objects_.erase(object);
}

std::optional<Status> MemoryTransport::perform(Read& read) {
  std::shared_ptr<const std::vector<std::byte>> bytes;
  {
    std::lock_guard lock(mutex_);
    const auto found = objects_.find(read.object);
    if (found != objects_.end()) bytes = found->second;
  }
  if (!bytes) return Status(ErrorCode::kNotFound, "there is no object '" + read.object + "'");
  if (bytes->size() != read.object_bytes) {
    return Status(ErrorCode::kIntegrity, "object '" + read.object + "' has " + std::to_string(bytes->size()) +
                                             " bytes, expected " + std::to_string(read.object_bytes));
  }
  if (read.offset > bytes->size() || read.length > bytes->size() - read.offset) {
    return Status(ErrorCode::kInvalid, "the range lies outside of object '" + read.object + "'");
  }
  SegmentCursor cursor(read);
  cursor.copy_from(std::span(*bytes).subspan(read.offset, read.length));
  read.copied_bytes = 0;  // this copy is the transfer itself
  return Status();
}

}  // namespace rdmaload
