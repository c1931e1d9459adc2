// What the server holds: immutable values, ranges of exported files, and sets of names, by key.
//
// Replacing a value is atomic: a reader has the old one or the new one, and keeps what it has. Keys and names
// count against the memory limit as values do. Exported keys cannot be written. Any thread may call
// everything.
//
// SCAN's contract: every key gets a number that only grows when it is created, and a cursor is the number to
// go on from. So a key that is there from the beginning to the end of a scan comes exactly once.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "server/exported_file.h"
#include "server/value.h"

namespace rdmaload::server {

enum class Outcome {
  kDone,
  kNotDone,    // a condition did not hold
  kWrongType,  // the key holds a set, or no set
  kReadOnly,   // exported from a directory
  kNoMemory,
};

enum class SetCondition { kAlways, kIfAbsent, kIfPresent };
enum class Kind { kNone, kString, kSet };

// Nothing, or what answers a GET.
using Content = std::variant<std::monostate, ValuePtr, FileRange>;

uint64_t content_bytes(const Content& content) noexcept;

struct Found {
  Outcome outcome = Outcome::kDone;  // kDone with nothing in it: there is no such key
  Content content;
};

struct Counted {
  Outcome outcome = Outcome::kDone;
  uint64_t count = 0;
};

struct ScanPage {
  uint64_t cursor = 0;  // 0: there is no more
  std::vector<std::string> keys;
};

class Store {
 public:
  explicit Store(std::shared_ptr<ValueMemory> memory) : memory_(std::move(memory)) {}
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  Found get(std::string_view key) const;
  Kind kind(std::string_view key) const;
  Outcome set(std::string_view key, ValuePtr value, SetCondition condition);
  // Counts the keys that were there; kReadOnly when one of them is exported, and then nothing was removed.
  Counted remove(std::span<const std::string_view> keys);
  // A key that is exported replaces nothing that a client has written: throws Error(kInvalid) when it is
  // there.
  void export_range(std::string_view key, FileRange range);
  // Replaces an exported value of that key.
  void export_value(std::string_view key, ValuePtr value);
  // Exports what is under the key `of` as `key`, too. Throws Error(kInvalid) when there is no value.
  void export_copy(std::string_view key, std::string_view of);
  // From now on the key is like those that clients write: it can be replaced and removed.
  void unlock(std::string_view key);

  Counted add_members(std::string_view key, std::span<const std::string_view> members);
  Counted remove_members(std::string_view key, std::span<const std::string_view> members);
  Counted has_member(std::string_view key, std::string_view member) const;
  // The members as bulk strings back to back, made once per change: readers share it. `count` says how many.
  Outcome members(std::string_view key, ValuePtr& encoded, uint64_t& count);

  // Looks at up to `count` keys from `cursor` on, and no further when they have `max_bytes`; keeps those that
  // `wanted` takes.
  ScanPage scan(uint64_t cursor, uint64_t count, uint64_t max_bytes,
                const std::function<bool(std::string_view key, Kind kind)>& wanted) const;

  uint64_t size() const;
  const std::shared_ptr<ValueMemory>& memory() const noexcept { return memory_; }

 private:
  struct Names {
    std::set<std::string, std::less<>> members;
    ValuePtr encoded;  // null after a change
  };
  struct Entry {
    std::variant<ValuePtr, FileRange, Names> content;
    uint64_t number = 0;
    bool exported = false;
  };
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const noexcept { return std::hash<std::string_view>()(text); }
  };
  using Entries = std::unordered_map<std::string, Entry, Hash, std::equal_to<>>;

  static Kind kind_of(const Entry& entry) noexcept;
  Entry& insert(std::string_view key);
  void erase(Entries::iterator at);
  Entry& insert_exported(std::string_view key);

  std::shared_ptr<ValueMemory> memory_;
  mutable std::shared_mutex mutex_;
  Entries entries_;                                  // Guarded by mutex_, as is what follows.
  std::map<uint64_t, const std::string*> in_order_;  // by number; points to the key in entries_
  uint64_t next_number_ = 1;
};

}  // namespace rdmaload::server
