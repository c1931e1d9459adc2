#include "transport/cache/cache_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <thread>
#include <vector>

#include "core/deadline.h"

namespace rdmaload {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kHeaderBytes = kPage;
constexpr uint64_t kWordBytes = sizeof(uint64_t);
constexpr uint32_t kVersion = 1;
constexpr std::array<char, 8> kMagic{'r', 'd', 'm', 'a', 'c', 'a', 'c', 'h'};
constexpr uint64_t kStored = uint64_t{0x626c6f6b} << 32;  // upper half of the word of a block that is there
constexpr size_t kMaxDescriptionBytes = 2048;             // of the header's page

// Locks of bytes that no file has: the first by everyone who has the file open, the others one per block.
constexpr off_t kInUse = off_t{1} << 61;
constexpr off_t kFirstBlockLock = kInUse + 1;

constexpr std::string_view kTemporary = "tmp-";
constexpr std::string_view kLockName = "lock";
constexpr std::chrono::seconds kLockPatience{10};  // the directory is held for milliseconds
constexpr std::chrono::milliseconds kLockPoll{5};

struct Header {
  std::array<char, 8> magic;
  uint32_t version;
  uint32_t description_bytes;
  uint64_t bytes;
  uint64_t block_bytes;
};

uint64_t table_offset(const CacheEntry& entry) { return (entry.bytes + kPage - 1) / kPage * kPage; }

uint64_t block_count(const CacheEntry& entry) {
  return entry.bytes / entry.block_bytes + (entry.bytes % entry.block_bytes != 0 ? 1 : 0);
}

uint64_t disk_bytes(const CacheEntry& entry) {
  return table_offset(entry) + kHeaderBytes + kWordBytes * block_count(entry);
}

[[noreturn]] void fail(const std::string& what, const std::string& path) {
  throw Error(ErrorCode::kUnavailable, what + " '" + path + "' failed: " + std::strerror(errno));
}

// The header's page as an entry has it.
std::vector<char> header_of(const CacheEntry& entry) {
  const Header header{kMagic, kVersion,
                      static_cast<uint32_t>(std::min(entry.description.size(), kMaxDescriptionBytes)),
                      entry.bytes, entry.block_bytes};
  std::vector<char> page(kHeaderBytes);
  std::memcpy(page.data(), &header, sizeof(header));
  std::memcpy(page.data() + sizeof(header), entry.description.data(), header.description_bytes);
  return page;
}

bool lock_byte(int fd, short type, off_t byte) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return fcntl(fd, F_OFD_SETLK, &lock) == 0;
}

bool is_entry_name(std::string_view name) {
  return name.size() == 64 && name.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

}  // namespace

CacheFile::CacheFile(int fd, std::string path, CacheEntry entry) noexcept
    : fd_(fd), path_(std::move(path)), entry_(std::move(entry)) {}

CacheFile::~CacheFile() { ::close(fd_); }

uint64_t CacheFile::bytes_on_disk() const noexcept { return disk_bytes(entry_); }

uint64_t CacheFile::word_offset(uint64_t block) const noexcept {
  return table_offset(entry_) + kHeaderBytes + kWordBytes * block;
}

bool CacheFile::is_whole() const {
  struct stat status{};
  if (fstat(fd_, &status) != 0 || static_cast<uint64_t>(status.st_size) != disk_bytes(entry_)) return false;
  std::vector<char> page(kHeaderBytes);
  const ssize_t got = pread(fd_, page.data(), page.size(), static_cast<off_t>(table_offset(entry_)));
  return got == static_cast<ssize_t>(page.size()) && page == header_of(entry_);
}

std::optional<uint32_t> CacheFile::stored(uint64_t block) const {
  uint64_t word = 0;
  if (pread(fd_, &word, sizeof(word), static_cast<off_t>(word_offset(block))) != sizeof(word)) {
    fail("reading", path_);
  }
  if ((word & ~uint64_t{0xffffffff}) != kStored) return std::nullopt;
  return static_cast<uint32_t>(word);
}

