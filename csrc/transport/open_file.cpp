#include "transport/open_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <random>

namespace rdmaload {
namespace {

constexpr size_t kMaxOpenFiles = 64;  // a model may have more files than the usual limit of 1024 descriptors
constexpr int kSamples = 32;
// Above this part of the file in the cache, reading the rest through it costs less than reading all of it
// from the disk.
constexpr double kColdFraction = 0.125;
// Bounds that a bounce buffer (a huge page) satisfies; disks ask for 4 to 4096 bytes.
constexpr uint32_t kLargestMemoryAlignment = 4096;
constexpr uint32_t kLargestBlock = 64 << 10;
// Where readers announce themselves by a lock: a byte that no file has, so that it concerns nobody else's
// locks but those on whole files.
constexpr off_t kReaderLockOffset = off_t{1} << 62;

// One byte each of pages at random places, spread over the file, is asked for without waiting for I/O. At
// random because the kernel begins to read what it did not have: fixed places would be found warm next time.
std::optional<double> sample_page_cache(int fd, uint64_t bytes) {
  if (bytes == 0 || !is_local_disk(fd)) return std::nullopt;
  posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);  // one page for each that is missing, not a readahead window
  std::minstd_rand random{std::random_device{}()};
  int cached = 0;
  for (uint64_t i = 0; i < kSamples; ++i) {
    const uint64_t begin = bytes / kSamples * i;
    const uint64_t room = std::max<uint64_t>(1, bytes / kSamples);
    std::byte byte;
    iovec vector{&byte, 1};
    ssize_t got = 0;
    do {
      got = preadv2(fd, &vector, 1, static_cast<off_t>(begin + random() % room), RWF_NOWAIT);
    } while (got < 0 && errno == EINTR);
    if (got < 0 && errno != EAGAIN) return std::nullopt;  // neither this kernel nor this file system can say
    cached += got > 0 ? 1 : 0;
  }
  return static_cast<double>(cached) / kSamples;
}

// From statx, where the kernel (6.1) and the file system say it. The fields are read by their place in the
// kernel's interface, which the system's headers may be too old to name.
std::optional<DirectAlignment> ask_direct_alignment(int fd) {
  constexpr unsigned kDirectAlignmentMask = 0x2000;  // STATX_DIOALIGN
  constexpr size_t kMaskAt = 0, kMemoryAlignAt = 152, kOffsetAlignAt = 156;
  alignas(8) std::array<std::byte, 256> status{};
  uint32_t mask = 0;
  if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kDirectAlignmentMask, status.data()) == 0) {
    std::memcpy(&mask, status.data() + kMaskAt, sizeof(mask));
  }
  if ((mask & kDirectAlignmentMask) == 0) return DirectAlignment{4096, 4096};  // fits every disk
  DirectAlignment alignment{};
  std::memcpy(&alignment.memory, status.data() + kMemoryAlignAt, sizeof(uint32_t));
  std::memcpy(&alignment.offset, status.data() + kOffsetAlignAt, sizeof(uint32_t));
  if (alignment.offset == 0) return std::nullopt;
  return alignment;
}

bool is_power_of_two(uint32_t value) { return value != 0 && (value & (value - 1)) == 0; }

bool is_same_file(int a, int b) {
  struct stat x{}, y{};
  return fstat(a, &x) == 0 && fstat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

}  // namespace

FileIo parse_file_io(std::string_view name) {
  if (name == "auto") return FileIo::kAuto;
  if (name == "buffered") return FileIo::kBuffered;
  if (name == "direct") return FileIo::kDirect;
  throw Error(ErrorCode::kInvalid,
              "files are read auto, buffered or direct, not '" + std::string(name) + "'");
}

bool is_local_disk(int fd) {
  constexpr std::array<uint32_t, 14> kKinds{
      0x6969,      // NFS
      0xff534d42,  // CIFS
      0xfe534d42,  // SMB2
      0x517b,      // SMB
      0x65735546,  // FUSE, virtiofs
      0x0bd00bd0,  // Lustre
      0x00c36400,  // Ceph
      0x01021997,  // 9p
      0x47504653,  // GPFS
      0x19830326,  // BeeGFS
      0x5346414f,  // AFS
      0x73757245,  // Coda
      0x01021994,  // tmpfs
      0x858458f6,  // ramfs
  };
  struct statfs status{};
  if (fstatfs(fd, &status) != 0) return false;
  const auto kind = static_cast<uint32_t>(status.f_type);
  for (const uint32_t known : kKinds) {
    if (kind == known) return false;
  }
  return true;
}

Status file_call_failed(const std::string& what, const std::string& path, int error) {
  const bool no_such_file = error == ENOENT || error == ENOTDIR || error == EISDIR || error == ELOOP;
  const ErrorCode code = no_such_file || error == ENAMETOOLONG ? ErrorCode::kNotFound
                         : error == EACCES || error == EPERM   ? ErrorCode::kAuthentication
                                                               : ErrorCode::kUnavailable;
  return Status(code, what + " '" + path + "' failed: " + std::strerror(error));
}

FileCalls FileCalls::of_the_system() {
  return {[](const char* path, int flags) { return ::open(path, flags); },
          [](int fd, const iovec* vectors, int count, off_t offset) {
            return ::preadv(fd, vectors, count, offset);
          },
          ask_direct_alignment, sample_page_cache,
          [](int fd) { posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL); }};
}

