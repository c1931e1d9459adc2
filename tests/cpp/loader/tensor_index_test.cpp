#include "loader/tensor_index.h"

#include <doctest/doctest.h>

#include <string>

#include "core/error.h"
#include "support/models.h"

namespace rdmaload {
namespace {

TEST_CASE("the tensors of all files stand in the index with their file and their range in it") {
  TensorIndex index;
  const std::string first = testing::safetensors_header({10, testing::kScalar}),
                    second = testing::safetensors_header({0, 7});
  index.add_file(3, "a.safetensors", 8 + first.size() + 14, first);
  index.add_file(5, "b.safetensors", 8 + second.size() + 7, second);
  const auto& tensors = index.tensors();
  REQUIRE(tensors.size() == 4);
  CHECK(tensors[0].file == 3);
  CHECK(tensors[0].info.name == "t0");
  CHECK(tensors[0].info.begin == 8 + first.size());
  CHECK(tensors[0].info.end == 8 + first.size() + 10);
  CHECK(tensors[1].info.shape.empty());
  CHECK(tensors[1].info.end - tensors[1].info.begin == 4);
  CHECK(tensors[2].file == 5);
  CHECK(tensors[2].info.begin == tensors[2].info.end);
  CHECK(tensors[3].info.end == 8 + second.size() + 7);
}

TEST_CASE("a bad header is refused with the file's path and leaves the index as it was") {
  TensorIndex index;
  const std::string header = testing::safetensors_header({10});
  index.add_file(0, "good", 8 + header.size() + 10, header);
  try {
    index.add_file(1, "dir/bad.safetensors", 8 + header.size() + 9, header);  // the file ends too early
    FAIL("accepted");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kFormat);
    CHECK(std::string(error.what()).find("dir/bad.safetensors") != std::string::npos);
  }
  CHECK(index.tensors().size() == 1);
}

TEST_CASE("a name that two files hold is found, and which two tensors have it") {
  TensorIndex index;
  const std::string header = testing::safetensors_header({10, 4});
  CHECK(!index.duplicate());
  index.add_file(0, "a", 8 + header.size() + 14, header);
  CHECK(!index.duplicate());
  index.add_single(1, "b", 8 + testing::safetensors_header({4}).size() + 4, testing::safetensors_header({4}),
                   "t0", "t1");
  REQUIRE(index.duplicate());
  CHECK(index.duplicate()->first == 1);
  CHECK(index.duplicate()->second == 2);
}

TEST_CASE("a file of one tensor gives it under another name, and any other content is refused") {
  TensorIndex index;
  const std::string one = testing::safetensors_header({10}), two = testing::safetensors_header({10, 4});
  index.add_single(2, "key", 8 + one.size() + 10, one, "t0", "layer.weight");
  REQUIRE(index.tensors().size() == 1);
  CHECK(index.tensors()[0].info.name == "layer.weight");
  CHECK(index.tensors()[0].info.begin == 8 + one.size());
  CHECK(index.tensors()[0].file == 2);
  const auto refused = [&](const std::string& header, uint64_t data_bytes, std::string_view stored_name) {
    try {
      index.add_single(3, "m/keys/rank_0/w", 8 + header.size() + data_bytes, header, stored_name, "w");
    } catch (const Error& error) {
      return error.code() == ErrorCode::kFormat &&
             std::string(error.what()).find("m/keys/rank_0/w") != std::string::npos;
    }
    return false;
  };
  CHECK(refused(two, 14, "t0"));
  CHECK(refused(one, 10, "t1"));
  CHECK(refused(one, 11, "t0"));
  CHECK(refused("{}", 0, "t0"));
  CHECK(index.tensors().size() == 1);
}

TEST_CASE("a file without tensors is divided into blocks, the last one shorter") {
  TensorIndex index;
  index.add_blocks(0, 10, 4);
  index.add_blocks(1, 8, 4);
  index.add_blocks(2, 0, 4);
  index.add_blocks(3, 3, 4);
  const auto& tensors = index.tensors();
  REQUIRE(tensors.size() == 6);
  const uint64_t expected[][3] = {{0, 0, 4}, {0, 4, 8}, {0, 8, 10}, {1, 0, 4}, {1, 4, 8}, {3, 0, 3}};
  for (size_t i = 0; i < 6; ++i) {
    CHECK(tensors[i].file == expected[i][0]);
    CHECK(tensors[i].info.begin == expected[i][1]);
    CHECK(tensors[i].info.end == expected[i][2]);
    CHECK(tensors[i].info.dtype == DType::kU8);
    CHECK(tensors[i].info.shape ==
          std::vector<int64_t>{static_cast<int64_t>(expected[i][2] - expected[i][1])});
  }
}

TEST_CASE("blocks of a file near 2^63 end, and a larger file is refused") {
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  TensorIndex index;
  index.add_blocks(0, kMost, uint64_t{1} << 62);
  REQUIRE(index.tensors().size() == 2);
  CHECK(index.tensors()[1].info.end == kMost);
  CHECK_THROWS_AS(index.add_blocks(0, std::numeric_limits<uint64_t>::max(), uint64_t{1} << 63), Error);
}

}  // namespace
}  // namespace rdmaload
