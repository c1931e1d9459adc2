#include "transport/http/stream.h"

#include "core/error.h"

namespace rdmaload::http {
namespace {

class TcpStream final : public Stream {
 public:
  explicit TcpStream(Socket socket) : socket_(std::move(socket)) {}
  size_t try_send(std::span<const std::byte> bytes) override { return socket_.try_send(bytes); }
  size_t try_receive(std::span<iovec> vectors) override { return socket_.try_receive(vectors); }
  bool wait(bool readable, bool writable, int milliseconds) override {
    return socket_.wait(readable, writable, milliseconds);
  }

 private:
  Socket socket_;
};

}  // namespace

std::unique_ptr<Stream> connect_stream(const Url& url, Deadline deadline, const GiveUp& give_up) {
  if (url.tls) {
    throw Error(ErrorCode::kNotSupported,
                "https to " + url.authority() + ": this build reads http:// only, it has no TLS");
  }
  return std::make_unique<TcpStream>(Socket::connect(url.host, url.port, deadline, give_up));
}

}  // namespace rdmaload::http
