// A strict pull reader of JSON (RFC 8259): the caller asks for what it expects, value by value, and nothing
// is built that it did not ask for. Text must be UTF-8, names and strings may not hold lone surrogates,
// numbers may not have leading zeros, nothing may follow a last comma. Nesting is bounded and needs no stack.
//
// Every failure throws Error(kFormat) whose message begins with the byte offset. Whether a name may occur
// twice in an object is the caller's decision. The text must outlive the reader. One thread at a time.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace rdmaload {

class JsonReader {
 public:
  // Open objects and arrays. The number is that of the JSON reader in the safetensors crate.
  static constexpr size_t kMaxDepth = 127;

  enum class Kind { kObject, kArray, kString, kNumber, kBool, kNull };

  explicit JsonReader(std::string_view text) : text_(text) {}

  // Each expects a value to come next: at the start, and when next_member() or next_element() said true.
  Kind peek();
  void read_string(std::string& value);
  uint64_t read_unsigned();  // an integer without sign, fraction or exponent that fits 64 bits
  void read_null();
  void skip_value();  // of any kind, fully checked; the magnitude of numbers is not

  // begin_object(); while (next_member(name)) { read the value of name }
  void begin_object();
  bool next_member(std::string& name);

  // begin_array(); while (next_element()) { read the element }
  void begin_array();
  bool next_element();

  // After the outermost value: only white space may follow.
  void finish();

  // The first byte that has not been read.
  size_t offset() const noexcept { return at_; }
  [[noreturn]] void fail(const std::string& what) const { fail_at(at_, what); }

 private:
  [[noreturn]] static void fail_at(size_t offset, const std::string& what);
  bool at_end() const noexcept { return at_ == text_.size(); }
  bool next_is(char c) const noexcept { return at_ < text_.size() && text_[at_] == c; }
  void skip_space() noexcept;
  void expect(Kind kind, const char* what);
  void open(bool is_object);
  bool next_in_container(char closing, const char* what);
  void take_string(std::string& value);
  void take_escape(std::string& value);
  uint32_t take_hex4();
  void take_utf8(std::string& value);
  void take_number();
  void take_digits();
  void take_word(std::string_view word);

  std::string_view text_;
  size_t at_ = 0;
  size_t depth_ = 0;
  std::bitset<kMaxDepth> is_object_;  // per open container
  std::bitset<kMaxDepth> has_items_;  // per open container: a comma must precede the next
  std::string skipped_;
};

}  // namespace rdmaload
