// The server's listening socket, and what the sockets of its clients are set to.
#pragma once

#include <sys/socket.h>

#include <string>

namespace rdmaload::server {

// Non-blocking, and the caller's. `host` is a numeric address or a name; "" is every address. Throws
// Error(kUnavailable) naming the address.
int listen_on(const std::string& host, int port);
int port_of(int fd);

// "10.0.0.5:40212", "[fe80::1]:40212".
std::string address_of(const sockaddr_storage& address);
// For an accepted socket: no delay, keep-alives, and a congestion control that suits the road to the peer.
void set_up(int fd, const sockaddr_storage& peer);

}  // namespace rdmaload::server
