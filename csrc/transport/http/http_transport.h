// Reads byte ranges of http(s) objects: one thread per connection, ranged GETs received into their final
// place.
//
// What an object's url is, and with which headers it is asked for, an Addresses function says; the answer is
// kept until it expires. A read that fails keeps what arrived (Read::received): the next attempt asks only
// for the rest, pinned to the object's ETag (If-Match), so that bytes of two versions never mix. A connection
// that falls silent for longer than stall_timeout is closed and the rest asked for on another, before the
// read counts as failed: first closed, then asked for again, so that never two connections write to one
// destination.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "transport/http/connection.h"
#include "transport/http/route.h"
#include "transport/threaded_transport.h"

namespace rdmaload::http {

// Where an object is, for some time. Everything in it may be a secret: only Url::shown() enters messages.
struct Address {
  std::string url;
  std::vector<std::pair<std::string, std::string>> headers;  // sent to this server only, not after a redirect
  std::string etag;   // what the object had when it was listed; empty: not known
  std::string proxy;  // "http://host:port": ask there; empty: ask the server itself
  std::string proxy_authorization;
  Clock::time_point expires = Clock::time_point::max();
};

// Called on any thread, one call at a time; `refused` says that the server refused the last address (a
// signature that expired, say). Throws an Error.
using Addresses = std::function<Address(const std::string& object, bool refused)>;

struct TransportOptions {
  Addresses addresses;
  int connections = 8;
  std::chrono::duration<double> connect_timeout{10};
  std::chrono::duration<double> inactivity_timeout{30};
  std::chrono::duration<double> stall_timeout{2};  // doubles with every time that a read is asked for again
  // Called once, when https is first spoken, be it after a redirect; empty: https is refused. Throws an
  // Error.
  std::function<std::shared_ptr<const TlsContext>()> tls;
  std::string name;  // for messages: the url without secrets
};

class HttpTransport final : public ThreadedTransport {
 public:
  explicit HttpTransport(TransportOptions options);
  ~HttpTransport() override;

  std::string_view path() const noexcept override { return "http"; }
  bool keeps_digests() const noexcept override { return true; }

 private:
  struct Place;
  class Pool;

  std::optional<Status> perform(Read& read) override;
  Status fetch(Read& read, SegmentCursor& cursor);
  std::shared_ptr<const Place> place_of(const std::string& object);
  std::shared_ptr<const Place> renewed(const std::string& object, const std::shared_ptr<const Place>& old,
                                       bool refused);
  std::shared_ptr<const Place> redirected(const std::string& object, const std::shared_ptr<const Place>& from,
                                          const std::string& location);
  const TlsContext* tls_of(const Route& route);
  std::string context(const Read& read) const;
  std::string request_text(const Read& read, const SegmentCursor& cursor, const Place& place) const;
  Status check_range(const Read& read, const SegmentCursor& cursor, const Place& place,
                     const ResponseHead& head) const;
  Status refusal(const Read& read, const Place& place, const ResponseHead& head,
                 const ErrorDocument& document) const;

  const TransportOptions options_;
  const std::unique_ptr<Pool> pool_;
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::mutex asking_;  // held while Addresses runs; taken before mutex_
  std::map<std::string, std::shared_ptr<const Place>> places_;  // Guarded by mutex_.
  std::mutex tls_mutex_;                                        // held while it is made
  std::shared_ptr<const TlsContext> tls_;                       // Guarded by tls_mutex_ until it is there.
};

}  // namespace rdmaload::http
