#include "transport/cache/caching_transport.h"

#include <algorithm>
#include <exception>

namespace rdmaload {
namespace {

// How often a block that somebody else fetches is looked for. A block takes milliseconds to arrive, a look
// two calls to the kernel.
constexpr std::chrono::milliseconds kOtherPoll{4};
// A model may have more files than the usual limit of 1024 descriptors.
constexpr size_t kMaxOpenFiles = 256;

Status cancelled_status() { return Status(ErrorCode::kCancelled, "the read was cancelled"); }

}  // namespace

// One read on its way, in the place of the caller's. In one hand at a time.
struct CachingTransport::Fetch final : Read, ReadOwner {
  enum class Stage { kLookUp, kDisk, kSource, kSourceThenStore, kStore };

  Fetch(CachingTransport& made_by, Read& from) : transport(made_by), outer(&from), outer_owner(from.owner) {
    owner = this;
  }
  void complete(Read&, const Status& status) noexcept override { transport.completed(*this, status); }
  bool cancelled() const noexcept override {
    return transport.stopping_ || given_up || outer_owner->cancelled();
  }

  // What became of it, for the caller.
  void report() noexcept {
    outer->crc = crc;
    outer->copied_bytes = copied_bytes;
    outer->checksum_time = checksum_time;
    outer->times = times;
    outer->received = received;
    outer->reissues = reissues;
    outer->retry_after = retry_after;
  }

  CachingTransport& transport;
  Read* const outer;                   // gone once this has completed
  const ReadOwner* const outer_owner;  // its own copy: cancel() may look for it a moment longer
  std::atomic<bool> given_up{false};
  Stage stage = Stage::kLookUp;
  size_t file_number = 0;
  uint64_t block = 0;
  std::shared_ptr<CacheFile> file;  // nullptr: this read has nothing to do with the cache
  bool locked = false;              // the block is ours to fetch
  bool was_damaged = false;
  uint32_t disk_crc = 0;
  Clock::time_point waiting_since = Clock::time_point::max();
  std::unique_ptr<std::byte[]> unwanted;  // bytes that the caller drops and the disk keeps
};

// A set of threads with a queue of blocks to write.
class CachingTransport::Writers final : public ThreadedTransport {
 public:
  Writers(CachingTransport& transport, int threads) : ThreadedTransport(threads), transport_(transport) {
    start();
  }
  ~Writers() override { stop(); }
  std::string_view path() const noexcept override { return "cache"; }

 private:
  std::optional<Status> perform(Read& read) override { return transport_.store(static_cast<Fetch&>(read)); }
  CachingTransport& transport_;
};

CachingTransport::CachingTransport(std::shared_ptr<Transport> source, CacheOptions options)
    : ThreadedTransport(1),
      source_(std::move(source)),
      options_(std::move(options)),
      directory_(options_.directory, options_.limit_bytes),
      known_(options_.files.size()) {
  if (options_.block_bytes == 0)
    throw Error(ErrorCode::kInvalid, "a block of the cache has at least one byte");
  for (size_t i = 0; i < options_.files.size(); ++i) numbers_.emplace(options_.files[i].object, i);
  disk_ = std::make_unique<FileTransport>(options_.directory, options_.reading);
  writers_ = std::make_unique<Writers>(*this, options_.store_threads);
  start();
}

CachingTransport::~CachingTransport() {
  stopping_ = true;
  stop();
  std::vector<std::shared_ptr<Fetch>> left;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [key, fetch] : fetches_) left.push_back(fetch);
  }
  for (const auto& fetch : left) source_->cancel(*fetch);
  disk_.reset();
  std::unique_lock lock(mutex_);
  quiet_.wait(lock, [this] { return fetches_.empty() && callbacks_ == 0; });
}

void CachingTransport::submit(Read& read, Clock::time_point not_before) {
  auto fetch = std::make_shared<Fetch>(*this, read);
  fetch->object = read.object;
  fetch->offset = read.offset;
  fetch->length = read.length;
  fetch->object_bytes = read.object_bytes;
  fetch->segments = read.segments;
  fetch->priority = read.priority;
  fetch->received = read.received;
  fetch->crc = read.crc;
  read.cached_bytes = 0;
  {
    std::lock_guard lock(mutex_);
    fetches_.emplace(fetch.get(), fetch);
  }
  ThreadedTransport::submit(*fetch, not_before);
}

void CachingTransport::cancel(const ReadOwner& owner) {
  std::vector<std::shared_ptr<Fetch>> found;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [key, fetch] : fetches_) {
      if (fetch->outer_owner == &owner) found.push_back(fetch);
    }
  }
  for (const auto& fetch : found) {
    fetch->given_up = true;  // for who has it in hand just now
    ThreadedTransport::cancel(*fetch);
    source_->cancel(*fetch);
    disk_->cancel(*fetch);
  }
}

std::string_view CachingTransport::path() const noexcept {
  std::string path(used_source_ || !used_disk_ ? source_->path() : "");
  if (used_disk_) path += (path.empty() ? "cache-" : "+cache-") + std::string(disk_->path());
  std::lock_guard lock(mutex_);
  return *paths_.insert(std::move(path)).first;
}

