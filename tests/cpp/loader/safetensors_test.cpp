#include "loader/safetensors.h"

#include <doctest/doctest.h>

#include <string>
#include <string_view>
#include <vector>

#include "core/checked.h"
#include "core/error.h"

using namespace std::string_literals;

namespace rdmaload {
namespace {

SafetensorsHeader parse(const std::string& json, uint64_t data_bytes) {
  return parse_safetensors_header(json, 8 + json.size() + data_bytes);
}

// "" when accepted, else the message.
std::string problem_with(const std::string& json, uint64_t data_bytes) {
  try {
    parse(json, data_bytes);
    return "";
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kFormat);
    return error.what();
  }
}

bool contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

std::string entry(std::string_view dtype, std::string_view shape, uint64_t begin, uint64_t end) {
  return R"({"dtype":")" + std::string(dtype) + R"(","shape":)" + std::string(shape) +
         R"(,"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) + "]}";
}

std::vector<std::string> names(const SafetensorsHeader& header) {
  std::vector<std::string> all;
  for (const TensorInfo& tensor : header.tensors) all.push_back(tensor.name);
  return all;
}

}  // namespace

TEST_CASE("a header says where each tensor lies in the file") {
  const std::string json = R"({"__metadata__":{"format":"pt"},"w":)" + entry("F32", "[2,3]", 2, 26) +
                           R"(,"b":)" + entry("BF16", "[]", 0, 2) + "}   ";
  const SafetensorsHeader header = parse(json, 26);
  CHECK(header.data_begin == 8 + json.size());
  CHECK(header.metadata == std::vector{std::pair("format"s, "pt"s)});
  REQUIRE(header.tensors.size() == 2);
  const TensorInfo& scalar = header.tensors[0];
  CHECK(scalar.name == "b");
  CHECK(scalar.dtype == DType::kBF16);
  CHECK(scalar.shape.empty());
  CHECK(scalar.begin == header.data_begin);
  CHECK(scalar.end == header.data_begin + 2);
  const TensorInfo& matrix = header.tensors[1];
  CHECK(matrix.name == "w");
  CHECK(matrix.dtype == DType::kF32);
  CHECK(matrix.shape == std::vector<int64_t>{2, 3});
  CHECK(matrix.begin == header.data_begin + 2);
  CHECK(matrix.end == header.data_begin + 26);
}

TEST_CASE("a file may hold no tensor") {
  CHECK(parse("{}", 0).tensors.empty());
  CHECK(parse(R"({"__metadata__":{}})", 0).metadata.empty());
}

TEST_CASE("each dtype is known by its name and its bits") {
  struct Row {
    DType dtype;
    std::string_view name;
    int bits;
  };
  const std::vector<Row> rows = {
      {DType::kBool, "BOOL", 8},
      {DType::kU8, "U8", 8},
      {DType::kI8, "I8", 8},
      {DType::kF8E5M2, "F8_E5M2", 8},
      {DType::kF8E4M3, "F8_E4M3", 8},
      {DType::kF8E8M0, "F8_E8M0", 8},
      {DType::kF8E5M2FNUZ, "F8_E5M2FNUZ", 8},
      {DType::kF8E4M3FNUZ, "F8_E4M3FNUZ", 8},
      {DType::kF4, "F4", 4},
      {DType::kF6E2M3, "F6_E2M3", 6},
      {DType::kF6E3M2, "F6_E3M2", 6},
      {DType::kI16, "I16", 16},
      {DType::kU16, "U16", 16},
      {DType::kF16, "F16", 16},
      {DType::kBF16, "BF16", 16},
      {DType::kI32, "I32", 32},
      {DType::kU32, "U32", 32},
      {DType::kF32, "F32", 32},
      {DType::kC64, "C64", 64},
      {DType::kF64, "F64", 64},
      {DType::kI64, "I64", 64},
      {DType::kU64, "U64", 64},
  };
  CHECK(rows.size() == 22);
  for (const Row& row : rows) {
    CAPTURE(row.name);
    CHECK(dtype_name(row.dtype) == row.name);
    CHECK(dtype_bits(row.dtype) == row.bits);
    CHECK(dtype_from_name(row.name) == row.dtype);
    // Eight elements of b bits are b bytes.
    const auto bytes = static_cast<uint64_t>(row.bits);
    const SafetensorsHeader header = parse(R"({"t":)" + entry(row.name, "[8]", 0, bytes) + "}", bytes);
    CHECK(header.tensors.at(0).dtype == row.dtype);
  }
}

