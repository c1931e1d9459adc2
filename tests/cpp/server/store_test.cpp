// Values, their memory, and the store: exact accounting, readers in flight, the limit, the contract of SCAN.
#include "server/store.h"

#include <doctest/doctest.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <thread>

#include "core/error.h"
#include "server/glob.h"
#include "support/bytes.h"
#include "support/temp_dir.h"

using namespace rdmaload::server;
using rdmaload::testing::bytes_of;
using rdmaload::testing::pick;
using rdmaload::testing::text_of;

namespace {

std::shared_ptr<Value> value_of(ValueMemory& memory, std::string_view text) {
  auto value = memory.allocate(text.size());
  REQUIRE(value != nullptr);
  if (!text.empty()) std::memcpy(value->fill().data(), text.data(), text.size());
  return value;
}

std::string text_in(const Found& found) {
  REQUIRE(found.outcome == Outcome::kDone);
  return text_of(std::get<ValuePtr>(found.content)->bytes());
}

constexpr uint64_t kMiB = 1 << 20;

}  // namespace

TEST_CASE("memory: values of every size keep apart and everything is given back") {
  const auto memory = ValueMemory::make(200 * kMiB);
  std::mt19937_64 random(7);
  std::map<uint64_t, std::pair<std::shared_ptr<Value>, std::byte>> alive;
  for (uint64_t step = 0; step < 3000; ++step) {
    if (alive.size() > 60 || (pick(random, 0, 2) == 0 && !alive.empty())) {
      auto at = std::next(alive.begin(), static_cast<long>(pick(random, 0, alive.size() - 1)));
      const auto bytes = at->second.first->bytes();
      REQUIRE(
          std::all_of(bytes.begin(), bytes.end(), [&](std::byte byte) { return byte == at->second.second; }));
      alive.erase(at);
      continue;
    }
    static constexpr uint64_t kSizes[] = {0, 1, 4095, 32767, 32768, 32769, 1044480, 3 * kMiB + 1, 9 * kMiB};
    const auto size = kSizes[pick(random, 0, step % 50 == 0 ? 8 : 6)];
    auto value = memory->allocate(size);
    if (value == nullptr) continue;
    if (step % 3 == 0) value->refer();
    const auto mark = static_cast<std::byte>(step);
    std::fill(value->fill().begin(), value->fill().end(), mark);
    alive.emplace(step, std::pair(std::move(value), mark));
    REQUIRE(memory->held_bytes() <= memory->limit_bytes());
    REQUIRE(memory->used_bytes() <= memory->held_bytes());
    REQUIRE(memory->values() == alive.size());
  }
  alive.clear();
  CHECK(memory->used_bytes() == 0);
  CHECK(memory->held_bytes() == 0);
  CHECK(memory->values() == 0);
}

TEST_CASE("memory: what does not fit is refused before it is allocated, and fits again later") {
  const auto memory = ValueMemory::make(10 * kMiB);
  std::vector<std::shared_ptr<Value>> values;
  while (auto value = memory->allocate(kMiB - 4096)) values.push_back(std::move(value));
  CHECK(values.size() >= 9);
  CHECK(memory->held_bytes() <= 10 * kMiB);
  CHECK(memory->allocate(2 * kMiB) == nullptr);
  CHECK(memory->allocate(uint64_t{1} << 62) == nullptr);
  values.pop_back();
  CHECK(memory->allocate(kMiB - 4096) != nullptr);
  values.clear();
  CHECK(memory->held_bytes() == 0);
}

