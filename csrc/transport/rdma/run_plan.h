// Where the replies of a Valkey land when the network card writes them: pure planning, no I/O.
//
// A reply "$N\r\n" value "\r\n" is written as it is to wherever the client's window lies. When the window is
// announced at (destination - header), the value lands exactly in its place, and the header and the CRLF on
// what is before and behind it. A run is a sequence of reads that one connection asks for one after the
// other. In a run a value may land directly when its neighbours, whose bytes its framing overwrites, belong
// to the same run:
//
//   memory:      | first value .......|.. a value .......|... last value ......|
//   its window:                   [hhh|..................|tt]
//
// - What the header (hhh) overwrites is the end of the value before, which has arrived. It is kept aside
//   before the window is announced and put back when the reply has arrived. Only then is that value verified
//   and its read completed.
// - What the CRLF (tt) overwrites is the beginning of the value behind, which has not arrived yet.
// - The first and the last value of a stretch of memory have no such neighbour: they are received elsewhere
//   (staged) and copied. A staged value goes to its place when nothing that lands can touch it any more.
//
// The length of the window is one constant for a connection, since the server cannot bear another. Only a
// reply that fills it is received directly, so that no reply, whatever its length, writes beyond
// [destination - header, destination + N + 2); a server waits at the end of a window. All whole chunks of a
// store have one length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transport/transport.h"

namespace rdmaload::rdma {

// "$1044480\r\n": the length of the header line of a value of this size.
size_t bulk_header_bytes(uint64_t length);
// Of the whole reply: header, value, CRLF.
uint64_t bulk_reply_bytes(uint64_t length);

// What planning has to know of one read.
struct RunValue {
  uint64_t length = 0;
  // The contiguous memory of its first and of its last bytes; empty where those are dropped. Equal when all
  // of it lies together.
  std::span<std::byte> front;
  std::span<std::byte> back;
  // The registered memory that holds all of it, which the card may write to; empty when there is none.
  std::span<std::byte> registered;

  bool contiguous() const noexcept { return length > 0 && front.size() == length; }
};

// The value of a read, not registered yet. Segments that touch each other in memory count as one.
RunValue value_of(const Read& read);

struct RunStep {
  bool direct = false;
  uint64_t reply_bytes = 0;
  std::byte* window = nullptr;  // direct: the address to announce
  // Of the value before, at its end: kept before the window is announced, put back when the reply has come.
  // 0 when the value before is staged: its copy comes after.
  size_t kept_bytes = 0;
  // The reply fills the window, so the next may be announced, and the next request sent before.
  bool fills_window = false;
  // Goes to its place, or is verified, only when the next reply has arrived: that one overwrites its end.
  bool ends_after_next = false;
};

// One step per value, in order.
std::vector<RunStep> plan_run(std::span<const RunValue> values, uint64_t window_bytes);

}  // namespace rdmaload::rdma