TEST_CASE("an unknown dtype is refused by its name") {
  for (const std::string name : {"F128", "f32", "", "F32 ", "float32"}) {
    CHECK(dtype_from_name(name) == std::nullopt);
    const std::string problem = problem_with(R"({"t":)" + entry(name, "[0]", 0, 0) + "}", 0);
    CHECK(contains(problem, "unknown dtype \"" + name + "\" (in \"t\")"));
  }
}

TEST_CASE("elements smaller than a byte must fill whole bytes") {
  CHECK(problem_with(R"({"t":)" + entry("F4", "[2,3]", 0, 3) + "}", 3) == "");
  CHECK(problem_with(R"({"t":)" + entry("F6_E3M2", "[4]", 0, 3) + "}", 3) == "");
  CHECK(contains(problem_with(R"({"t":)" + entry("F4", "[3]", 0, 2) + "}", 2),
                 "tensor \"t\": shape [3] of F4 does not end"));
  CHECK(contains(problem_with(R"({"t":)" + entry("F6_E2M3", "[5]", 0, 4) + "}", 4),
                 "does not end at a whole byte"));
}

TEST_CASE("tensors are ordered by place, whatever the order in the header") {
  const std::string json = R"({"z":)" + entry("U8", "[4]", 4, 8) + R"(,"e2":)" + entry("U8", "[0]", 4, 4) +
                           R"(,"e1":)" + entry("F32", "[3,0]", 4, 4) + R"(,"last":)" +
                           entry("U8", "[0]", 8, 8) + R"(,"a":)" + entry("U8", "[4]", 0, 4) + R"(,"first":)" +
                           entry("U8", "[0]", 0, 0) + "}";
  CHECK(names(parse(json, 8)) == std::vector<std::string>{"first", "a", "e1", "e2", "z", "last"});
}

TEST_CASE("names may be empty, escaped or any UTF-8") {
  const std::string json = R"({"":)" + entry("U8", "[1]", 0, 1) + R"(,"\u00e9\n\ud83d\ude00":)" +
                           entry("U8", "[1]", 1, 2) + ",\"\u00fc.\\u0000\":" + entry("U8", "[1]", 2, 3) + "}";
  CHECK(names(parse(json, 3)) == std::vector<std::string>{"", "\u00e9\n\U0001f600", "\u00fc.\0"s});
}

TEST_CASE("white space around the header is padding") {
  CHECK(problem_with(" \n{}", 0) == "");
  CHECK(problem_with("{}     \t\r\n", 0) == "");
}

TEST_CASE("text after the header is refused") {
  CHECK(problem_with("{}x", 0) == "safetensors header, byte 2: unexpected text after the end");
  CHECK(problem_with("{}\0"s, 0) == "safetensors header, byte 2: unexpected text after the end");
  CHECK(problem_with("{}{}", 0) == "safetensors header, byte 2: unexpected text after the end");
}

TEST_CASE("what is not a JSON object is refused") {
  for (const std::string json :
       {"", "   ", "null", "[]", "\"{}\"", "1", "{", "{\"t\":", "{\"t\":{}", "\xef\xbb\xbf{}"}) {
    CAPTURE(json);
    CHECK(contains(problem_with(json, 0), "safetensors header, byte "));
  }
}

TEST_CASE("two tensors of one name are refused") {
  const std::string same = entry("U8", "[1]", 0, 1);
  CHECK(problem_with(R"({"t":)" + same + R"(,"t":)" + same + "}", 1) ==
        "safetensors header: tensor \"t\": the name occurs twice");
  // Spelled differently, apart, and at places that would fit.
  const std::string json = R"({"t":)" + entry("U8", "[1]", 0, 1) + R"(,"s":)" + entry("U8", "[1]", 1, 2) +
                           R"(,"\u0074":)" + entry("U8", "[1]", 2, 3) + "}";
  CHECK(contains(problem_with(json, 3), "tensor \"t\": the name occurs twice"));
}

TEST_CASE("the range must hold exactly what shape and dtype take") {
  CHECK(problem_with(R"({"t":)" + entry("F32", "[2,3]", 0, 20) + "}", 20) ==
        "safetensors header: tensor \"t\": shape [2, 3] of F32 takes 24 bytes, but data_offsets [0, 20] hold "
        "20");
  CHECK(contains(problem_with(R"({"t":)" + entry("F32", "[]", 0, 8) + "}", 8),
                 "shape [] of F32 takes 4 bytes"));
  CHECK(contains(problem_with(R"({"t":)" + entry("F32", "[0]", 0, 4) + "}", 4), "takes 0 bytes"));
  CHECK(contains(problem_with(R"({"t":)" + entry("F32", "[1]", 4, 0) + "}", 4),
                 "[4, 0] end before they begin"));
}

