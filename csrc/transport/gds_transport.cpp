#include "transport/gds_transport.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "transport/device_placement.h"
#include "transport/path_name.h"

namespace rdmaload {
namespace {

constexpr uint64_t kPage = 4096;        // offsets and lengths that are no multiples go through bounce buffers
constexpr uint64_t kTablePart = 8;      // an eighth of a block holds the table of its pieces
constexpr size_t kMaxOpenHandles = 64;  // as of files

uint64_t round_up(uint64_t value) { return (value + kPage - 1) / kPage * kPage; }

Status cancelled_status() { return Status(ErrorCode::kCancelled, "the read was cancelled"); }

uint64_t data_bytes(const GdsOptions& options) {
  return round_up(std::max<uint64_t>(options.read_bytes, 1)) + kPage;  // a read may begin within a page
}

uint64_t table_bytes(const GdsOptions& options) { return round_up(data_bytes(options) / kTablePart); }

int worker_count(const GdsOptions& options) {
  const uint64_t stride = data_bytes(options) + table_bytes(options);
  const uint64_t fit = options.device_bytes / stride;
  if (fit == 0) {
    throw Error(ErrorCode::kNotSupported, "no GPUDirect Storage: a block for it takes " +
                                              std::to_string(stride) + " bytes of device memory, and " +
                                              std::to_string(options.device_bytes) +
                                              " may be used: raise device_extra_bytes");
  }
  return static_cast<int>(std::min<uint64_t>(fit, static_cast<uint64_t>(std::max(1, options.workers))));
}

}  // namespace

// Used by one thread at a time.
struct GdsTransport::Block {
  Block(const Device& device, uint64_t block_offset, std::byte* host)
      : offset(block_offset), host_table(host), event(device) {}
  const uint64_t offset;        // in the registered memory
  std::byte* const host_table;  // page-locked, as large as the table on the device
  const Event event;
};

struct GdsTransport::Blocks {
  Blocks(const CuFile& cufile, const Device& device, size_t count, uint64_t stride, uint64_t table)
      : memory(cufile, device, count * stride), tables(PinnedPool::process().take(device, count * table)) {
    for (size_t i = 0; i < count; ++i) {
      list.push_back(std::make_unique<Block>(device, i * stride, tables->span().data() + i * table));
    }
  }
  CuFileBuffer memory;
  std::shared_ptr<PinnedBuffer> tables;
  std::vector<std::unique_ptr<Block>> list;
};

// A file, and cuFile's handle of it on a descriptor of our own; without one it is read the staged way.
struct GdsTransport::OpenHandle {
  ~OpenHandle() {
    handle.reset();
    if (fd >= 0) ::close(fd);
  }
  std::shared_ptr<OpenFile> file;
  std::mutex mutex;
  bool tried = false;                  // Guarded by mutex.
  std::optional<CuFileHandle> handle;  // Guarded by mutex until tried.
  std::atomic<bool> refused{false};
  int fd = -1;
};

GdsTransport::GdsTransport(std::shared_ptr<FileTransport> files, std::shared_ptr<StagedTransport> staged,
                           Device& device, const CuFile& cufile, GdsOptions options)
    : ThreadedTransport(worker_count(options)),
      files_(std::move(files)),
      staged_(std::move(staged)),
      device_(device),
      cufile_(cufile),
      options_(options),
      kernels_(device.kernels(&no_kernels_reason_)),
      data_bytes_(data_bytes(options)),
      table_bytes_(table_bytes(options)),
      count_(static_cast<size_t>(worker_count(options))) {
  start();
}

GdsTransport::~GdsTransport() { stop(); }

void GdsTransport::cancel(const ReadOwner& owner) {
  ThreadedTransport::cancel(owner);
  staged_->cancel(owner);
}

std::string_view GdsTransport::path() const noexcept {
  if (!used_gds_) return staged_->path();
  if (!handed_on_) return "file-gds";
  return kept_path_name("file-gds+" + std::string(staged_->path()));
}

std::string GdsTransport::fallback_reason() const {
  {
    std::lock_guard lock(mutex_);
    if (!refusal_.empty()) return refusal_;
  }
  return staged_->fallback_reason();
}

int GdsTransport::connections() const noexcept {
  return used_gds_ ? ThreadedTransport::connections() : staged_->connections();
}

uint64_t GdsTransport::block_bytes() const noexcept { return count_ * (data_bytes_ + table_bytes_); }

void GdsTransport::refuse(const std::string& why) {
  std::lock_guard lock(mutex_);
  if (refusal_.empty()) refusal_ = why;
}

std::optional<Status> GdsTransport::hand_on(Read& read) {
  handed_on_ = true;
  staged_->submit(read);
  return std::nullopt;
}

std::shared_ptr<GdsTransport::OpenHandle> GdsTransport::handle_of(const std::string& object) {
  std::shared_ptr<OpenHandle> found;
  {
    std::lock_guard lock(mutex_);
    if (handles_.size() >= kMaxOpenHandles && handles_.find(object) == handles_.end()) {
      std::erase_if(handles_, [](const auto& entry) { return entry.second.use_count() == 1; });
    }
    std::shared_ptr<OpenHandle>& known = handles_[object];
    if (!known) known = std::make_shared<OpenHandle>();
    found = known;
  }
  std::lock_guard lock(found->mutex);
  if (!found->file) found->file = files_->open(object);
  if (found->tried || !found->file->reads_directly()) return found;
  found->tried = true;
  try {
    // A descriptor is registered once, and another device's transport reads the same file.
    found->fd = files_->options().calls.open(found->file->path().c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    struct stat ours{}, theirs{};
    if (found->fd < 0 || fstat(found->fd, &ours) != 0 || fstat(found->file->fd(), &theirs) != 0 ||
        ours.st_dev != theirs.st_dev || ours.st_ino != theirs.st_ino) {
      throw Error(ErrorCode::kNotSupported, "it cannot be opened once more for direct reads");
    }
    found->handle.emplace(cufile_, device_, found->fd);
  } catch (const Error& error) {
    found->refused = true;
    refuse("no GPUDirect Storage for '" + found->file->path() + "': " + error.what());
  }
  return found;
}

GdsTransport::Blocks* GdsTransport::blocks() {
  std::lock_guard lock(mutex_);
  if (!blocks_tried_) {
    blocks_tried_ = true;
    try {
      blocks_ = std::make_unique<Blocks>(cufile_, device_, count_, data_bytes_ + table_bytes_, table_bytes_);
      for (const auto& block : blocks_->list) idle_.push_back(block.get());
    } catch (const Error& error) {
      if (refusal_.empty()) refusal_ = std::string("no GPUDirect Storage: ") + error.what();
    }
  }
  return blocks_.get();
}

std::optional<Status> GdsTransport::perform(Read& read) {
  if (read.length > options_.read_bytes) return hand_on(read);
  if (read.checksum && kernels_ == nullptr) {
    refuse("no GPUDirect Storage: checksums cannot be computed on the GPU: " + no_kernels_reason_);
    return hand_on(read);
  }
  if (options_.verify_device && !read.checksum) {
    refuse(
        "verify_device: without a stored checksum nothing shows that GPUDirect Storage read right, so "
        "files go through host memory");
    return hand_on(read);
  }
  const auto handle = handle_of(read.object);
  if (handle->refused || !handle->file->reads_directly() || !handle->handle) return hand_on(read);
  if (Status grown = handle->file->grown(read.object_bytes); !grown.ok()) return grown;
  if (blocks() == nullptr) return hand_on(read);
  Block* block = nullptr;
  {
    std::lock_guard lock(mutex_);
    block = idle_.back();  // there is one for each thread
    idle_.pop_back();
  }
  const auto give_back = [&] {
    std::lock_guard lock(mutex_);
    idle_.push_back(block);
  };
  std::optional<Status> status;
  try {
    status = receive(read, *handle, *block);
  } catch (...) {
    give_back();
    throw;
  }
  give_back();
  return status ? status : hand_on(read);
}

// nullopt: cuFile would not.
std::optional<Status> GdsTransport::receive(Read& read, OpenHandle& handle, Block& block) {
  const DeviceGuard guard(device_);
  const uint64_t begin = read.offset / kPage * kPage, skipped = read.offset - begin;
  const uint64_t wanted = skipped + read.length;
  auto* const memory = reinterpret_cast<void*>(blocks_->memory.data());
  // In whole pages; what a short answer leaves of a page is read again with the rest.
  for (uint64_t done = 0; done < wanted;) {
    if (read.owner->cancelled()) return cancelled_status();
    const uint64_t from = done / kPage * kPage;
    const ssize_t got =
        cufile_.read(handle.handle->get(), memory, round_up(wanted) - from, static_cast<off_t>(begin + from),
                     static_cast<off_t>(block.offset + from));
    const int error = got == -1 ? errno : 0;
    if (error == EINTR || error == EAGAIN) continue;
    if (error != 0 && error != EINVAL && error != EOPNOTSUPP && error != EIO) {
      return file_call_failed("reading", handle.file->path(), error);
    }
    if (got < 0) {
      handle.refused = true;
      refuse("no GPUDirect Storage for '" + handle.file->path() + "': " +
             (error != 0 ? std::string("cuFileRead: ") + std::strerror(error)
                         : CuFile::describe("cuFileRead", {static_cast<int>(-got), 0})));
      return std::nullopt;
    }
    if (from + static_cast<uint64_t>(got) <= done) {
      return handle.file->truncated(begin + done, read.object_bytes);
    }
    done = from + static_cast<uint64_t>(got);
  }
  used_gds_ = true;
  return deliver(read, block, skipped);
}

Status GdsTransport::deliver(Read& read, Block& block, uint64_t skipped) {
  const cuda::Pointer base = blocks_->memory.data() + block.offset;
  const uint64_t crc_at = table_bytes_ - sizeof(uint64_t);
  const cuda::Stream stream = staged_->stream();
  PlacementCounters counters;
  const Status placed =
      place_pieces(device_.driver(), kernels_, read,
                   {base + skipped, base + data_bytes_, block.host_table, crc_at / sizeof(ScatterPiece),
                    base + data_bytes_ + crc_at, block.host_table + crc_at},
                   read.checksum, options_.scatter_pieces, stream, counters);
  // The block is free for the next read only when its pieces have left it; after a failure, some may have.
  Status waited = block.event.record(stream);
  if (waited.ok()) waited = block.event.synchronize();
  if (!waited.ok()) device_.driver().stream_synchronize(stream);
  if (!placed.ok()) return placed;
  if (!waited.ok()) return waited;
  if (read.checksum) {
    std::memcpy(&read.crc, block.host_table + crc_at, sizeof(read.crc));
    verified_bytes_ += read.length;
  }
  return Status();
}

}  // namespace rdmaload
