#include "transport/http/http_transport.h"

#include <algorithm>
#include <optional>

namespace rdmaload::http {
namespace {

constexpr int kMaxRedirects = 5;
constexpr size_t kErrorBodyBytes = 16 << 10;  // error documents have a few hundred; the rest is not read
// Servers close idle connections after 5 to 75 seconds; one that was closed costs a request that is sent
// again.
constexpr std::chrono::seconds kIdleClose{20};
constexpr int kLongestRetryAfterSeconds = 30;  // what a server may ask us to wait: a load has its own limit

bool is_redirect(int status) {
  return status == 301 || status == 302 || status == 303 || status == 307 || status == 308;
}

bool is_expired_document(const ErrorDocument& document) {
  return document.code == "ExpiredToken" || document.code == "TokenRefreshRequired" ||
         document.code == "RequestTimeTooSkewed" || document.code == "AuthenticationFailed" ||
         document.message.find("expired") != std::string::npos;
}

void append_header(std::string& request, std::string_view name, std::string_view value) {
  for (const std::string_view text : {name, value}) {
    if (text.find_first_of(std::string_view("\r\n\0", 3)) != std::string_view::npos) {
      throw Error(ErrorCode::kInvalid, "a request header holds a line break");
    }
  }
  request.append(name).append(": ").append(value).append("\r\n");
}

}  // namespace

// An address in the form that requests are made of, with the redirects that were followed.
struct HttpTransport::Place {
  Address address;
  Route route;
  bool redirected = false;
  const Url& url() const { return route.server; }
};

// Connections that wait for their next request, the last used first.
class HttpTransport::Pool {
 public:
  std::unique_ptr<Connection> take(const Route& route) {
    std::vector<std::unique_ptr<Connection>> dropped;  // closed without the lock
    std::lock_guard lock(mutex_);
    auto& idle = idle_[route.key()];
    while (!idle.empty()) {
      Idle last = std::move(idle.back());
      idle.pop_back();
      if (last.since + kIdleClose > Clock::now() && last.connection->reusable())
        return std::move(last.connection);
      dropped.push_back(std::move(last.connection));
    }
    return nullptr;
  }
  void give_back(const Route& route, std::unique_ptr<Connection> connection) {
    if (!connection->reusable()) return;
    std::lock_guard lock(mutex_);
    idle_[route.key()].push_back({Clock::now(), std::move(connection)});
  }

 private:
  struct Idle {
    Clock::time_point since;
    std::unique_ptr<Connection> connection;
  };

