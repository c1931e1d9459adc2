#include "server/channel.h"

#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

namespace rdmaload::server {
namespace {

constexpr uint64_t kBytesPerSend = 1 << 20;  // one system call's worth, about a chunk
constexpr size_t kVectors = 64;
constexpr size_t kFileBytes = 64 << 10;  // of a file that are read to be encrypted, four records

}  // namespace

Channel::Channel(int fd, const TlsServerContext* tls, SplicePipe& pipe)
    : fd_(fd), pipe_(pipe), tls_(tls == nullptr ? nullptr : std::make_unique<TlsServerStream>(fd, *tls)) {}

Channel::~Channel() {
  tls_.reset();  // says good-bye
  close(fd_);
}

ssize_t Channel::receive(std::span<std::byte> into) {
  return tls_ != nullptr ? tls_->receive(into) : recv(fd_, into.data(), into.size(), 0);
}

ssize_t Channel::send(const ReplyQueue& replies) {
  return tls_ != nullptr ? send_encrypted(replies) : send_plain(replies);
}

ssize_t Channel::send_plain(const ReplyQueue& replies) {
  std::array<iovec, kVectors> vectors;
  const bool by_reference = pipe_.refusal().empty();
  const size_t count = replies.gather(
      vectors, kBytesPerSend, by_reference ? ReplyQueue::Large::kByReference : ReplyQueue::Large::kAsMemory);
  if (count > 0) {
    msghdr message{};
    message.msg_iov = vectors.data();
    message.msg_iovlen = count;
    const bool more = count < replies.pieces();  // what is sent by reference follows, or the rest
    return sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT | (more ? MSG_MORE : 0));
  }
  const ReplyQueue::Front front = replies.front();
  ssize_t sent = 0;
  if (front.value != nullptr) {
    front.value->refer();
    sent = pipe_.send(fd_, front.value->bytes().subspan(front.offset, front.length), replies.pieces() > 1);
  } else {
    auto offset = static_cast<off_t>(front.offset);
    const auto length = static_cast<size_t>(std::min(front.length, kBytesPerSend));
    sent = sendfile(fd_, front.file->descriptor(), &offset, length);
    if (sent == 0) errno = ENODATA;
    if (sent < 0 && errno == EINVAL) errno = EIO;
  }
  if (sent <= 0) return -1;
  bytes_by_reference_ += static_cast<uint64_t>(sent);
  return sent;
}

ssize_t Channel::send_encrypted(const ReplyQueue& replies) {
  std::array<iovec, kVectors> vectors;
  const size_t count = replies.gather(vectors, kBytesPerSend, ReplyQueue::Large::kAsMemory);
  if (count > 0) return tls_->send(std::span(vectors).first(count));
  if (!tls_->has_room()) {  // before the file is read for nothing
    if (!tls_->flush()) {
      errno = EPIPE;
      return -1;
    }
    if (!tls_->has_room()) {
      errno = EAGAIN;
      return -1;
    }
  }
  const ReplyQueue::Front front = replies.front();
  std::array<std::byte, kFileBytes> part;
  const auto length = static_cast<size_t>(std::min<uint64_t>(front.length, part.size()));
  const ssize_t got = pread(front.file->descriptor(), part.data(), length, static_cast<off_t>(front.offset));
  if (got <= 0) {
    errno = got == 0 ? ENODATA : EIO;
    return -1;
  }
  iovec vector{part.data(), static_cast<size_t>(got)};
  return tls_->send({&vector, 1});
}

}  // namespace rdmaload::server
