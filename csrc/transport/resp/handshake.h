// What is said first on a RESP connection, over whatever carries it: credentials, protocol, database.
#pragma once

#include <functional>
#include <initializer_list>
#include <string_view>

#include "transport/resp/connection.h"
#include "transport/resp/reply.h"

namespace rdmaload::resp {

// Sends one command and waits for its reply.
using Ask = std::function<Reply(std::initializer_list<std::string_view> arguments)>;

// Throws what `ask` throws, and what an error reply means (kAuthentication and others).
void shake_hands(const Endpoint& endpoint, const Ask& ask);

}  // namespace rdmaload::resp