TEST_CASE("memory: what was sent by reference is never written again; its place is, with fresh pages") {
  const auto memory = ValueMemory::make(1024 * kMiB);
  constexpr size_t kChunk = kMiB - 4096;
  std::vector<std::shared_ptr<Value>> values;
  for (int i = 0; i < 3; ++i) values.push_back(memory->allocate(kChunk));
  for (const auto& value : values) std::fill(value->fill().begin(), value->fill().end(), std::byte{1});
  const std::byte* const place = values[1]->bytes().data();
  values[1]->refer();
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  iovec first{values[1]->fill().data(), 4096};
  REQUIRE(vmsplice(ends[1], &first, 1, 0) == 4096);  // as a socket would hold it
  values[1].reset();
  values[1] = memory->allocate(kChunk);
  CHECK(values[1]->bytes().data() == place);
  CHECK(values[1]->bytes()[0] == std::byte{0});
  std::fill(values[1]->fill().begin(), values[1]->fill().end(), std::byte{2});
  std::array<std::byte, 4096> held{};
  REQUIRE(read(ends[0], held.data(), held.size()) == 4096);
  CHECK(std::all_of(held.begin(), held.end(), [](std::byte byte) { return byte == std::byte{1}; }));
  close(ends[0]);
  close(ends[1]);
  // The neighbours are whole.
  for (const int i : {0, 2}) {
    const auto bytes = values[static_cast<size_t>(i)]->bytes();
    CHECK(std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{1}; }));
  }
  // What was never sent is used again as it is, without a call to the system.
  values[0].reset();
  values[0] = memory->allocate(kChunk);
  CHECK(values[0]->bytes()[0] == std::byte{1});
}

TEST_CASE("memory: a large value that went leaves nothing held") {
  const auto memory = ValueMemory::make(1024 * kMiB);
  auto large = memory->allocate(100 * kMiB + 4096);
  const auto small = memory->allocate(kMiB);
  CHECK(memory->held_bytes() <= 102 * kMiB + 32 * kMiB + 2 * 128);
  large->refer();
  large.reset();
  CHECK(memory->held_bytes() <= 32 * kMiB + 128);
}

TEST_CASE("memory: chunks of a model share slabs, without gaps") {
  const auto memory = ValueMemory::make(1024 * kMiB);
  std::vector<std::shared_ptr<Value>> values;
  for (int i = 0; i < 32; ++i) values.push_back(memory->allocate(kMiB - 4096));
  CHECK(memory->held_bytes() <= 32 * kMiB + 32 * 128);
  // What every second one leaves is used again.
  for (size_t i = 0; i < values.size(); i += 2) values[i].reset();
  for (size_t i = 0; i < values.size(); i += 2) values[i] = memory->allocate(kMiB - 4096);
  CHECK(memory->held_bytes() <= 32 * kMiB + 32 * 128);
}

TEST_CASE("store: a reader keeps what it has, and its memory counts until it is done") {
  const auto memory = ValueMemory::make(64 * kMiB);
  Store store(memory);
  CHECK(store.set("k", value_of(*memory, std::string(kMiB, 'a')), SetCondition::kAlways) == Outcome::kDone);
  Found reading = store.get("k");
  CHECK(store.set("k", value_of(*memory, "b"), SetCondition::kAlways) == Outcome::kDone);
  CHECK(text_in(reading) == std::string(kMiB, 'a'));
  CHECK(text_in(store.get("k")) == "b");
  CHECK(memory->values() == 2);
  CHECK(memory->used_bytes() > kMiB);
  reading = {};
  CHECK(memory->values() == 1);
  CHECK(memory->used_bytes() < 1000);
  const std::string_view keys[] = {"k", "none", "k"};
  CHECK(store.remove(keys).count == 1);
  CHECK(memory->used_bytes() == 0);
  CHECK(memory->held_bytes() == 0);
}

TEST_CASE("store: conditions, kinds and sets") {
  const auto memory = ValueMemory::make(kMiB);
  Store store(memory);
  CHECK(store.set("k", value_of(*memory, "1"), SetCondition::kIfPresent) == Outcome::kNotDone);
  CHECK(store.set("k", value_of(*memory, "1"), SetCondition::kIfAbsent) == Outcome::kDone);
  CHECK(store.set("k", value_of(*memory, "2"), SetCondition::kIfAbsent) == Outcome::kNotDone);
  CHECK(text_in(store.get("k")) == "1");
  CHECK(store.set("k", value_of(*memory, "2"), SetCondition::kIfPresent) == Outcome::kDone);
  CHECK(text_in(store.get("k")) == "2");

  const std::string_view names[] = {"b", "a", "b"};
  CHECK(store.add_members("k", names).outcome == Outcome::kWrongType);
  CHECK(store.add_members("s", names).count == 2);
  CHECK(store.add_members("s", names).count == 0);
  ValuePtr encoded;
  uint64_t count = 0;
  CHECK(store.members("s", encoded, count) == Outcome::kDone);
  CHECK(count == 2);
  CHECK(text_of(encoded->bytes()) == "$1\r\na\r\n$1\r\nb\r\n");
  CHECK(store.members("k", encoded, count) == Outcome::kWrongType);
  CHECK(store.get("s").outcome == Outcome::kWrongType);
  CHECK(store.has_member("s", "a").count == 1);
  CHECK(store.has_member("s", "c").count == 0);
  CHECK(store.kind("s") == Kind::kSet);
  CHECK(store.remove_members("s", names).count == 2);
  CHECK(store.kind("s") == Kind::kNone);  // an empty set is none
  CHECK(store.add_members("s", names).count == 2);
  CHECK(store.set("s", value_of(*memory, "v"), SetCondition::kAlways) == Outcome::kDone);
  CHECK(store.kind("s") == Kind::kString);
  const std::string_view all[] = {"k", "s"};
  CHECK(store.remove(all).count == 2);
  encoded.reset();
  CHECK(memory->used_bytes() == 0);
}