TEST_CASE("a range beyond the file is refused") {
  CHECK(problem_with(R"({"t":)" + entry("U8", "[5]", 0, 5) + "}", 4) ==
        "safetensors header: tensor \"t\": data_offsets [0, 5] end after the file's 4 bytes of data "
        "(is the file truncated?)");
  const uint64_t huge = ~uint64_t{0};
  CHECK(contains(problem_with(R"({"t":)" + entry("U8", "[1]", huge - 1, huge) + "}", 1),
                 "end after the file's 1 bytes"));
}

TEST_CASE("overlaps are refused") {
  const std::string overlap =
      R"({"a":)" + entry("U8", "[4]", 0, 4) + R"(,"b":)" + entry("U8", "[4]", 3, 7) + "}";
  CHECK(problem_with(overlap, 7) ==
        "safetensors header: tensor \"b\": data_offsets [3, 7] overlap those of tensor \"a\", [0, 4]");
  const std::string same =
      R"({"a":)" + entry("U8", "[4]", 0, 4) + R"(,"b":)" + entry("U8", "[4]", 0, 4) + "}";
  CHECK(contains(problem_with(same, 4), "overlap"));
  const std::string empty_inside =
      R"({"a":)" + entry("U8", "[4]", 0, 4) + R"(,"b":)" + entry("U8", "[0]", 2, 2) + "}";
  CHECK(contains(problem_with(empty_inside, 4), "overlap"));
}

TEST_CASE("bytes that belong to no tensor are refused") {
  const std::string before = R"({"a":)" + entry("U8", "[4]", 1, 5) + "}";
  CHECK(problem_with(before, 5) ==
        "safetensors header: tensor \"a\": data_offsets [1, 5] leave the data from byte 0 to no tensor");
  const std::string between =
      R"({"a":)" + entry("U8", "[4]", 0, 4) + R"(,"b":)" + entry("U8", "[4]", 5, 9) + "}";
  CHECK(contains(problem_with(between, 9), "tensor \"b\": data_offsets [5, 9] leave the data from byte 4"));
  const std::string after = R"({"a":)" + entry("U8", "[4]", 0, 4) + "}";
  CHECK(problem_with(after, 5) ==
        "safetensors header: the tensors end at byte 4 of the data, the file at byte 5");
  CHECK(contains(problem_with("{}", 1), "the tensors end at byte 0"));
  const std::string empty_away = R"({"a":)" + entry("U8", "[0]", 3, 3) + "}";
  CHECK(contains(problem_with(empty_away, 3), "leave the data from byte 0"));
}

TEST_CASE("shapes whose size overflows are refused") {
  for (const std::string shape :
       {"[4294967296,4294967296]", "[4611686018427387904,4]", "[9223372036854775807,2,2]",
        "[2305843009213693952]", "[4294967296,4294967296,0]"}) {
    CAPTURE(shape);
    // Modulo 2^64 these take 0 bytes or few.
    CHECK(contains(problem_with(R"({"t":)" + entry("U8", shape, 0, 0) + "}", 0), "tensor \"t\""));
  }
  CHECK(contains(problem_with(R"({"t":)" + entry("U8", "[4294967296,4294967296]", 0, 0) + "}", 0),
                 "more than 2^64 bits"));
  CHECK(contains(problem_with(R"({"t":)" + entry("F64", "[288230376151711744]", 0, 0) + "}", 0),
                 "more than 2^64 bits"));
}

TEST_CASE("an empty tensor may have a huge dimension, but one that fits 63 bits") {
  CHECK(problem_with(R"({"t":)" + entry("U8", "[0,9223372036854775807]", 0, 0) + "}", 0) == "");
  CHECK(contains(problem_with(R"({"t":)" + entry("U8", "[0,9223372036854775808]", 0, 0) + "}", 0),
                 "the dimension 9223372036854775808 does not fit 63 bits (in \"t\")"));
}

TEST_CASE("numbers that are not unsigned integers are refused") {
  for (const std::string number : {"-1", "-0", "1.0", "1e0", "1.5", "01", "18446744073709551616", "1e400",
                                   "\"1\"", "null", "true", "[1]", "{}", "+1", "0x1", "NaN"}) {
    CAPTURE(number);
    const std::string in_shape = R"({"t":{"dtype":"U8","shape":[)" + number + R"(],"data_offsets":[0,1]}})";
    CHECK(contains(problem_with(in_shape, 1), "safetensors header, byte 2"));
    CHECK(contains(problem_with(in_shape, 1), "(in \"t\")"));
    const std::string in_offsets = R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,)" + number + "]}}";
    CHECK(contains(problem_with(in_offsets, 1), "(in \"t\")"));
  }
}