OpenFile::OpenFile(std::string path, const FileOptions& options) : path_(std::move(path)) {
  fd_ = options.calls.open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) {
    const Status status = file_call_failed("opening", path_, errno);
    throw Error(status.code(), status.message());
  }
  try {
    open_directly(options);
  } catch (...) {
    if (direct_fd_ >= 0) ::close(direct_fd_);
    ::close(fd_);
    throw;
  }
  // Twice the readahead for what goes through the page cache, of which sampling it has left none.
  options.calls.advise_sequential(fd_);
}

OpenFile::~OpenFile() {
  if (direct_fd_ >= 0) ::close(direct_fd_);
  ::close(fd_);
}

uint64_t OpenFile::bytes() const {
  struct stat status{};
  return fstat(fd_, &status) == 0 ? static_cast<uint64_t>(status.st_size) : 0;
}

// Decides, and opens the second descriptor where the decision is to read past the page cache.
void OpenFile::open_directly(const FileOptions& options) {
  if (options.io == FileIo::kBuffered) return;
  const bool asked = options.io == FileIo::kDirect;
  if (!asked) {
    const uint64_t size = bytes();
    if (size < options.smallest_direct_bytes) return;
    const auto cached = options.calls.cached_fraction(fd_, size);
    if (!cached || *cached > kColdFraction) return;
    announced_ = announce_reader();
    if (!announced_) {
      refusal_ = "'" + path_ + "' cannot be locked here, so other readers cannot be seen";
      return;
    }
    if (!only_reader()) {
      refusal_ = "another reader has '" + path_ + "' open, and the page cache serves both";
      return;
    }
  }
  direct_fd_ = options.calls.open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (direct_fd_ < 0) {
    refusal_ = "O_DIRECT of '" + path_ + "' was refused: " + std::strerror(errno);
    return;
  }
  if (!is_same_file(fd_, direct_fd_)) {
    refusal_ = "'" + path_ + "' was replaced while it was opened";
    return;
  }
  const auto alignment = options.calls.direct_alignment(direct_fd_);
  const bool fits = alignment && is_power_of_two(alignment->memory) && is_power_of_two(alignment->offset) &&
                    alignment->memory <= kLargestMemoryAlignment && alignment->offset <= kLargestBlock;
  if (!fits) {
    refusal_ = "the file system of '" + path_ + "' has no direct reads";
    return;
  }
  alignment_ = *alignment;
  direct_ = true;
}

bool OpenFile::reads_directly() {
  if (!direct_) return false;
  if (announced_ && !only_reader()) {
    refuse_direct("another reader came for '" + path_ + "', and the page cache serves both");
    return false;
  }
  return true;
}

void OpenFile::refuse_direct(const std::string& why) {
  std::lock_guard lock(mutex_);
  if (!direct_.exchange(false)) return;
  refusal_ = why;
}

Status OpenFile::grown(uint64_t expected) const {
  const uint64_t now = bytes();
  if (now <= expected) return Status();
  return Status(ErrorCode::kIntegrity, "file '" + path_ + "' has " + std::to_string(now) +
                                           " bytes, expected " + std::to_string(expected) +
                                           ": it was changed after its header was read");
}

Status OpenFile::truncated(uint64_t end, uint64_t expected) const {
  return Status(ErrorCode::kIntegrity,
                "file '" + path_ + "' has " + std::to_string(bytes()) + " bytes and none from byte " +
                    std::to_string(end) + " on, expected " + std::to_string(expected) +
                    ": it was truncated after its header was read, or replaced by a shorter one");
}

std::string OpenFile::direct_refusal() const {
  std::lock_guard lock(mutex_);
  return refusal_;
}

// A shared lock of this open file, which needs no right to write, works on read-only mounts and goes with the
// process. All readers of cold files hold one, so each can see whether there are others.
bool OpenFile::announce_reader() const {
  struct flock lock{};
  lock.l_type = F_RDLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = kReaderLockOffset;
  lock.l_len = 1;
  return fcntl(fd_, F_OFD_SETLK, &lock) == 0;
}

bool OpenFile::only_reader() const {
  struct flock lock{};
  lock.l_type = F_WRLCK;  // nothing is locked: who would be in the way?
  lock.l_whence = SEEK_SET;
  lock.l_start = kReaderLockOffset;
  lock.l_len = 1;
  return fcntl(fd_, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

std::shared_ptr<OpenFile> OpenFiles::get(const std::string& object) {
  std::lock_guard lock(mutex_);
  if (const auto found = files_.find(object); found != files_.end()) return found->second;
  auto file = std::make_shared<OpenFile>(root_ + "/" + object, options_);
  if (files_.size() >= kMaxOpenFiles) drop_idle_locked();
  files_.emplace(object, file);
  return file;
}

// Reads go file by file, so all but the few in use are done with. Those in use must stay: opened once more
// they would each take the other for another reader.
void OpenFiles::drop_idle_locked() {
  for (auto at = files_.begin(); at != files_.end();) {
    if (at->second.use_count() > 1) {
      ++at;
      continue;
    }
    if (refusal_.empty()) refusal_ = at->second->direct_refusal();
    at = files_.erase(at);
  }
}

std::string OpenFiles::direct_refusal() const {
  std::lock_guard lock(mutex_);
  if (!refusal_.empty()) return refusal_;
  for (const auto& [object, file] : files_) {
    if (std::string refusal = file->direct_refusal(); !refusal.empty()) return refusal;
  }
  return {};
}

}  // namespace rdmaload