TEST_CASE("store: keys and names count against the limit") {
  const auto memory = ValueMemory::make(100'000);
  Store store(memory);
  uint64_t keys = 0;
  while (true) {
    auto value = memory->allocate(0);
    if (value == nullptr ||
        store.set(std::to_string(keys), value, SetCondition::kAlways) == Outcome::kNoMemory)
      break;
    ++keys;
  }
  CHECK(keys > 100);
  CHECK(keys < 400);
  const std::string_view name[] = {"n"};
  CHECK(store.add_members("set", name).outcome == Outcome::kNoMemory);
  CHECK(store.size() == keys);
}

TEST_CASE("store: a scan gives every key that stays exactly once, whatever comes and goes") {
  const auto memory = ValueMemory::make(64 * kMiB);
  Store store(memory);
  for (int i = 0; i < 500; ++i)
    store.set("stays" + std::to_string(i), value_of(*memory, ""), SetCondition::kAlways);
  std::map<std::string, int> seen;
  uint64_t cursor = 0;
  int step = 0;
  do {
    const ScanPage page = store.scan(cursor, 7, 1 << 20, [](std::string_view, Kind) { return true; });
    for (const std::string& key : page.keys) ++seen[key];
    cursor = page.cursor;
    if (step < 100) store.set("comes" + std::to_string(step), value_of(*memory, ""), SetCondition::kAlways);
    const std::string gone = "comes" + std::to_string(step - 1);
    const std::string_view keys[] = {gone};
    store.remove(keys);
    store.set("stays" + std::to_string(step % 500), value_of(*memory, "x"), SetCondition::kAlways);
    ++step;
  } while (cursor != 0);
  for (int i = 0; i < 500; ++i) CHECK(seen["stays" + std::to_string(i)] == 1);
  // Bytes of one page are bounded, those of keys that nobody wanted, too.
  const ScanPage page = store.scan(0, 500, 20, [](std::string_view, Kind) { return true; });
  CHECK(page.keys.size() == 4);
  CHECK(page.cursor != 0);
  CHECK(store.scan(0, 500, 20, [](std::string_view, Kind) { return false; }).cursor == page.cursor);
}

TEST_CASE("store: readers and writers at once see whole values only") {
  const auto memory = ValueMemory::make(64 * kMiB);
  Store store(memory);
  store.set("k", value_of(*memory, std::string(50'000, 'a')), SetCondition::kAlways);
  std::atomic<bool> stop = false;
  std::atomic<int> torn = 0;
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      while (!stop) {
        const Found found = store.get("k");
        const auto bytes = std::get<ValuePtr>(found.content)->bytes();
        if (bytes.front() != bytes.back() || bytes.size() != 50'000) ++torn;
      }
    });
  }
  for (int i = 0; i < 2000; ++i) {
    store.set("k", value_of(*memory, std::string(50'000, static_cast<char>('a' + i % 26))),
              SetCondition::kAlways);
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
  CHECK(torn == 0);
  CHECK(memory->values() == 1);
}

TEST_CASE("store: exported keys cannot be written, and a changed file is refused") {
  const rdmaload::testing::TempDir folder;
  folder.write("weights", bytes_of("0123456789"));
  const std::string path = (folder.path() / "weights").string();
  CHECK_THROWS_AS(ExportedFile(path, 10, 1), rdmaload::Error);
  CHECK_THROWS_AS(ExportedFile(path + "none", 10, 1), rdmaload::Error);
  CHECK_THROWS_AS(ExportedFile(folder.path().string(), 10, 1), rdmaload::Error);
  const auto memory = ValueMemory::make(kMiB);
  Store store(memory);
  store.export_value("m/manifest", value_of(*memory, "x"));
  CHECK(store.set("m/manifest", value_of(*memory, "y"), SetCondition::kAlways) == Outcome::kReadOnly);
  store.set("free", value_of(*memory, "y"), SetCondition::kAlways);
  const std::string_view keys[] = {"free", "m/manifest"};
  CHECK(store.remove(keys).outcome == Outcome::kReadOnly);
  CHECK(store.kind("free") == Kind::kString);  // all or nothing
  CHECK(text_in(store.get("m/manifest")) == "x");
}

TEST_CASE("patterns") {
  struct Example {
    const char* pattern;
    const char* text;
    bool matches;
  };
  for (const auto& [pattern, text, matches] : {Example{"", "", true},    {"", "a", false},
                                               {"*", "", true},          {"*", "abc", true},
                                               {"a*c", "abbc", true},    {"a*c", "abbd", false},
                                               {"a?c", "abc", true},     {"a?c", "ac", false},
                                               {"[ab]c", "bc", true},    {"[a-c]x", "bx", true},
                                               {"[c-a]x", "bx", true},   {"[^a]x", "bx", true},
                                               {"[^a]x", "ax", false},   {"\\*", "*", true},
                                               {"\\*", "a", false},      {"a\\", "a\\", true},
                                               {"[\\]]", "]", true},     {"[", "[", false},
                                               {"[a", "a", true},        {"m/\\[x\\]/*", "m/[x]/1", true},
                                               {"**a**b", "xaxb", true}, {"*a", "ba", true}}) {
    CAPTURE(pattern);
    CAPTURE(text);
    CHECK(glob_matches(pattern, text) == matches);
  }
  std::string stars;
  for (int i = 0; i < 1000; ++i) stars += "*a";
  CHECK(!glob_matches(stars + "b", std::string(5000, 'a')));
}

TEST_CASE(
    "an exported value can be replaced by its exporter only, and what is unlocked belongs to everybody") {
  const rdmaload::testing::TempDir folder;
  folder.write("file", rdmaload::testing::random_bytes(100, 1));
  const std::string path = (folder.path() / "file").string();
  struct stat status{};
  REQUIRE(stat(path.c_str(), &status) == 0);
  const auto file = std::make_shared<const ExportedFile>(
      path, 100, int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec);
  const auto memory = ValueMemory::make(kMiB);
  {
    Store store(memory);
    store.export_range("old/0", {file, 10, 20});
    store.export_copy("new/0", "old/0");
    CHECK(std::get<FileRange>(store.get("new/0").content).offset == 10);
    CHECK_THROWS_AS(store.export_copy("new/0", "old/0"), rdmaload::Error);
    CHECK_THROWS_AS(store.export_copy("other", "none"), rdmaload::Error);
    store.export_value("m", value_of(*memory, "one"));
    store.export_value("m", value_of(*memory, "two"));
    CHECK(text_in(store.get("m")) == "two");
    CHECK(store.set("m", value_of(*memory, "x"), SetCondition::kAlways) == Outcome::kReadOnly);
    CHECK(store.set("theirs", value_of(*memory, "x"), SetCondition::kAlways) == Outcome::kDone);
    CHECK_THROWS_AS(store.export_value("theirs", value_of(*memory, "y")), rdmaload::Error);

    store.unlock("old/0");
    store.unlock("none");
    CHECK(store.set("new/0", value_of(*memory, "x"), SetCondition::kAlways) == Outcome::kReadOnly);
    CHECK(store.set("old/0", value_of(*memory, "x"), SetCondition::kAlways) == Outcome::kDone);
    CHECK(text_in(store.get("old/0")) == "x");
    store.unlock("new/0");
    const std::string_view key = "new/0";
    CHECK(store.remove({&key, 1}).count == 1);
    CHECK(store.size() == 3);
  }
  CHECK(memory->held_bytes() == 0);
}
