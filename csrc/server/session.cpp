#include "server/session.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

#include "server/command_table.h"

namespace rdmaload::server {
namespace {

// What may wait to be sent before the client is no longer read from. A load keeps 4 to 16 values in flight
// per connection; a piece costs some 60 bytes, and a GET takes two.
constexpr size_t kMaxPendingPieces = 1024;
constexpr size_t kMaxPendingText = 256 << 10;

// What every connection may keep without its counting as memory of the store: replies as above, and the next
// request.
constexpr uint64_t kFreeBufferBytes = 512 << 10;

constexpr std::string_view kNoMemoryText = "OOM command not allowed when used memory > 'maxmemory'.";

}  // namespace

Session::Session(Shared& shared, uint64_t id, std::string address, Road road)
    : shared_(shared),
      id_(id),
      address_(std::move(address)),
      road_(road),
      authenticated_(shared.password.empty()) {
  if (!authenticated_) parser_.set_limits(kUnknownClientLimits);
}

Session::~Session() { shared_.store.memory()->release(charged_); }

bool Session::full() const noexcept {
  return replies_.pieces() >= kMaxPendingPieces || replies_.text_bytes() >= kMaxPendingText;
}

std::span<std::byte> Session::value_space() noexcept {
  if (value_ == nullptr) return {};
  return value_->fill().subspan(value_filled_);
}

void Session::value_received(size_t bytes) {
  assert(bytes <= value_space().size());
  value_filled_ += bytes;
  if (value_space().empty()) parser_.large_argument_taken();
}

void Session::consume(std::string_view bytes) {
  assert(held_input_.empty());
  process(bytes);
  charge_buffers();
  if (!closing_) held_input_.assign(bytes);
}

void Session::resume() {
  if (charged_ > 0) charge_buffers();
  if (held_input_.empty() || full()) return;
  const std::string held = std::exchange(held_input_, {});
  consume(held);
}

void Session::charge_buffers() {
  if (closing_ && charged_ == 0) return;
  const uint64_t held = parser_.held_bytes() + replies_.held_bytes();
  const uint64_t due = held > kFreeBufferBytes ? held - kFreeBufferBytes : 0;
  ValueMemory& memory = *shared_.store.memory();
  if (due <= charged_) {
    memory.release(charged_ - due);
    charged_ = due;
  } else if (memory.charge(due - charged_)) {
    charged_ = due;
  } else {
    ++shared_.counters.refused_for_memory;
    closing_ = true;
    parser_.drop_request();
    value_.reset();
    // No word behind replies that are given up: it would stand where a value's bytes should.
    if (replies_.held_bytes() > kFreeBufferBytes) return replies_.clear();
    error(kNoMemoryText);
  }
}

void Session::process(std::string_view& bytes) {
  while (!bytes.empty() && !closing_) {
    if (discard_ > 0) {
      const auto part = static_cast<size_t>(std::min<uint64_t>(discard_, bytes.size()));
      bytes.remove_prefix(part);
      discard_ -= part;
      if (discard_ == 0) parser_.large_argument_taken();
      continue;
    }
    if (const auto space = value_space(); !space.empty()) {
      const size_t part = std::min(space.size(), bytes.size());
      std::memcpy(space.data(), bytes.data(), part);
      bytes.remove_prefix(part);
      value_received(part);
      continue;
    }
    if (full()) return;
    switch (parser_.next(bytes)) {
      case RequestParser::Event::kMore:
        break;
      case RequestParser::Event::kRequest:
        execute(parser_.arguments());
        parser_.forget_request();
        break;
      case RequestParser::Event::kLargeArgument:
        begin_large_argument();
        break;
      case RequestParser::Event::kError:
        error("ERR " + parser_.error());
        closing_ = true;
        break;
    }
  }
}

void Session::begin_large_argument() {
  if (!authenticated_) {
    error("ERR Protocol error: unauthenticated bulk length");
    closing_ = true;
    return;
  }
  const uint64_t bytes = parser_.large_bytes();
  const bool is_value = parser_.arguments_so_far() == 2 && same_word(parser_.argument_so_far(0), "SET");
  if (!is_value) {
    large_error_ = "ERR an argument is too long: only the value of SET may have more than 16 KiB";
  } else if (value_ = shared_.store.memory()->allocate(bytes); value_ != nullptr) {
    value_filled_ = 0;
    return;
  } else {
    ++shared_.counters.refused_for_memory;
    large_error_ = kNoMemoryText;
  }
  discard_ = bytes;
}

void Session::execute(const Arguments& arguments) {
  ++shared_.counters.commands;
  const std::string refusal = std::exchange(large_error_, {});
  const Command* found = find_command(arguments[0]);
  if (found == nullptr || (found->over_rdma_only && road_ != Road::kRdma)) {
    error("ERR unknown command '" + quoted(arguments[0]) + "'");
  } else if (!authenticated_ && !found->for_anybody) {
    error("NOAUTH Authentication required.");
  } else if (arguments.size() < found->least || arguments.size() > found->most) {
    error("ERR wrong number of arguments for '" + lower(found->name) + "' command");
  } else if (!refusal.empty()) {
    error(refusal);
  } else {
    (this->*found->run)(arguments);
  }
  value_.reset();
}

void Session::error(std::string_view text) {
  ++shared_.counters.errors;
  replies_.text("-");
  replies_.text(text);
  replies_.text("\r\n");
}

void Session::integer(uint64_t value) { replies_.text(":" + std::to_string(value) + "\r\n"); }

void Session::simple(std::string_view text) {
  replies_.text("+");
  replies_.text(text);
  replies_.text("\r\n");
}

void Session::bulk(std::string_view text) {
  replies_.text("$" + std::to_string(text.size()) + "\r\n");
  replies_.text(text);
  replies_.text("\r\n");
}

void Session::null() { replies_.text(protocol_ == 3 ? "_\r\n" : "$-1\r\n"); }

void Session::array(size_t count) { replies_.text("*" + std::to_string(count) + "\r\n"); }

void Session::map(size_t pairs) {
  if (protocol_ == 3) {
    replies_.text("%" + std::to_string(pairs) + "\r\n");
  } else {
    array(2 * pairs);
  }
}

void Session::content_reply(const Content& content, uint64_t offset, uint64_t length) {
  replies_.text("$" + std::to_string(length) + "\r\n");
  if (const auto* range = std::get_if<FileRange>(&content))
    range->file->will_read(range->offset + offset, length);
  replies_.content(content, offset, length);
  replies_.text("\r\n");
}

bool Session::passed(Outcome outcome) {
  switch (outcome) {
    case Outcome::kDone:
    case Outcome::kNotDone:
      return true;
    case Outcome::kWrongType:
      error("WRONGTYPE Operation against a key holding the wrong kind of value");
      return false;
    case Outcome::kReadOnly:
      error("READONLY the key belongs to a directory that this server exports");
      return false;
    case Outcome::kNoMemory:
      ++shared_.counters.refused_for_memory;
      error(kNoMemoryText);
      return false;
  }
  return false;
}

std::string Session::list_line() const {
  const std::lock_guard lock(name_mutex_);
  return "id=" + std::to_string(id_) + " addr=" + address_ + " name=" + name_ +
         (road_ == Road::kRdma ? " db=0 rdma=1\n" : " db=0\n");
}

}  // namespace rdmaload::server
