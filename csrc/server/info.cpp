// What is about the server itself: PING, SHUTDOWN, COMMAND, and CONFIG GET and INFO under the names that
// clients of Redis look for.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>

#include "memory/huge_pages.h"
#include "server/command_table.h"
#include "server/glob.h"

namespace rdmaload::server {
namespace {

std::string human(uint64_t bytes) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.2fG", static_cast<double>(bytes) / (1 << 30));
  return text.data();
}

std::string seconds_text(const timeval& time) {
  std::array<char, 48> text{};
  std::snprintf(text.data(), text.size(), "%lld.%06ld", static_cast<long long>(time.tv_sec),
                static_cast<long>(time.tv_usec));
  return text.data();
}

}  // namespace

void Session::ping(const Arguments& arguments) {
  arguments.size() == 2 ? bulk(arguments[1]) : simple("PONG");
}

void Session::echo(const Arguments& arguments) { bulk(arguments[1]); }

void Session::shutdown(const Arguments& arguments) {
  for (size_t i = 1; i < arguments.size(); ++i) {
    if (same_word(arguments[i], "SAVE")) {
      return error("ERR SHUTDOWN SAVE: this server keeps nothing on disk; NOSAVE or nothing ends it");
    }
    // It ends at once, so there is never one to be called off.
    if (same_word(arguments[i], "ABORT")) return error("ERR No shutdown in progress.");
    if (!same_word(arguments[i], "NOSAVE") && !same_word(arguments[i], "NOW") &&
        !same_word(arguments[i], "FORCE")) {
      return error("ERR syntax error");
    }
  }
  closing_ = true;
  shared_.shut_down();
}

void Session::command(const Arguments& arguments) {
  const auto describe = [this](const Command& command) {
    array(6);
    bulk(lower(command.name));
    const auto words = std::to_string(command.least);
    replies_.text(":" + (command.most == command.least ? "" : std::string("-")) + words + "\r\n");
    array(0);  // flags
    replies_.text(":" + std::to_string(command.keys.first) + "\r\n");
    replies_.text(":" + std::to_string(command.keys.last) + "\r\n");
    replies_.text(":" + std::to_string(command.keys.first == 0 ? 0 : 1) + "\r\n");
  };
  const auto named = std::span(arguments).subspan(std::min<size_t>(2, arguments.size()));
  const std::string_view what = arguments.size() > 1 ? arguments[1] : "INFO";
  if (same_word(what, "COUNT") && named.empty()) return integer(commands().size());
  if (same_word(what, "DOCS")) return map(0);  // clients show it to people: nothing is described
  if (same_word(what, "LIST") && named.empty()) {
    array(commands().size());
    for (const Command& command : commands()) bulk(lower(command.name));
    return;
  }
  if (!same_word(what, "INFO")) {
    return error("ERR unknown subcommand or wrong number of arguments for 'command'");
  }
  if (named.empty()) {
    array(commands().size());
    for (const Command& command : commands()) describe(command);
    return;
  }
  array(named.size());
  for (const std::string_view name : named) {
    const Command* found = find_command(name);
    found != nullptr ? describe(*found) : null();
  }
}

void Session::config(const Arguments& arguments) {
  if (!same_word(arguments[1], "GET")) {
    return error("ERR CONFIG: this server has only GET; its settings are arguments of `rdmaload serve`");
  }
  if (arguments.size() < 3) return error("ERR wrong number of arguments for 'config|get' command");
  const std::array<std::pair<std::string_view, std::string>, 12> settings{{
      {"appendonly", "no"},
      {"client-output-buffer-limit", "normal 0 0 0 slave 0 0 0 pubsub 0 0 0"},
      {"databases", "1"},
      {"io-threads", std::to_string(shared_.threads)},
      {"maxclients", std::to_string(shared_.max_connections)},
      {"maxmemory", std::to_string(shared_.store.memory()->limit_bytes())},
      {"maxmemory-policy", "noeviction"},
      {"port", std::to_string(shared_.tls ? 0 : shared_.port)},
      {"proto-max-bulk-len", std::to_string(kMaxArgumentBytes)},
      {"save", ""},
      {"timeout", "0"},
      {"tls-port", std::to_string(shared_.tls ? shared_.port : 0)},
  }};
  std::vector<const std::pair<std::string_view, std::string>*> wanted;
  for (const auto& setting : settings) {
    const auto asked = std::span(arguments).subspan(2);
    if (std::any_of(asked.begin(), asked.end(),
                    [&](std::string_view pattern) { return glob_matches(pattern, setting.first); })) {
      wanted.push_back(&setting);
    }
  }
  map(wanted.size());
  for (const auto* setting : wanted) {
    bulk(setting->first);
    bulk(setting->second);
  }
}

