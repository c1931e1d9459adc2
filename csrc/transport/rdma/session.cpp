#include "transport/rdma/session.h"

#include <algorithm>
#include <charconv>
#include <cstring>

#include "transport/resp/handshake.h"

namespace rdmaload::rdma {
namespace {

constexpr std::string_view kProtocolVersion = "1";
// Of the self-test: more than a server copies inline, and less than the shortest window.
constexpr size_t kTestBytes = 1024;
// A command of ours has at most so many segments, whatever the server says.
constexpr int64_t kMostSegments = 4096;

// Bytes that no stale buffer holds by chance.
std::string pattern(size_t size) {
  static constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text(size, ' ');
  uint64_t state = static_cast<uint64_t>(Clock::now().time_since_epoch().count()) | 1;
  for (char& c : text) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    c = kDigits[state >> 60];
  }
  return text;
}

}  // namespace

Session::Session(Fabric& fabric, const resp::Endpoint& endpoint, const Remote& remote, uint32_t window_bytes,
                 const GiveUp& give_up)
    : endpoint_(endpoint),
      window_bytes_(std::max(window_bytes, kLeastWindowBytes)),
      staging_(kSlots * window_bytes_) {
  const Deadline deadline = Deadline::after(endpoint.connect_timeout);
  auto queue_pair = fabric.resolve(remote, deadline, give_up);
  region_ = queue_pair->domain()->register_memory(staging_.span(), Access::kRemoteWrite);
  ChannelOptions options;
  options.side = Side::kClient;
  channel_ = std::make_unique<Channel>(std::move(queue_pair), options);
  channel_->open(*region_, 0, window_bytes_, deadline, give_up);
  negotiate(deadline, give_up);
  test_stream(deadline, give_up);
}

void Session::negotiate(Deadline deadline, const GiveUp& give_up) {
  resp::shake_hands(endpoint_, [&](std::initializer_list<std::string_view> arguments) {
    return ask(arguments, deadline, give_up);
  });
  const resp::Reply hello = ask({"RDMALOAD.HELLO", kProtocolVersion}, deadline, give_up);
  if (hello.type != resp::Type::kAggregate) return;  // another's server, which does not know the command
  int64_t version = 0, segments = 0;
  for (size_t i = 0; i + 1 < hello.items.size(); i += 2) {
    const resp::Reply& value = hello.items[i + 1];
    int64_t number = value.integer;
    if (value.type != resp::Type::kInteger) {
      std::from_chars(value.text.data(), value.text.data() + value.text.size(), number);
    }
    if (hello.items[i].text == "version") version = number;
    if (hello.items[i].text == "max_segments") segments = number;
  }
  if (version == 1 && segments > 0) max_segments_ = static_cast<size_t>(std::min(segments, kMostSegments));
}

void Session::test_stream(Deadline deadline, const GiveUp& give_up) {
  const std::string sent = pattern(kTestBytes);
  const resp::Reply echo = ask({"ECHO", sent}, deadline, give_up);
  if (echo.type == resp::Type::kError) {
    const Status status = resp::status_of_error(echo.text, endpoint_.name + ": self-test (ECHO)");
    throw Error(status.code(), status.message());
  }
  if (echo.type != resp::Type::kBulk || echo.text != sent) {
    throw Error(ErrorCode::kIntegrity, endpoint_.name +
                                           ": the self-test read other bytes than it sent over " +
                                           channel_->queue_pair().description());
  }
}

void Session::test_direct_reads(const Sample& sample, const GiveUp& give_up) {
  const Deadline deadline = Deadline::after(endpoint_.connect_timeout);
  const uint64_t bytes = std::min<uint64_t>(sample.bytes, kTestBytes);
  if (sample.object.empty() || bytes == 0) return;
  const resp::Reply value =
      ask({"GETRANGE", sample.object, "0", std::to_string(bytes - 1)}, deadline, give_up);
  if (value.type != resp::Type::kBulk || value.text.size() != bytes) return;  // the read itself will say why
  // Not where the stream's window is, and with none of these bytes in it.
  const std::span<std::byte> place = slot(1).first(bytes);
  std::transform(value.text.begin(), value.text.end(), place.begin(),
                 [](char c) { return ~static_cast<std::byte>(c); });
  const uint64_t address = region_->address() + static_cast<uint64_t>(place.data() - staging_.data());
  const resp::Reply reply = ask({"RDMALOAD.READ", sample.object, "0", "0", std::to_string(bytes),
                                 std::to_string(address), std::to_string(region_->remote_key())},
                                deadline, give_up);
  if (reply.type == resp::Type::kError) {
    const Status status = resp::status_of_error(reply.text, endpoint_.name + ": self-test (RDMALOAD.READ)");
    throw Error(status.code(), status.message());
  }
  if (std::memcmp(place.data(), value.text.data(), bytes) != 0) {
    throw Error(ErrorCode::kIntegrity,
                endpoint_.name + ": the self-test read other bytes by RDMALOAD.READ than by GETRANGE over " +
                    channel_->queue_pair().description());
  }
}

std::string Session::description() const {
  return (max_segments_ > 0 ? "RDMALOAD.READ over " : "Valkey over RDMA, ") +
         channel_->queue_pair().description();
}

void Session::announce_slot(size_t index) {
  channel_->announce(*region_, index * window_bytes_, window_bytes_);
  consumed_ = 0;
}

uint64_t Session::queue(std::span<const std::string_view> arguments) {
  const size_t before = out_.size();
  resp::append_command(out_, arguments);
  queued_ += out_.size() - before;
  return queued_;
}

bool Session::flush() {
  bool moved = false;
  while (out_sent_ < out_.size()) {
    const size_t sent = channel_->try_send(std::as_bytes(std::span(out_).subspan(out_sent_)));
    if (sent == 0) break;
    out_sent_ += sent;
    moved = true;
  }
  if (out_sent_ == out_.size()) {
    out_.clear();
    out_sent_ = 0;
  }
  return moved;
}

bool Session::receive_text() {
  const uint64_t received = channel_->received();
  if (received == consumed_) return false;
  text_.append(reinterpret_cast<const char*>(slot(0).data()) + consumed_, received - consumed_);
  consumed_ = received;
  last_activity = Clock::now();
  if (channel_->window_full()) announce_slot(0);
  return true;
}

resp::Reply Session::ask(std::initializer_list<std::string_view> arguments, Deadline deadline,
                         const GiveUp& give_up) {
  const uint64_t position = queue({arguments.begin(), arguments.size()});
  for (;;) {
    bool moved = flush();
    moved |= receive_text();
    size_t consumed = 0;
    if (auto reply = resp::parse_reply(text_, consumed)) {
      text_.erase(0, consumed);
      channel_->answered(position);
      return std::move(*reply);
    }
    if (give_up()) {
      throw Error(ErrorCode::kCancelled, "connecting to " + endpoint_.name + " was cancelled");
    }
    if (deadline.passed()) {
      throw Error(ErrorCode::kTimeout, endpoint_.name +
                                           ": the server accepted the RDMA connection but did "
                                           "not answer " +
                                           std::string(*arguments.begin()) + " in time");
    }
    channel_->turn(
        std::chrono::milliseconds(moved ? 0 : deadline.poll_milliseconds(kGiveUpPollMilliseconds)));
  }
}

}  // namespace rdmaload::rdma
