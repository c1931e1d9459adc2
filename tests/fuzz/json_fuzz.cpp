// JsonReader on any text: skipping a value, walking it, and walking what was written from the walk must
// agree.
#include <string>

#include "allocation_bound.h"
#include "core/error.h"
#include "fuzz_input.h"
#include "loader/json.h"

namespace rdmaload {
namespace {

// A string of bytes that were checked to be UTF-8 as JSON text.
void write_string(std::string& out, std::string_view text) {
  constexpr std::string_view kHex = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    const auto byte = static_cast<uint8_t>(c);
    if (byte < 0x20) {
      out += "\\u00";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  out += '"';
}

// Walks one value, and writes it in one spelling. The reader bounds the depth, so recursion is bounded.
void walk(JsonReader& reader, std::string_view text, std::string& out) {
  std::string name;
  const char* comma = "";
  switch (reader.peek()) {
    case JsonReader::Kind::kObject:
      reader.begin_object();
      out += '{';
      while (reader.next_member(name)) {
        out += comma;
        comma = ",";
        write_string(out, name);
        out += ':';
        walk(reader, text, out);
      }
      out += '}';
      return;
    case JsonReader::Kind::kArray:
      reader.begin_array();
      out += '[';
      while (reader.next_element()) {
        out += comma;
        comma = ",";
        walk(reader, text, out);
      }
      out += ']';
      return;
    case JsonReader::Kind::kString:
      reader.read_string(name);
      write_string(out, name);
      return;
    case JsonReader::Kind::kNull:
      reader.read_null();
      out += "null";
      return;
    case JsonReader::Kind::kNumber:
    case JsonReader::Kind::kBool: {
      const size_t begin = reader.offset();
      reader.skip_value();
      out += text.substr(begin, reader.offset() - begin);
      return;
    }
  }
}

bool walks(std::string_view text, std::string& out) {
  try {
    JsonReader reader(text);
    walk(reader, text, out);
    reader.finish();
    FUZZ_CHECK(reader.offset() == text.size());
    return true;
  } catch (const Error& error) {
    FUZZ_CHECK(error.code() == ErrorCode::kFormat);
    return false;
  }
}

bool skips(std::string_view text) {
  // Only the last string is kept, in a buffer that doubles; the rest is an error's text.
  const fuzz::AllocationBound bound(4 * text.size() + 4096);
  try {
    JsonReader reader(text);
    reader.skip_value();
    reader.finish();
    FUZZ_CHECK(reader.offset() == text.size());
    return true;
  } catch (const Error& error) {
    FUZZ_CHECK(error.code() == ErrorCode::kFormat);
    FUZZ_CHECK(std::string_view(error.what()).starts_with("byte "));
    return false;
  }
}

void read_integer(std::string_view text) {
  try {
    JsonReader reader(text);
    const uint64_t value = reader.read_unsigned();
    reader.finish();
    const size_t begin = text.find_first_of("0123456789");
    const size_t end = text.find_last_of("0123456789") + 1;
    FUZZ_CHECK(std::to_string(value) == text.substr(begin, end - begin));
  } catch (const Error& error) {
    FUZZ_CHECK(error.code() == ErrorCode::kFormat);
  }
}

}  // namespace
}  // namespace rdmaload

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rdmaload;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  std::string written, again;
  const bool accepted = walks(text, written);
  FUZZ_CHECK(skips(text) == accepted);
  if (accepted) {
    FUZZ_CHECK(walks(written, again));
    FUZZ_CHECK(again == written);
  }
  read_integer(text);
  return 0;
}
