#include "transport/resp/handshake.h"

#include <string>

namespace rdmaload::resp {

void shake_hands(const Endpoint& endpoint, const Ask& ask) {
  const auto expect_ok = [&endpoint](const Reply& reply, const char* what) {
    if (reply.type != Type::kError) return;
    const Status status = status_of_error(reply.text, endpoint.name + ": " + what);
    throw Error(status.code(), status.message());
  };
  const std::string& user = endpoint.username;
  const std::string& password = endpoint.password;
  if (endpoint.protocol == 3) {
    const std::string_view name = user.empty() ? "default" : std::string_view(user);
    expect_ok(password.empty() ? ask({"HELLO", "3"}) : ask({"HELLO", "3", "AUTH", name, password}),
              "HELLO 3");
  } else if (!password.empty()) {
    expect_ok(user.empty() ? ask({"AUTH", password}) : ask({"AUTH", user, password}), "AUTH");
  }
  if (endpoint.database != 0) expect_ok(ask({"SELECT", std::to_string(endpoint.database)}), "SELECT");
}

}  // namespace rdmaload::resp
