// Replies of one connection that wait to be sent: text of our own, and references to stored values and file
// ranges.
//
// A value is never copied: its reply is a short header, a reference and a line end. What waits therefore
// costs text and references only, both of which the session bounds. Text of consecutive small replies grows
// together. A value's bytes may also have a place in the client's memory, where only RDMA can put them. One
// thread.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>

#include "server/store.h"

namespace rdmaload::server {

// Where in the client's memory bytes go, as an RDMA write names it.
struct RemotePlace {
  uint64_t address;
  uint32_t key;
};

class ReplyQueue {
 public:
  void text(std::string_view text);
  void content(const Content& content, uint64_t offset, uint64_t length);
  // No part of the stream: written to the client's memory, before what is added later is sent.
  void placed(const Content& content, uint64_t offset, uint64_t length, RemotePlace place);

  bool empty() const noexcept { return pieces_.empty(); }
  size_t pieces() const noexcept { return pieces_.size(); }
  size_t text_bytes() const noexcept { return text_bytes_; }
  uint64_t bytes() const noexcept { return bytes_; }  // values and files included
  // What it has taken from the system: text and references.
  size_t held_bytes() const noexcept { return text_bytes_ + pieces_.size() * sizeof(Piece); }

  // What to send next is either memory (returns how many of `vectors` it filled, with at most `max_bytes`),
  // or what is not (returns 0: see front()): a file's range, and of values what `large` says. kApart: what is
  // left of one in a slab, if it is large. kByReference: one that is so large that the huge pages which
  // references to it keep are not many times its size, even when it is gone from the store.
  enum class Large { kAsMemory, kApart, kByReference };
  size_t gather(std::span<iovec> vectors, uint64_t max_bytes, Large large) const;

  // The first piece, for who treats each kind in its own way. Only of a queue that is not empty.
  struct Front {
    std::string_view text;                     // empty: a value or a file
    ValuePtr value;                            // bytes [offset, offset + length) of it
    std::shared_ptr<const ExportedFile> file;  // or of it
    uint64_t offset;
    uint64_t length;
    std::optional<RemotePlace> place;
    bool more_placed;  // the next piece has a place, too
  };
  Front front() const;
  // The first `bytes` were sent.
  void sent(uint64_t bytes);
  void clear();

 private:
  struct Piece {
    // Text, or a reference to what is stored.
    std::variant<std::string, ValuePtr, FileRange> source;
    uint64_t offset = 0;  // of what is left
    uint64_t length = 0;
    std::optional<RemotePlace> place;
    uint64_t asked = 0;  // its length before anything was sent
  };

  static bool by_reference(const Piece& piece, Large large);
  void add(const Content& content, uint64_t offset, uint64_t length, std::optional<RemotePlace> place);

  std::deque<Piece> pieces_;
  size_t text_bytes_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace rdmaload::server
