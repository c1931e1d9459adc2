#include "loader/weight_map.h"

#include <doctest/doctest.h>

#include <string>

#include "core/error.h"

namespace rdmaload {
namespace {

using Files = std::set<std::string>;

TEST_CASE("each file that a weight map names counts once, whatever else the text holds") {
  CHECK(files_of_weight_map(R"({"weight_map":{}})").empty());
  CHECK(files_of_weight_map(R"({"metadata": {"total_size": 1.5e9, "weight_map": {"x": "none"}},
                               "weight_map": {"a": "2", "b": "1", "c": "2", "": "", "d": "\u00e9"}})") ==
        Files{"", "1", "2", "\u00e9"});
  CHECK(files_of_weight_map(R"({"weight_map": {"a": ""}})") == Files{""});
}

TEST_CASE("what is no weight map is kFormat") {
  for (const std::string wrong :
       {"", "[]", "{}", R"({"weight_map":[]})", R"({"weight_map":{"a":1}})", R"({"weight_map":{"a":"f"})",
        R"({"weight_map":{"a":"f"}} x)", R"({"weights":{"a":"f"}})"}) {
    CAPTURE(wrong);
    try {
      files_of_weight_map(wrong);
      FAIL("it was taken");
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kFormat);
    }
  }
}

}  // namespace
}  // namespace rdmaload