std::string CachingTransport::fallback_reason() const {
  std::string reasons = source_->fallback_reason();
  if (reasons.empty() && used_disk_) reasons = disk_->fallback_reason();
  std::lock_guard lock(mutex_);
  const auto add = [&](const std::string& reason) { reasons += (reasons.empty() ? "" : "; ") + reason; };
  if (!reason_.empty()) add(reason_);
  if (damaged_blocks_ > 0) {
    add("cache_dir: " + std::to_string(damaged_blocks_) + " block(s) in '" + options_.directory +
        "' were damaged and read again from the store");
  }
  return reasons;
}

void CachingTransport::give_up(const std::string& reason) {
  std::lock_guard lock(mutex_);
  if (reason_.empty()) reason_ = "cache_dir: " + reason;
}

std::optional<Status> CachingTransport::perform(Read& read) {
  Fetch& fetch = static_cast<Fetch&>(read);
  try {
    look_up(fetch);
  } catch (const std::exception& error) {
    give_up(error.what());
    unlock(fetch);
    read_from_source(fetch, false);
  }
  return std::nullopt;
}

// Which block of which file this read is, if it is one.
bool CachingTransport::find_block(Fetch& fetch) const {
  std::string object = fetch.object;
  if (options_.object_per_block) {
    const size_t digits = object.find_last_not_of("0123456789") + 1;
    if (object.size() - digits == 0 || object.size() - digits > 18 || fetch.offset != 0) return false;
    fetch.block = std::stoull(object.substr(digits));
    object.resize(digits);
  } else {
    if (fetch.offset % options_.block_bytes != 0) return false;
    fetch.block = fetch.offset / options_.block_bytes;
  }
  const auto found = numbers_.find(object);
  if (found == numbers_.end() || fetch.length == 0) return false;
  fetch.file_number = found->second;
  const uint64_t bytes = options_.files[fetch.file_number].bytes;
  if (fetch.block >= bytes / options_.block_bytes + (bytes % options_.block_bytes != 0 ? 1 : 0)) return false;
  return fetch.length == std::min(options_.block_bytes, bytes - fetch.block * options_.block_bytes);
}

std::shared_ptr<CacheFile> CachingTransport::file_of(size_t number) {
  Known& known = known_[number];
  const CacheEntry& entry = options_.files[number].entry;
  if (known.file || known.tried || entry.name.empty()) return known.file;
  if (open_files_ >= kMaxOpenFiles) {
    for (Known& other : known_) {
      if (other.file.use_count() != 1) continue;
      other = {};
      --open_files_;
    }
  }
  known.tried = true;
  known.file = directory_.open(entry);
  if (known.file) {
    ++open_files_;
  } else {
    give_up("'" + options_.directory + "' has no room for " + std::to_string(entry.bytes) +
            " bytes of a file; raise cache_bytes");
  }
  return known.file;
}

std::optional<uint32_t> CachingTransport::expected(const Fetch& fetch) const {
  const uint64_t at = options_.files[fetch.file_number].first_block + fetch.block;
  if (at >= options_.crcs.size()) return std::nullopt;
  return options_.crcs[at];
}

void CachingTransport::look_up(Fetch& fetch) {
  fetch.stage = Fetch::Stage::kLookUp;
  if (!fetch.file && find_block(fetch)) fetch.file = file_of(fetch.file_number);
  if (!fetch.file) {
    read_from_source(fetch, false);
    return;
  }
  if (const auto crc = fetch.file->stored(fetch.block)) {
    read_from_disk(fetch, *crc);
  } else if (!stores_) {
    read_from_source(fetch, false);
  } else if (!(fetch.locked = fetch.file->try_lock(fetch.block))) {
    wait_for_other(fetch);
  } else if (const auto now = fetch.file->stored(fetch.block)) {  // it came before the lock did
    unlock(fetch);
    read_from_disk(fetch, *now);
  } else {
    read_from_source(fetch, true);
  }
}

void CachingTransport::unlock(Fetch& fetch) noexcept {
  if (fetch.locked) fetch.file->unlock(fetch.block);
  fetch.locked = false;
}

void CachingTransport::wait_for_other(Fetch& fetch) {
  const auto now = Clock::now();
  if (fetch.waiting_since == Clock::time_point::max()) fetch.waiting_since = now;
  if (now - fetch.waiting_since > options_.patience) {
    read_from_source(fetch, false);
  } else {
    ThreadedTransport::submit(fetch, now + kOtherPoll);
  }
}

void CachingTransport::read_from_disk(Fetch& fetch, uint32_t crc) {
  fetch.stage = Fetch::Stage::kDisk;
  fetch.disk_crc = crc;
  fetch.object = fetch.file->name();
  fetch.offset = fetch.block * options_.block_bytes;
  fetch.object_bytes = fetch.file->bytes_on_disk();
  fetch.checksum = true;
  fetch.received = 0;
  disk_->submit(fetch);
}

