// Runs a target over every file of the directories that are its arguments: the corpus as an ordinary test,
// with any compiler. Each file also loses its end and has its bytes flipped, cheaply and always the same way.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  std::vector<std::filesystem::path> paths;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  constexpr size_t kVariants = 16;  // of each file and kind
  for (const auto& path : paths) {
    std::fprintf(stderr, "%s\n", path.c_str());  // the last line says which one failed
    std::ifstream file(path, std::ios::binary);
    const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    for (size_t i = 0; i < kVariants && !bytes.empty(); ++i) {
      const size_t at = i * bytes.size() / kVariants;
      // Copies of exactly this size, so that a read behind the end is noticed.
      std::vector<uint8_t> variant(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(at));
      LLVMFuzzerTestOneInput(variant.data(), variant.size());
      variant = bytes;
      variant[at] ^= static_cast<uint8_t>(1 << i % 8);
      LLVMFuzzerTestOneInput(variant.data(), variant.size());
    }
  }
  std::fprintf(stderr, "%zu files\n", paths.size());
  return paths.empty() ? 1 : 0;
}
