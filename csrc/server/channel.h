// The socket of one connection, plain or under TLS, with the same non-blocking calls.
//
// A plain one sends what is stored without a copy of its own: large values by reference, through the thread's
// pipe, files by sendfile(), and what is small by sendmsg() from where it lies, as everything is sent where
// there is no such pipe. Under TLS every byte is encrypted from where it lies; only files go through a buffer
// of 64 KiB, and at most some 80 KiB of ciphertext wait for the socket. Owns the descriptor; belongs to one
// thread.
#pragma once

#include <sys/types.h>

#include <memory>
#include <span>
#include <string>

#include "server/reply_queue.h"
#include "server/splice_pipe.h"
#include "transport/tls_server.h"

namespace rdmaload::server {

class Channel {
 public:
  // Takes the descriptor of a connected, non-blocking socket, unless it throws. `tls` null: plain. `pipe` is
  // the thread's, and outlives it.
  Channel(int fd, const TlsServerContext* tls, SplicePipe& pipe);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  int descriptor() const noexcept { return fd_; }
  // The peer may say something: at once, or when its TLS handshake is done.
  bool established() const noexcept { return tls_ == nullptr || tls_->established(); }

  // As recv(2): 0 when the peer has ended, -1 with EAGAIN when there is nothing now.
  ssize_t receive(std::span<std::byte> into);
  // Sends from the front of the replies and returns how many of their bytes it took; -1 with EAGAIN when
  // there is no room now, with ENODATA when a file ends too early and EIO when it cannot be read.
  ssize_t send(const ReplyQueue& replies);
  // Sends what is encrypted; false: the connection is lost.
  bool flush() { return tls_ == nullptr || tls_->flush(); }

  // Input has come that the descriptor does not show.
  bool holds_input() const noexcept { return tls_ != nullptr && tls_->holds_input(); }
  // Output waits that the replies do not show.
  bool holds_output() const noexcept { return tls_ != nullptr && tls_->holds_output(); }
  // Of what it sent, what the kernel got by reference.
  uint64_t bytes_by_reference() const noexcept { return bytes_by_reference_; }

 private:
  ssize_t send_plain(const ReplyQueue& replies);
  ssize_t send_encrypted(const ReplyQueue& replies);

  const int fd_;
  SplicePipe& pipe_;
  uint64_t bytes_by_reference_ = 0;
  std::unique_ptr<TlsServerStream> tls_;
};

}  // namespace rdmaload::server
