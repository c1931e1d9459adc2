// The read contract: what every way of moving bytes promises to the loader.
//
// - A Read names an object, a byte range of it, and the segments of memory where those bytes go, in order.
// - submit() never blocks on I/O. A submitted read completes exactly once, through its owner; until then
//   the transport may write to its segments, afterwards never again. A failed read may have written any
//   part of its segments.
// - A Read is one attempt. Whether and when to try again is the owner's decision (loader/load.h). A transport
//   that can go on where a failed attempt stopped says so in `received`; the owner hands it back, or sets it
//   to 0 to have everything read again.
// - cancel(owner) makes every read of that owner complete soon, with kCancelled unless it was done already.
// - Destroying a transport completes whatever is outstanding with kCancelled first.
// - With `checksum` set, `crc` is the CRC32C of the read's bytes in order, dropped ones included. With
//   `digest_kind` set, `digest` is that CRC of them, where the transport keeps_digests().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/crc.h"
#include "core/deadline.h"
#include "core/error.h"

namespace rdmaload {

// data == nullptr: the bytes are read (and part of the checksum) but dropped.
struct Segment {
  std::byte* data;
  size_t size;
};

class ReadOwner;

// Marks a read whose segments are GPU memory that a network card is to fill; nothing on the host may follow
// their addresses. Only rdma::RdmaTransport takes such reads: it completes those that it cannot place with
// kNotSupported, and leaves `crc` alone.
struct DeviceFill {
  std::vector<uint32_t> dropped_crcs;  // of each dropped segment that is not empty, with Read::checksum
};

// When what happened to one attempt of a read; unset where a transport does not say.
struct ReadTimes {
  Clock::time_point taken;       // a connection or worker took it from the queue (ReadQueue)
  Clock::time_point first_byte;  // the first piece is in its place (SegmentCursor)
  Clock::time_point received;    // all of it is in host memory, before the copy to a GPU; unset without one
  uint32_t thread = 0;           // which took it
};

struct Read {
  // What to read. The owner keeps the Read alive and unchanged from submit() to completion.
  std::string object;
  uint64_t offset = 0;
  uint64_t length = 0;  // the sum of the segments' sizes
  uint64_t object_bytes =
      0;  // the object's size; a key-value store that answers with another size is refused
  std::vector<Segment> segments;
  std::shared_ptr<void> memory_owner;  // keeps the segments' memory alive for callers outside this library
  bool checksum = false;
  CrcKind digest_kind =
      CrcKind::kNone;     // a CRC that the store has of the whole object, for which this is a part
  uint64_t priority = 0;  // lower first, where several owners' reads wait
  ReadOwner* owner = nullptr;
  DeviceFill* device_fill = nullptr;
  // Bytes at the front that failed attempts left in place, `crc` and `digest` being theirs; other transports
  // leave it 0.
  uint64_t received = 0;

  // What became of it: valid in ReadOwner::complete().
  uint32_t crc = 0;
  uint64_t digest = 0;
  uint64_t copied_bytes = 0;  // bytes a CPU moved again after they had reached user memory
  std::chrono::nanoseconds checksum_time{0};
  std::chrono::milliseconds retry_after{0};  // the server asked not to be asked again before
  ReadTimes times;
  uint64_t cached_bytes = 0;  // read from this machine's disk in place of the store
  uint32_t reissues = 0;      // times that a stalled connection was given up within this attempt
};

class ReadOwner {
 public:
  // Called once per submitted read, with no lock of the transport held: on a transport thread or, for a
  // read that never started, on the thread that cancels or destroys. May submit again.
  virtual void complete(Read& read, const Status& status) noexcept = 0;
  // Asked between pieces of a read: true makes the transport give up early.
  virtual bool cancelled() const noexcept = 0;

 protected:
  ~ReadOwner() = default;
};

class Transport {
 public:
  virtual ~Transport() = default;
  virtual void submit(Read& read, Clock::time_point not_before) = 0;
  void submit(Read& read) { submit(read, Clock::time_point::min()); }
  virtual void cancel(const ReadOwner& owner) = 0;
  // Says that reads submitted from now on have segments in these blocks of memory, so that a transport whose
  // hardware has to know memory beforehand can register each block once. Keep the result while such reads are
  // outstanding and the memory exists; once it is destroyed, nothing of this transport can write there.
  virtual std::shared_ptr<void> prepare(std::span<const std::span<std::byte>> destinations) {
    static_cast<void>(destinations);
    return nullptr;
  }
  // The name that stats.path shows, e.g. "resp-tcp".
  virtual std::string_view path() const noexcept = 0;
  // Why a faster way was not taken; empty when nothing was given up.
  virtual std::string fallback_reason() const { return {}; }
  // What is known of the way that is taken, for a log; empty where path() says it all.
  virtual std::string description() const { return {}; }
  // Whether Read::digest is filled in.
  virtual bool keeps_digests() const noexcept { return false; }
  // Threads or connections that work at once.
  virtual int connections() const noexcept = 0;
};

}  // namespace rdmaload