TEST_CASE("data_offsets are exactly two numbers") {
  for (const std::string offsets : {"[]", "[0]", "[0,1,1]", "[0,1,]", "0", "{}", "null", "\"01\""}) {
    CAPTURE(offsets);
    const std::string json = R"({"t":{"dtype":"U8","shape":[1],"data_offsets":)" + offsets + "}}";
    CHECK(contains(problem_with(json, 1), "(in \"t\")"));
  }
}

TEST_CASE("a tensor entry needs each of its three fields once") {
  const std::string dtype = R"("dtype":"U8")";
  const std::string shape = R"("shape":[1])";
  const std::string offsets = R"("data_offsets":[0,1])";
  const auto entry_of = [](const std::string& fields) { return R"({"t":{)" + fields + "}}"; };
  CHECK(problem_with(entry_of(offsets + "," + dtype + "," + shape), 1) == "");
  CHECK(contains(problem_with(entry_of(shape + "," + offsets), 1),
                 "the entry has no field \"dtype\" (in \"t\")"));
  CHECK(contains(problem_with(entry_of(dtype + "," + offsets), 1), "the entry has no field \"shape\""));
  CHECK(contains(problem_with(entry_of(dtype + "," + shape), 1), "the entry has no field \"data_offsets\""));
  CHECK(contains(problem_with(entry_of(""), 1), "the entry has no field"));
  for (const std::string& twice : {dtype, shape, offsets}) {
    CHECK(contains(problem_with(entry_of(dtype + "," + shape + "," + offsets + "," + twice), 1),
                   "occurs twice"));
  }
}

TEST_CASE("fields that are not known are skipped, but must be JSON") {
  const auto with = [](const std::string& extra) {
    return R"({"t":{"dtype":"U8","x":)" + extra + R"(,"shape":[1],"data_offsets":[0,1]}})";
  };
  CHECK(problem_with(with(R"({"dtype":[1,-2.5,null,true,"s",{"a":1,"a":2}]})"), 1) == "");
  CHECK(problem_with(with("[1,]"), 1) != "");
  CHECK(problem_with(with("\"\xff\""), 1) != "");
  CHECK(problem_with(with("\"\\ud800\""), 1) != "");
  CHECK(problem_with(with(""), 1) != "");
}

TEST_CASE("a tensor entry is an object") {
  for (const std::string value : {"null", "1", "\"F32\"", "[]", R"(["U8",[1],[0,1]])", "true"}) {
    CAPTURE(value);
    CHECK(problem_with(R"({"t":)" + value + "}", 1) ==
          "safetensors header, byte 5: expected an object (in \"t\")");
  }
}

TEST_CASE("metadata maps strings to strings") {
  const auto metadata = [](const std::string& value) { return R"({"__metadata__":)" + value + "}"; };
  const SafetensorsHeader header = parse(metadata(R"({"b":"2","a":"\u00e9","":""})"), 0);
  CHECK(header.metadata ==
        std::vector{std::pair(""s, ""s), std::pair("a"s, "\u00e9"s), std::pair("b"s, "2"s)});
  CHECK(header.tensors.empty());
  CHECK(parse(metadata("null"), 0).metadata.empty());
  for (const std::string value :
       {R"({"a":1})", R"({"a":null})", R"({"a":{}})", R"({"a":["x"]})", "[]", "\"x\"", "1"}) {
    CAPTURE(value);
    CHECK(contains(problem_with(metadata(value), 0), "(in \"__metadata__\")"));
  }
}

TEST_CASE("metadata that repeats a key has its last value") {
  const SafetensorsHeader header =
      parse(R"({"__metadata__":{"k":"1","j":"a","k":"2","i":"b","k":"3","j":"c"}})", 0);
  CHECK(header.metadata == std::vector{std::pair("i"s, "b"s), std::pair("j"s, "c"s), std::pair("k"s, "3"s)});
}

TEST_CASE("metadata occurs once") {
  CHECK(contains(problem_with(R"({"__metadata__":{},"__metadata__":{}})", 0), "the name occurs twice"));
  CHECK(contains(problem_with(R"({"__metadata__":null,"__metadata__":{}})", 0), "the name occurs twice"));
}