void Session::info(const Arguments& arguments) {
  static constexpr std::string_view kSections[] = {"SERVER",      "CLIENTS", "MEMORY", "PERSISTENCE", "STATS",
                                                   "REPLICATION", "CPU",     "RDMA",   "KEYSPACE"};
  std::string text;
  for (const std::string_view section : kSections) {
    bool wanted = arguments.size() == 1;
    for (size_t i = 1; i < arguments.size(); ++i) {
      wanted = wanted || same_word(arguments[i], section) || same_word(arguments[i], "ALL") ||
               same_word(arguments[i], "EVERYTHING") || same_word(arguments[i], "DEFAULT");
    }
    if (!wanted || (section == "RDMA" && shared_.rdma_port == 0)) continue;
    if (!text.empty()) text += "\r\n";
    text += info_text(section);
  }
  bulk(text);
}

std::string Session::info_text(std::string_view section) const {
  const ValueMemory& memory = *shared_.store.memory();
  const Counters& counters = shared_.counters;
  std::string text;
  const auto line = [&](std::string_view name, std::string_view value) {
    text.append(name).append(":").append(value).append("\r\n");
  };
  const auto number = [&](std::string_view name, uint64_t value) { line(name, std::to_string(value)); };
  if (section == "SERVER") {
    text = "# Server\r\n";
    line("redis_version", kRedisVersion);
    line("server_name", "rdmaload");
    line("rdmaload_version", shared_.version);
    line("redis_mode", "standalone");
    number("process_id", static_cast<uint64_t>(getpid()));
    number("tcp_port", static_cast<uint64_t>(shared_.port));
    line("tls", shared_.tls ? "yes" : "no");
    number("io_threads", static_cast<uint64_t>(shared_.threads));
    const auto up = std::chrono::steady_clock::now() - shared_.started;
    number("uptime_in_seconds",
           static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::seconds>(up).count()));
  } else if (section == "CLIENTS") {
    text = "# Clients\r\n";
    number("connected_clients", counters.connections_now);
    number("maxclients", static_cast<uint64_t>(shared_.max_connections));
    number("stalled_clients_closed", counters.connections_stalled);
    number("tls_handshakes_failed", counters.tls_failures);
    number("wrong_passwords", counters.auth_failures);
    number("passwords_not_looked_at", counters.auth_refused);
  } else if (section == "MEMORY") {
    text = "# Memory\r\n";
    number("used_memory", memory.used_bytes());
    line("used_memory_human", human(memory.used_bytes()));
    number("used_memory_rss", memory.held_bytes());
    number("values", memory.values());
    line("huge_pages", private_huge_pages() ? "private" : "none");
    number("maxmemory", memory.limit_bytes());
    line("maxmemory_human", human(memory.limit_bytes()));
    line("maxmemory_policy", "noeviction");
    number("refused_for_memory", counters.refused_for_memory);
  } else if (section == "PERSISTENCE") {
    text = "# Persistence\r\n";
    number("loading", 0);
    number("rdb_bgsave_in_progress", 0);
    number("aof_enabled", 0);
  } else if (section == "STATS") {
    text = "# Stats\r\n";
    number("total_connections_received", counters.connections_accepted);
    number("rejected_connections", counters.connections_refused);
    number("total_commands_processed", counters.commands);
    number("total_error_replies", counters.errors);
    number("total_net_input_bytes", counters.bytes_received);
    number("total_net_output_bytes", counters.bytes_sent);
    number("net_output_bytes_by_reference", counters.bytes_by_reference);
    number("keyspace_hits", counters.hits);
    number("keyspace_misses", counters.misses);
    number("exported_file_failures", counters.files_failed);
    number("evicted_keys", 0);
    number("expired_keys", 0);
  } else if (section == "REPLICATION") {
    text = "# Replication\r\n";
    line("role", "master");
    number("connected_slaves", 0);
  } else if (section == "CPU") {
    text = "# CPU\r\n";
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    line("used_cpu_sys", seconds_text(usage.ru_stime));
    line("used_cpu_user", seconds_text(usage.ru_utime));
  } else if (section == "RDMA") {
    text = "# Rdma\r\n";
    number("rdma_port", static_cast<uint64_t>(shared_.rdma_port));
    number("rdma_connected_clients", counters.rdma_connections_now);
    number("rdma_registered_bytes", memory.registered_bytes());
    number("rdma_unbound_windows", counters.rdma_unbound_windows);
    number("rdma_reads", counters.rdma_reads);
    number("rdma_work_requests", counters.rdma_work_requests);
    number("rdma_direct_bytes", counters.rdma_direct_bytes);
    number("rdma_copied_bytes", counters.rdma_copied_bytes);
  } else {
    text = "# Keyspace\r\n";
    if (const uint64_t keys = shared_.store.size(); keys > 0) {
      line("db0", "keys=" + std::to_string(keys) + ",expires=0,avg_ttl=0");
    }
  }
  return text;
}

}  // namespace rdmaload::server
