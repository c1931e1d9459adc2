// A RESP client over RDMA, as small as can be: what a test says goes out, what comes back is text. It can
// also register memory for RDMALOAD.READ. One thread.
#pragma once

#include <chrono>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "memory/host_arena.h"
#include "transport/rdma/channel.h"

namespace rdmaload::testing {

class RdmaClient {
 public:
  RdmaClient(rdma::Fabric& fabric, const std::string& host, int port, uint32_t window_bytes = 64 << 10)
      : memory_(window_bytes),
        channel_(
            fabric.resolve({.host = host, .port = port, .device = {}, .domain = nullptr}, patience(), {}),
            {.side = rdma::Side::kClient}),
        window_(channel_.domain()->register_memory(memory_.span(), rdma::Access::kRemoteWrite)) {
    channel_.open(*window_, 0, window_bytes, patience(), {});
  }
  ~RdmaClient() { channel_.close(); }
  RdmaClient(const RdmaClient&) = delete;
  RdmaClient& operator=(const RdmaClient&) = delete;

  rdma::Channel& channel() { return channel_; }
  const rdma::MemoryRegion& window() const { return *window_; }

  // Throws when the connection is lost.
  void send(std::string_view text) {
    const Deadline deadline = patience();
    while (!text.empty()) {
      const size_t sent = try_send(text);
      text.remove_prefix(sent);
      if (sent == 0) turn(deadline);
    }
  }
  // As much as there is room for now.
  size_t try_send(std::string_view text) {
    return channel_.try_send({reinterpret_cast<const std::byte*>(text.data()), text.size()});
  }
  std::string receive(size_t bytes) {
    const Deadline deadline = patience();
    while (true) {
      take();
      if (text_.size() >= bytes) break;
      turn(deadline);
    }
    std::string taken = text_.substr(0, bytes);
    text_.erase(0, bytes);
    return taken;
  }
  std::string line() {
    const Deadline deadline = patience();
    while (true) {
      take();
      if (const size_t end = text_.find('\n'); end != std::string::npos) return receive(end + 1);
      turn(deadline);
    }
  }
  // Of a bulk string: its bytes.
  std::string bulk() {
    const std::string header = line();
    if (header.empty() || header[0] != '$' || header[1] == '-') return header;
    const size_t bytes = std::stoul(header.substr(1));
    const std::string body = receive(bytes + 2);
    return body.substr(0, bytes);
  }
  static std::string words(const std::vector<std::string>& arguments) {
    std::string text = "*" + std::to_string(arguments.size()) + "\r\n";
    for (const std::string& argument : arguments) {
      text += "$" + std::to_string(argument.size()) + "\r\n" + argument + "\r\n";
    }
    return text;
  }
  // The first line of the reply.
  std::string ask(const std::vector<std::string>& arguments) {
    send(words(arguments));
    return line();
  }
  // Whether the server has ended the connection, or does so soon.
  bool lost() {
    const Deadline deadline = patience();
    try {
      while (!deadline.passed()) channel_.turn(std::chrono::milliseconds(10));
    } catch (const Error&) {
      return true;
    }
    return false;
  }
  std::unique_ptr<rdma::MemoryRegion> offer(std::span<std::byte> memory) {
    return channel_.domain()->register_memory(memory, rdma::Access::kRemoteWrite);
  }

 private:
  static Deadline patience() { return Deadline::after(std::chrono::seconds(30)); }
  void turn(Deadline deadline) {
    channel_.turn(std::chrono::milliseconds(100));
    if (deadline.passed()) throw std::runtime_error("the server says nothing");
  }
  void take() {
    const auto received = static_cast<uint32_t>(channel_.received());
    text_.append(reinterpret_cast<const char*>(memory_.data()) + consumed_, received - consumed_);
    consumed_ = received;
    // All that came is taken: what was sent so far may well be answered, and a test does not send a thousand
    // requests ahead.
    if (received > 0) channel_.answered(channel_.total_sent());
    if (channel_.window_full()) {
      channel_.announce(*window_, 0, channel_.window_length());
      consumed_ = 0;
    }
  }

  HostArena memory_;
  rdma::Channel channel_;
  std::unique_ptr<rdma::MemoryRegion> window_;
  uint32_t consumed_ = 0;
  std::string text_;
};

}  // namespace rdmaload::testing