  std::mutex mutex_;
  std::map<std::string, std::vector<Idle>> idle_;  // Guarded by mutex_.
};

HttpTransport::HttpTransport(TransportOptions options)
    : ThreadedTransport(options.connections), options_(std::move(options)), pool_(std::make_unique<Pool>()) {
  start();
}

HttpTransport::~HttpTransport() {
  stopping_ = true;
  stop();
}

// Null where no TLS is spoken: to read the system's authorities takes longer than to load a small model.
const TlsContext* HttpTransport::tls_of(const Route& route) {
  if (!route.server.tls || !options_.tls) return nullptr;
  const std::lock_guard making(tls_mutex_);
  if (!tls_) tls_ = options_.tls();
  return tls_.get();
}

std::string HttpTransport::context(const Read& read) const {
  return options_.name + " file '" + read.object + "'";
}

std::shared_ptr<const HttpTransport::Place> HttpTransport::place_of(const std::string& object) {
  std::shared_ptr<const Place> known;
  {
    std::lock_guard lock(mutex_);
    if (const auto found = places_.find(object); found != places_.end()) known = found->second;
  }
  if (known && Clock::now() < known->address.expires) return known;
  return renewed(object, known, false);
}

// A new address, unless another thread has got one meanwhile.
std::shared_ptr<const HttpTransport::Place> HttpTransport::renewed(const std::string& object,
                                                                   const std::shared_ptr<const Place>& old,
                                                                   bool refused) {
  std::lock_guard asking(asking_);
  {
    std::lock_guard lock(mutex_);
    const auto found = places_.find(object);
    if (found != places_.end() && found->second != old) return found->second;
  }
  auto place = std::make_shared<Place>();
  place->address = options_.addresses(object, refused);
  place->route.server = parse_url(place->address.url);
  if (!place->address.proxy.empty()) place->route.proxy = parse_url(place->address.proxy);
  place->route.proxy_authorization = place->address.proxy_authorization;
  std::lock_guard lock(mutex_);
  places_[object] = place;
  return place;
}

std::shared_ptr<const HttpTransport::Place> HttpTransport::redirected(
    const std::string& object, const std::shared_ptr<const Place>& from, const std::string& location) {
  auto place = std::make_shared<Place>(*from);
  place->route.server = resolve_location(from->url(), location);
  place->redirected = true;
  if (from->url().tls && !place->url().tls) {
    throw Error(ErrorCode::kNotSupported, "the server redirects from https to " + place->url().shown() +
                                              ", which anyone on the way could change");
  }
  // Credentials are for the server that they were given for.
  if (!place->url().same_server(from->url())) place->address.headers.clear();
  std::lock_guard lock(mutex_);
  auto& known = places_[object];
  if (known == from) known = place;
  return place;
}

std::optional<Status> HttpTransport::perform(Read& read) {
  if (read.received >= read.length) read.received = 0;
  read.retry_after = {};
  read.reissues = 0;
  SegmentCursor cursor = SegmentCursor::resumed(read);
  Status status;
  try {
    status = fetch(read, cursor);
  } catch (const Error& error) {
    status = Status(error.code(), context(read) + ": " + error.what());
  } catch (...) {
    read.received = read.length - cursor.left();
    throw;
  }
  read.received = read.length - cursor.left();
  return status;
}

Status HttpTransport::fetch(Read& read, SegmentCursor& cursor) {
  const GiveUp give_up = [&] { return stopping_ || read.owner->cancelled(); };
  Patience patience{std::min(options_.stall_timeout, options_.inactivity_timeout), give_up};
  auto place = place_of(read.object);
  bool has_renewed = false;
  int redirects = 0;
  for (;;) {
    const Route& route = place->route;
    std::unique_ptr<Connection> connection = pool_->take(route);
    const bool reused = connection != nullptr;
    try {
      if (!connection) {
        connection = std::make_unique<Connection>(
            connect(route, tls_of(route), Deadline::after(options_.connect_timeout), give_up));
      }
      const ResponseHead& head = connection->request(request_text(read, cursor, *place), patience);
      // Some (rclone serve s3) say 200 and send the range all the same; which bytes they send, they must say.
      if (head.status == 206 || (head.status == 200 && head.content_range)) {
        Status wrong = check_range(read, cursor, *place, head);
        if (!wrong.ok()) return wrong;
        while (cursor.left() > 0) connection->receive(cursor, patience);
        pool_->give_back(route, std::move(connection));
        return Status();
      }
      // The whole object may follow a 200: not even the beginning of it is of use.
      const std::string body = head.status == 200 ? "" : connection->receive_text(kErrorBodyBytes, patience);
      const ResponseHead answer = head;
      // 421: what this connection leads to does not serve the file; another one may.
      if (answer.status != 421) pool_->give_back(route, std::move(connection));
      if (is_redirect(answer.status) && !answer.location.empty()) {
        if (++redirects > kMaxRedirects) {
          return Status(ErrorCode::kInvalid, context(read) + ": more than " + std::to_string(kMaxRedirects) +
                                                 " redirects, the last to " + place->url().shown() +
                                                 ": correct the url, or the server");
        }
        place = redirected(read.object, place, answer.location);
        continue;
      }
      const ErrorDocument document = parse_error_document(body);
      const bool refused = answer.status == 401 || answer.status == 403 ||
                           (answer.status == 400 && is_expired_document(document)) ||
                           (place->redirected && (answer.status == 404 || answer.status == 410));
      if (refused && !has_renewed) {
        has_renewed = true;
        redirects = 0;
        place = renewed(read.object, place, true);
        continue;
      }
      if (answer.retry_after_seconds) {
        read.retry_after =
            std::chrono::seconds(std::min(*answer.retry_after_seconds, kLongestRetryAfterSeconds));
      } else if (answer.retry_after_date) {
        const auto left = std::chrono::ceil<std::chrono::seconds>(*answer.retry_after_date -
                                                                  std::chrono::system_clock::now());
        read.retry_after =
            std::clamp(left, std::chrono::seconds(0), std::chrono::seconds(kLongestRetryAfterSeconds));
      }
      return refusal(read, *place, answer, document);
    } catch (const Error& error) {
      if (!connection || give_up()) throw;
      // The server closed it while it was idle, which says nothing about this request.
      if (reused && !connection->answered() && error.code() == ErrorCode::kUnavailable) continue;
      if (error.code() != ErrorCode::kTimeout) throw;
      if (patience.silence >= options_.inactivity_timeout) {
        throw Error(ErrorCode::kTimeout, place->url().authority() + ": no byte came for " +
                                             std::to_string(options_.inactivity_timeout.count()) +
                                             " s (inactivity_timeout)");
      }
      // This one has stalled; another connection may reach another machine of the store.
      patience.silence = std::min(2 * patience.silence, options_.inactivity_timeout);
      ++read.reissues;
    }
  }
}

std::string HttpTransport::request_text(const Read& read, const SegmentCursor& cursor,
                                        const Place& place) const {
  const uint64_t first = read.offset + (read.length - cursor.left());
  const uint64_t last = read.offset + read.length - 1;
  std::string text = "GET ";
  if (place.route.by_whole_url()) text += "http://" + place.url().authority();
  text += place.url().target + " HTTP/1.1\r\n";
  append_header(text, "Host", place.url().authority());
  append_header(text, "User-Agent", "rdmaload");
  append_header(text, "Accept", "*/*");
  append_header(text, "Accept-Encoding",
                "identity");  // a range of a compressed body is no range of the object
  append_header(text, "Range", "bytes=" + std::to_string(first) + "-" + std::to_string(last));
  // A weak tag never matches If-Match; the answer's own tag is compared all the same.
  if (!place.address.etag.empty() && !place.address.etag.starts_with("W/")) {
    append_header(text, "If-Match", place.address.etag);
  }
  if (place.route.by_whole_url() && !place.address.proxy_authorization.empty()) {
    append_header(text, "Proxy-Authorization", place.address.proxy_authorization);
  }
  for (const auto& [name, value] : place.address.headers) append_header(text, name, value);
  return text + "\r\n";
}

Status HttpTransport::check_range(const Read& read, const SegmentCursor& cursor, const Place& place,
                                  const ResponseHead& head) const {
  const uint64_t first = read.offset + (read.length - cursor.left());
  const uint64_t last = read.offset + read.length - 1;
  const std::string asked = "bytes " + std::to_string(first) + "-" + std::to_string(last);
  if (!head.content_encoding.empty() && head.content_encoding != "identity") {
    return Status(ErrorCode::kFormat,
                  context(read) + ": the server sends the range encoded (Content-Encoding: " +
                      head.content_encoding.substr(0, 40) + "), so it is no range of the file");
  }
  if (!head.content_range || !head.content_range->satisfied) {
    return Status(
        ErrorCode::kFormat,
        context(read) + ": the server answered 206 without saying which bytes it sends (Content-Range)");
  }
  const ContentRange& range = *head.content_range;
  if (range.total && *range.total != read.object_bytes) {
    return Status(ErrorCode::kIntegrity, context(read) + ": it has " + std::to_string(*range.total) +
                                             " bytes, expected " + std::to_string(read.object_bytes) +
                                             ": it was replaced after it was listed; open the model again");
  }
  if (range.first != first || range.last != last) {
    return Status(ErrorCode::kFormat, context(read) + ": asked for " + asked + ", the server sends bytes " +
                                          std::to_string(range.first) + "-" + std::to_string(range.last));
  }
  if (head.content_length && *head.content_length != last - first + 1) {
    return Status(ErrorCode::kFormat, context(read) + ": asked for " + asked + ", the server announces " +
                                          std::to_string(*head.content_length) + " bytes");
  }
  const std::string& expected = place.address.etag;
  if (!expected.empty() && !head.etag.empty() && !same_etag(expected, head.etag)) {
    return Status(ErrorCode::kIntegrity, context(read) + ": it was replaced while it was read (ETag " +
                                             head.etag.substr(0, 80) + ", expected " +
                                             expected.substr(0, 80) + "); open the model again");
  }
  return Status();
}

Status HttpTransport::refusal(const Read& read, const Place& place, const ResponseHead& head,
                              const ErrorDocument& document) const {
  std::string said =
      context(read) + " (" + place.url().shown() + "): the server answered " + std::to_string(head.status);
  if (!document.code.empty()) said += " " + document.code;
  if (!document.message.empty()) said += ", \"" + document.message + "\"";
  if (document.code == "InvalidObjectState" || document.code == "BlobArchived") {
    return Status(ErrorCode::kNotSupported, said + ": it is archived; restore it first");
  }
  // As HttpClient.meaning says of the same answers.
  switch (head.status) {
    case 200:
      return Status(ErrorCode::kNotSupported,
                    said +
                        " with the whole file where a range was asked for: it does not support ranges, which "
                        "loading needs. Use a server that does");
    case 401:
    case 402:
    case 403:
    case 407:
    case 451:
      return Status(ErrorCode::kAuthentication, said + ": check the credentials and what they may read");
    case 404:
    case 410:
      return Status(ErrorCode::kNotFound, said + ": there is no such file (any more)");
    case 408:
    case 409:
    case 421:
    case 423:
    case 425:
    case 429:
      return Status(ErrorCode::kUnavailable, said + ": it cannot serve the file now");
    case 412:
      return Status(ErrorCode::kIntegrity,
                    said + ": it was replaced after it was listed; open the model again");
    case 416: {
      std::string has = "fewer";
      if (head.content_range && head.content_range->total) has = std::to_string(*head.content_range->total);
      return Status(ErrorCode::kIntegrity, said + ": it has " + has + " bytes, expected " +
                                               std::to_string(read.object_bytes) +
                                               ": it was replaced after it was listed; open the model again");
    }
    case 405:
    case 501:
    case 505:
      return Status(ErrorCode::kNotSupported, said + ": it does not answer such requests");
    default:
      break;
  }
  if (head.status >= 500) return Status(ErrorCode::kUnavailable, said + ": it cannot serve the file now");
  if (is_redirect(head.status)) {
    return Status(ErrorCode::kInvalid, said +
                                           " without saying where the file is: correct the url, or give the "
                                           "region= that the bucket is in");
  }
  if (head.status < 400) return Status(ErrorCode::kFormat, said + ", which is no answer to such a request");
  if (document.code == "RequestTimeout" || document.code == "SlowDown")
    return Status(ErrorCode::kUnavailable, said);
  if (is_expired_document(document)) {
    return Status(ErrorCode::kAuthentication, said + ": renew the credentials, or the url's signature");
  }
  return Status(ErrorCode::kInvalid, said + ": check the url and the options");
}

}  // namespace rdmaload::http
