// The errors that cross layers. A Status travels through completions and threads as a value; an Error is
// thrown at the public edge. Each code is a different thing for the caller to do.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace rdmaload {

enum class ErrorCode {
  kUnavailable,     // the peer refused, reset or is loading: try again
  kTimeout,         // nothing arrived in time: try again or raise the limit
  kAuthentication,  // wrong or missing credentials
  kNotFound,        // the key, file or tensor is not there
  kIntegrity,       // bytes differ from what was saved
  kFormat,          // the peer or the file breaks its format
  kNotSupported,    // understood, but this build or store cannot do it
  kDevice,          // a GPU or NIC call failed
  kCancelled,       // the caller gave up
  kInvalid,         // a url, an option or another argument makes no sense
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

// Success, or a code with a message. Copyable; success costs no allocation.
class Status {
 public:
  Status() = default;
  Status(ErrorCode code, std::string message) : ok_(false), code_(code), message_(std::move(message)) {}
  static Status from(const Error& error) { return Status(error.code(), error.what()); }

  bool ok() const noexcept { return ok_; }
  ErrorCode code() const noexcept { return code_; }  // meaningful only when !ok()
  const std::string& message() const noexcept { return message_; }
  void throw_if_failed() const {
    if (!ok_) throw Error(code_, message_);
  }

 private:
  bool ok_ = true;
  ErrorCode code_ = ErrorCode::kInvalid;
  std::string message_;
};

}  // namespace rdmaload