// `keep`: the block is locked by us, and is written to the disk once it has come.
void CachingTransport::read_from_source(Fetch& fetch, bool keep) {
  const Read& outer = *fetch.outer;
  fetch.stage = keep ? Fetch::Stage::kSourceThenStore : Fetch::Stage::kSource;
  fetch.object = outer.object;
  fetch.offset = outer.offset;
  fetch.object_bytes = outer.object_bytes;
  // Of a file that may be kept always, so that what an attempt received is part of the next one's checksum.
  fetch.checksum = outer.checksum || fetch.file != nullptr;
  fetch.received = outer.received;
  fetch.crc = outer.crc;
  if (stopping_) {  // nobody would cancel it any more
    unlock(fetch);
    finish(fetch, cancelled_status());
    return;
  }
  if (keep) {
    size_t dropped = 0;
    for (const Segment& segment : fetch.segments) dropped += segment.data == nullptr ? segment.size : 0;
    if (dropped > 0) {
      fetch.unwanted = std::make_unique_for_overwrite<std::byte[]>(dropped);
      fetch.received = 0;
      std::byte* place = fetch.unwanted.get();
      for (Segment& segment : fetch.segments) {
        if (segment.data != nullptr) continue;
        segment.data = place;
        place += segment.size;
      }
    }
  }
  used_source_ = true;
  source_->submit(fetch);
}

void CachingTransport::completed(Fetch& fetch, const Status& status) {
  {
    std::lock_guard lock(mutex_);
    ++callbacks_;
  }
  go_on(fetch, status);  // the fetch may be gone after it, done by another thread
  std::lock_guard lock(mutex_);
  --callbacks_;
  if (callbacks_ == 0 && fetches_.empty()) quiet_.notify_all();
}

void CachingTransport::go_on(Fetch& fetch, const Status& status) {
  switch (fetch.stage) {
    case Fetch::Stage::kDisk:
      read_back(fetch, status);
      break;
    case Fetch::Stage::kSourceThenStore:
      received(fetch, status);
      break;
    case Fetch::Stage::kStore:  // the bytes are in their places, whether they are on the disk or not
      unlock(fetch);
      finish(fetch, Status());
      break;
    default:
      finish(fetch, status);
  }
}

void CachingTransport::read_back(Fetch& fetch, const Status& status) {
  const auto store_says = expected(fetch);
  if (status.ok() && fetch.crc == fetch.disk_crc && (!store_says || fetch.crc == *store_says)) {
    used_disk_ = true;
    fetch.outer->cached_bytes = fetch.length;
    finish(fetch, status);
    return;
  }
  if (!status.ok() && status.code() == ErrorCode::kCancelled) {
    finish(fetch, status);
    return;
  }
  // The caller's memory is written again from its beginning.
  fetch.outer->received = 0;
  {
    std::lock_guard lock(mutex_);
    ++damaged_blocks_;
  }
  bool forgotten = !fetch.was_damaged;
  fetch.was_damaged = true;
  try {
    fetch.file->forget(fetch.block);
  } catch (const Error& error) {
    give_up(error.what());
    forgotten = false;
  }
  if (forgotten) {
    fetch.stage = Fetch::Stage::kLookUp;
    ThreadedTransport::submit(fetch, Clock::time_point::min());
  } else {
    read_from_source(fetch, false);
  }
}

void CachingTransport::received(Fetch& fetch, const Status& status) {
  const auto store_says = expected(fetch);
  const bool right = !store_says || fetch.crc == *store_says;
  if (!status.ok() || !right ||
      !stores_) {  // whether wrong bytes are asked for again is the caller's decision
    unlock(fetch);
    if (fetch.unwanted && !status.ok()) fetch.received = 0;  // what was dropped is gone with this attempt
    finish(fetch, status);
    return;
  }
  fetch.report();  // now: the writers' queue clears it
  fetch.stage = Fetch::Stage::kStore;
  fetch.disk_crc = fetch.crc;
  writers_->submit(fetch);
}

Status CachingTransport::store(Fetch& fetch) {
  if (!stores_) return Status();
  const Status stored = fetch.file->store(fetch.block, fetch.segments, fetch.disk_crc);
  if (!stored.ok()) {
    stores_ = false;
    give_up(stored.message() + "; what is not there yet is read from the store every time");
  }
  return stored;
}

void CachingTransport::finish(Fetch& fetch, const Status& status) noexcept {
  Read& outer = *fetch.outer;
  if (fetch.stage != Fetch::Stage::kStore) fetch.report();
  std::shared_ptr<Fetch> kept;
  {
    std::lock_guard lock(mutex_);
    kept = fetches_.at(&fetch);
  }
  outer.owner->complete(outer, status);
  std::lock_guard lock(mutex_);  // under it the destructor learns that nothing of this is used any more
  fetches_.erase(&fetch);
  if (callbacks_ == 0 && fetches_.empty()) quiet_.notify_all();
}

}  // namespace rdmaload