void CacheFile::forget(uint64_t block) {
  const uint64_t word = 0;
  if (pwrite(fd_, &word, sizeof(word), static_cast<off_t>(word_offset(block))) != sizeof(word)) {
    fail("writing", path_);
  }
}

bool CacheFile::try_lock(uint64_t block) {
  std::lock_guard lock(mutex_);
  if (!locked_.insert(block).second) return false;
  if (lock_byte(fd_, F_WRLCK, kFirstBlockLock + static_cast<off_t>(block))) return true;
  const int error = errno;
  locked_.erase(block);
  if (error == EAGAIN || error == EACCES) return false;
  errno = error;
  fail("locking a part of", path_);
}

void CacheFile::unlock(uint64_t block) noexcept {
  std::lock_guard lock(mutex_);
  lock_byte(fd_, F_UNLCK, kFirstBlockLock + static_cast<off_t>(block));
  locked_.erase(block);
}

Status CacheFile::store(uint64_t block, std::span<const Segment> segments, uint32_t crc) {
  uint64_t offset = block * entry_.block_bytes;
  size_t segment = 0, within = 0;
  while (segment < segments.size()) {
    std::array<iovec, 256> vectors;
    size_t count = 0, skip = within;
    for (size_t i = segment; i < segments.size() && count < vectors.size(); ++i, skip = 0) {
      vectors[count++] = {segments[i].data + skip, segments[i].size - skip};
    }
    const ssize_t wrote = pwritev(fd_, vectors.data(), static_cast<int>(count), static_cast<off_t>(offset));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) {
      return Status(ErrorCode::kUnavailable, "writing '" + path_ + "' failed: " + std::strerror(errno));
    }
    offset += static_cast<uint64_t>(wrote);
    for (auto left = static_cast<size_t>(wrote); segment < segments.size();) {
      const size_t step = std::min(left, segments[segment].size - within);
      within += step;
      left -= step;
      if (within < segments[segment].size) break;
      ++segment;
      within = 0;
    }
  }
  const uint64_t word = kStored | crc;
  if (pwrite(fd_, &word, sizeof(word), static_cast<off_t>(word_offset(block))) != sizeof(word)) {
    return Status(ErrorCode::kUnavailable, "writing '" + path_ + "' failed: " + std::strerror(errno));
  }
  return Status();
}

// Holds the directory: nobody else opens, makes or removes files meanwhile.
class CacheDirectory::Locked {
 public:
  explicit Locked(const std::string& directory) {
    std::error_code error;
    if (std::filesystem::create_directories(directory, error)) {
      // Weights may be secret; who wants to share them makes the directory himself.
      std::filesystem::permissions(directory, std::filesystem::perms::owner_all, error);
    }
    const std::string path = directory + "/" + std::string(kLockName);
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0) fail("opening", path);
    const Deadline deadline = Deadline::after(kLockPatience);
    while (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      if (errno != EWOULDBLOCK && errno != EINTR) {
        const int reason = errno;
        ::close(fd_);
        errno = reason;
        fail("locking", path);
      }
      if (deadline.passed()) {
        ::close(fd_);
        throw Error(ErrorCode::kTimeout, "'" + path + "' has been locked for " +
                                             std::to_string(kLockPatience.count()) + " s by another process");
      }
      std::this_thread::sleep_for(kLockPoll);
    }
  }
  ~Locked() { ::close(fd_); }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  int fd_ = -1;
};

std::shared_ptr<CacheFile> CacheDirectory::open(const CacheEntry& entry) {
  if (entry.block_bytes == 0 || !is_entry_name(entry.name)) {
    throw Error(ErrorCode::kInvalid, "'" + entry.name + "' cannot be cached in blocks of " +
                                         std::to_string(entry.block_bytes) + " bytes");
  }
  const Locked locked(path_);
  if (auto file = open_existing(entry)) return file;
  return make_room(disk_bytes(entry)) ? make(entry) : nullptr;
}

