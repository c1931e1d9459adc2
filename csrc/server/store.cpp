#include "server/store.h"

#include <cstring>
#include <mutex>
#include <utility>

#include "core/error.h"

namespace rdmaload::server {
namespace {

// What a key costs beside its text: the nodes of the table and of the order, and their share of the table.
constexpr uint64_t kKeyOverhead = 256;
constexpr uint64_t kMemberOverhead = 96;

uint64_t key_cost(std::string_view key) { return kKeyOverhead + key.size(); }
uint64_t member_cost(std::string_view member) { return kMemberOverhead + member.size(); }

}  // namespace

uint64_t content_bytes(const Content& content) noexcept {
  if (const auto* value = std::get_if<ValuePtr>(&content)) return (*value)->bytes().size();
  if (const auto* range = std::get_if<FileRange>(&content)) return range->length;
  return 0;
}

Store::~Store() {
  while (!entries_.empty()) erase(entries_.begin());
}

Kind Store::kind_of(const Entry& entry) noexcept {
  return std::holds_alternative<Names>(entry.content) ? Kind::kSet : Kind::kString;
}

Found Store::get(std::string_view key) const {
  const std::shared_lock lock(mutex_);
  const auto at = entries_.find(key);
  if (at == entries_.end()) return {};
  if (const auto* value = std::get_if<ValuePtr>(&at->second.content)) return {Outcome::kDone, *value};
  if (const auto* range = std::get_if<FileRange>(&at->second.content)) return {Outcome::kDone, *range};
  return {Outcome::kWrongType, {}};
}

Kind Store::kind(std::string_view key) const {
  const std::shared_lock lock(mutex_);
  const auto at = entries_.find(key);
  return at == entries_.end() ? Kind::kNone : kind_of(at->second);
}

Outcome Store::set(std::string_view key, ValuePtr value, SetCondition condition) {
  ValuePtr old;  // given up after the lock: unmapping takes time
  const std::unique_lock lock(mutex_);
  const auto at = entries_.find(key);
  if (at == entries_.end()) {
    if (condition == SetCondition::kIfPresent) return Outcome::kNotDone;
    if (!memory_->charge(key_cost(key))) return Outcome::kNoMemory;
    insert(key).content = std::move(value);
    return Outcome::kDone;
  }
  if (condition == SetCondition::kIfAbsent) return Outcome::kNotDone;
  Entry& entry = at->second;
  if (entry.exported) return Outcome::kReadOnly;
  if (const auto* names = std::get_if<Names>(&entry.content)) {
    for (const std::string& member : names->members) memory_->release(member_cost(member));
    entry.content = std::move(value);
    return Outcome::kDone;
  }
  if (auto* held = std::get_if<ValuePtr>(&entry.content)) old = std::move(*held);
  entry.content = std::move(value);  // or a file's range, that was exported once
  return Outcome::kDone;
}

Counted Store::remove(std::span<const std::string_view> keys) {
  std::vector<ValuePtr> old;  // given up after the lock
  Counted counted;
  const std::unique_lock lock(mutex_);
  for (const std::string_view key : keys) {
    const auto at = entries_.find(key);
    if (at != entries_.end() && at->second.exported) return {Outcome::kReadOnly, 0};
  }
  for (const std::string_view key : keys) {
    const auto at = entries_.find(key);
    if (at == entries_.end()) continue;
    if (auto* value = std::get_if<ValuePtr>(&at->second.content)) old.push_back(std::move(*value));
    erase(at);
    ++counted.count;
  }
  return counted;
}

void Store::export_range(std::string_view key, FileRange range) {
  const std::unique_lock lock(mutex_);
  insert_exported(key).content = std::move(range);
}

void Store::export_value(std::string_view key, ValuePtr value) {
  ValuePtr old;  // given up after the lock
  const std::unique_lock lock(mutex_);
  if (const auto at = entries_.find(key); at != entries_.end() && at->second.exported) {
    if (auto* held = std::get_if<ValuePtr>(&at->second.content)) {
      old = std::exchange(*held, std::move(value));
      return;
    }
  }
  insert_exported(key).content = std::move(value);
}

void Store::export_copy(std::string_view key, std::string_view of) {
  const std::unique_lock lock(mutex_);
  const auto at = entries_.find(of);
  if (at == entries_.end() || kind_of(at->second) != Kind::kString) {
    throw Error(ErrorCode::kInvalid, "there is no value under the key " + std::string(of));
  }
  auto content = at->second.content;  // before the table grows
  insert_exported(key).content = std::move(content);
}

void Store::unlock(std::string_view key) {
  const std::unique_lock lock(mutex_);
  if (const auto at = entries_.find(key); at != entries_.end()) at->second.exported = false;
}

Store::Entry& Store::insert_exported(std::string_view key) {
  if (entries_.find(key) != entries_.end()) {
    throw Error(ErrorCode::kInvalid, "the key " + std::string(key) + " is there already");
  }
  if (!memory_->charge(key_cost(key))) {
    throw Error(ErrorCode::kUnavailable,
                "the memory limit is too low even for the keys of the exported models");
  }
  Entry& entry = insert(key);
  entry.exported = true;
  return entry;
}

Store::Entry& Store::insert(std::string_view key) {
  const auto at = entries_.try_emplace(std::string(key)).first;
  at->second.number = next_number_++;
  try {
    in_order_.emplace_hint(in_order_.end(), at->second.number, &at->first);
  } catch (...) {  // no memory: neither of the two has it
    entries_.erase(at);
    throw;
  }
  return at->second;
}

void Store::erase(Entries::iterator at) {
  if (const auto* names = std::get_if<Names>(&at->second.content)) {
    for (const std::string& member : names->members) memory_->release(member_cost(member));
  }
  memory_->release(key_cost(at->first));
  in_order_.erase(at->second.number);
  entries_.erase(at);
}

Counted Store::add_members(std::string_view key, std::span<const std::string_view> members) {
  const std::unique_lock lock(mutex_);
  auto at = entries_.find(key);
  if (at != entries_.end() && kind_of(at->second) != Kind::kSet) return {Outcome::kWrongType, 0};
  // All of them or none: what is charged is added.
  std::set<std::string_view> fresh(members.begin(), members.end());
  if (at != entries_.end()) {
    const Names& names = std::get<Names>(at->second.content);
    std::erase_if(fresh, [&](std::string_view member) { return names.members.contains(member); });
  }
  uint64_t cost = at == entries_.end() ? key_cost(key) : 0;
  for (const std::string_view member : fresh) cost += member_cost(member);
  if (!memory_->charge(cost)) return {Outcome::kNoMemory, 0};
  if (at == entries_.end()) insert(key).content.emplace<Names>();
  Names& names = std::get<Names>(entries_.find(key)->second.content);
  for (const std::string_view member : fresh) names.members.emplace(member);
  if (!fresh.empty()) names.encoded.reset();
  return {Outcome::kDone, fresh.size()};
}

Counted Store::remove_members(std::string_view key, std::span<const std::string_view> members) {
  const std::unique_lock lock(mutex_);
  const auto at = entries_.find(key);
  if (at == entries_.end()) return {};
  if (kind_of(at->second) != Kind::kSet) return {Outcome::kWrongType, 0};
  if (at->second.exported) return {Outcome::kReadOnly, 0};
  Names& names = std::get<Names>(at->second.content);
  Counted counted;
  for (const std::string_view member : members) {
    const auto found = names.members.find(member);
    if (found == names.members.end()) continue;
    memory_->release(member_cost(member));
    names.members.erase(found);
    ++counted.count;
  }
  if (counted.count > 0) names.encoded.reset();
  if (names.members.empty()) erase(at);
  return counted;
}

Counted Store::has_member(std::string_view key, std::string_view member) const {
  const std::shared_lock lock(mutex_);
  const auto at = entries_.find(key);
  if (at == entries_.end()) return {};
  const auto* names = std::get_if<Names>(&at->second.content);
  if (names == nullptr) return {Outcome::kWrongType, 0};
  return {Outcome::kDone, names->members.contains(member) ? 1u : 0u};
}

Outcome Store::members(std::string_view key, ValuePtr& encoded, uint64_t& count) {
  const std::unique_lock lock(mutex_);
  count = 0;
  encoded.reset();
  const auto at = entries_.find(key);
  if (at == entries_.end()) return Outcome::kDone;
  auto* names = std::get_if<Names>(&at->second.content);
  if (names == nullptr) return Outcome::kWrongType;
  if (names->encoded == nullptr) {
    size_t bytes = 0;
    for (const std::string& member : names->members) {
      bytes += member.size() + std::to_string(member.size()).size() + 5;  // $N CRLF member CRLF
    }
    const auto value = memory_->allocate(bytes);
    if (value == nullptr) return Outcome::kNoMemory;
    auto* to = reinterpret_cast<char*>(value->fill().data());
    const auto put = [&](std::string_view text) {
      std::memcpy(to, text.data(), text.size());
      to += text.size();
    };
    for (const std::string& member : names->members) {
      put("$");
      put(std::to_string(member.size()));
      put("\r\n");
      put(member);
      put("\r\n");
    }
    names->encoded = value;
  }
  encoded = names->encoded;
  count = names->members.size();
  return Outcome::kDone;
}

ScanPage Store::scan(uint64_t cursor, uint64_t count, uint64_t max_bytes,
                     const std::function<bool(std::string_view, Kind)>& wanted) const {
  const std::shared_lock lock(mutex_);
  ScanPage page;
  uint64_t bytes = 0;
  auto at = in_order_.lower_bound(cursor);
  for (; at != in_order_.end() && count > 0 && bytes < max_bytes; ++at, --count) {
    const std::string& key = *at->second;
    bytes += key.size();
    if (wanted(key, kind_of(entries_.find(key)->second))) page.keys.push_back(key);
  }
  page.cursor = at == in_order_.end() ? 0 : at->first;
  return page;
}

uint64_t Store::size() const {
  const std::shared_lock lock(mutex_);
  return entries_.size();
}

}  // namespace rdmaload::server