TEST_CASE("ill-formed UTF-8 is refused wherever it is") {
  CHECK(contains(problem_with("{\"\xff\":" + entry("U8", "[1]", 0, 1) + "}", 1), "byte 2: invalid UTF-8"));
  CHECK(contains(problem_with("{\"__metadata__\":{\"a\":\"\xed\xa0\x80\"}}", 0), "invalid UTF-8"));
  CHECK(contains(problem_with("{}\xff", 0), "unexpected text after the end"));
}

TEST_CASE("messages show hostile names on one line and cut short") {
  const std::string hostile = R"({"a\n\u001b[2Jb":)" + entry("U8", "[1]", 0, 2) + "}";
  CHECK(contains(problem_with(hostile, 2), R"(tensor "a\x0a\x1b[2Jb": )"));
  std::string name;
  for (int i = 0; i < 1'000'000; ++i) name += "\u00e9";
  const std::string problem = problem_with("{\"" + name + "x\":" + entry("U8", "[1]", 0, 2) + "}", 2);
  CHECK(problem.size() < 500);
  CHECK(contains(problem, "\u00e9...\""));
}

TEST_CASE("the header must fit the file") {
  const std::string json = "{}";
  CHECK_NOTHROW(parse_safetensors_header(json, 10));
  for (const uint64_t file_bytes : {0, 2, 7, 8, 9}) {
    CAPTURE(file_bytes);
    CHECK_THROWS_WITH_AS(
        parse_safetensors_header(json, file_bytes),
        ("safetensors header: 2 bytes do not fit a file of " + std::to_string(file_bytes) + " bytes").c_str(),
        Error);
  }
}

TEST_CASE("a header is accepted up to the limit and refused beyond it") {
  std::string json = "{}";
  json.resize(kMaxHeaderBytes, ' ');
  CHECK(problem_with(json, 0) == "");
  json += ' ';
  CHECK(problem_with(json, 0) == "safetensors header: 100000001 bytes are more than the limit of 100000000");
}

TEST_CASE("deep nesting in a header is an error, not an overflow of the stack") {
  const std::string deep(10'000'000, '[');
  CHECK(contains(problem_with(R"({"t":{"x":)" + deep, 0), "nested more than 127 deep"));
  // The crate accepts 125 arrays here.
  const auto with = [](size_t arrays) {
    return R"({"t":{"x":)" + std::string(arrays, '[') + std::string(arrays, ']') +
           R"(,"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  };
  CHECK(problem_with(with(125), 1) == "");
  CHECK(contains(problem_with(with(126), 1), "nested more than 127 deep"));
}

TEST_CASE("every prefix of a header is refused") {
  const std::string json = R"({"__metadata__":{"k":"v"},"t":)" + entry("F32", "[2,2]", 0, 16) + "}";
  CHECK(problem_with(json, 16) == "");
  for (size_t size = 0; size < json.size(); ++size) {
    CAPTURE(size);
    CHECK(problem_with(json.substr(0, size), 16) != "");
  }
}

TEST_CASE("a hundred thousand tensors in any order are parsed") {
  constexpr uint64_t kTensors = 100'000;
  std::string json = "{";
  for (uint64_t i = 0; i < kTensors; ++i) {
    const uint64_t place = i * 7919 % kTensors;  // 7919 is prime, so each place occurs once
    if (i != 0) json += ',';
    json += "\"model.layers." + std::to_string(place) +
            ".weight\":" + entry("U8", "[2,4]", 8 * place, 8 * place + 8);
  }
  json += "}";
  const SafetensorsHeader header = parse(json, 8 * kTensors);
  REQUIRE(header.tensors.size() == kTensors);
  for (uint64_t i = 0; i < kTensors; ++i) {
    REQUIRE(header.tensors[i].begin == header.data_begin + 8 * i);
    REQUIRE(header.tensors[i].name == "model.layers." + std::to_string(i) + ".weight");
  }
}

TEST_CASE("checked arithmetic gives no value where it would wrap") {
  constexpr uint64_t kMax = ~uint64_t{0};
  CHECK(checked_add(kMax - 1, 1) == kMax);
  CHECK(checked_add(kMax, 1) == std::nullopt);
  CHECK(checked_add(1, kMax) == std::nullopt);
  CHECK(checked_mul(kMax, 1) == kMax);
  CHECK(checked_mul(0, kMax) == 0);
  CHECK(checked_mul(kMax, 0) == 0);
  CHECK(checked_mul(uint64_t{1} << 32, (uint64_t{1} << 32) - 1) == kMax - ((uint64_t{1} << 32) - 1));
  CHECK(checked_mul(uint64_t{1} << 32, uint64_t{1} << 32) == std::nullopt);
}

}  // namespace rdmaload