// nullptr when there is none, or none that belongs to this entry: that one is removed.
std::shared_ptr<CacheFile> CacheDirectory::open_existing(const CacheEntry& entry) const {
  const std::string path = path_ + "/" + entry.name;
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0 && errno == ENOENT) return nullptr;
  if (fd < 0) fail("opening", path);
  std::shared_ptr<CacheFile> file(new CacheFile(fd, path, entry));
  if (!file->is_whole()) {
    if (unlink(path.c_str()) != 0) fail("removing", path);
    return nullptr;
  }
  if (!lock_byte(fd, F_RDLCK, kInUse)) fail("locking", path);
  futimens(fd, nullptr);  // the last opening, which decides who goes first
  return file;
}

std::shared_ptr<CacheFile> CacheDirectory::make(const CacheEntry& entry) const {
  const std::string path = path_ + "/" + entry.name;
  const std::string temporary = path_ + "/" + std::string(kTemporary) + entry.name;
  const int fd = ::open(temporary.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) fail("making", temporary);
  std::shared_ptr<CacheFile> file(new CacheFile(fd, path, entry));
  const std::vector<char> header = header_of(entry);
  const auto length = static_cast<ssize_t>(header.size());
  const bool made =
      ftruncate(fd, static_cast<off_t>(disk_bytes(entry))) == 0 &&
      pwrite(fd, header.data(), header.size(), static_cast<off_t>(table_offset(entry))) == length &&
      lock_byte(fd, F_RDLCK, kInUse) && rename(temporary.c_str(), path.c_str()) == 0;
  if (!made) {
    const int reason = errno;
    unlink(temporary.c_str());
    errno = reason;
    fail("making", path);
  }
  return file;
}

// Removes files that nobody has open, those first that were opened longest ago, until `bytes` more fit.
bool CacheDirectory::make_room(uint64_t bytes) const {
  struct Known {
    std::string path;
    timespec opened;
    uint64_t size;
    uint64_t missing;  // not on the disk yet
  };
  std::vector<Known> known;
  uint64_t used = 0, missing = 0;
  for (const auto& found : std::filesystem::directory_iterator(path_)) {
    const std::string name = found.path().filename().string(), path = found.path().string();
    if (name.starts_with(kTemporary)) {
      unlink(path.c_str());  // of a process that died while it held the directory
      continue;
    }
    struct stat status{};
    if (!is_entry_name(name) || stat(path.c_str(), &status) != 0) continue;
    const auto size = static_cast<uint64_t>(status.st_size), allocated = uint64_t{512} * status.st_blocks;
    known.push_back({path, status.st_mtim, size, size - std::min(size, allocated)});
    used += size;
    missing += known.back().missing;
  }
  std::sort(known.begin(), known.end(), [](const Known& a, const Known& b) {
    return std::pair(a.opened.tv_sec, a.opened.tv_nsec) < std::pair(b.opened.tv_sec, b.opened.tv_nsec);
  });
  const auto fits = [&] {
    if (limit_bytes_) return used <= *limit_bytes_ && bytes <= *limit_bytes_ - used;
    struct statvfs disk{};
    if (statvfs(path_.c_str(), &disk) != 0) fail("asking the size of", path_);
    const uint64_t available = uint64_t{disk.f_bavail} * disk.f_frsize;
    const uint64_t taken = uint64_t{disk.f_blocks} * disk.f_frsize / 10 + missing;
    return available > taken && bytes <= available - taken;
  };
  if (limit_bytes_ && bytes > *limit_bytes_) return false;  // nothing need go for what never fits
  for (const Known& oldest : known) {
    if (fits()) return true;
    const int fd = ::open(oldest.path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) continue;
    if (lock_byte(fd, F_WRLCK, kInUse) && unlink(oldest.path.c_str()) == 0) {
      used -= oldest.size;
      missing -= oldest.missing;
    }
    ::close(fd);
  }
  return fits();
}

}  // namespace rdmaload
