// SPDX-License-Identifier: Apache-2.0
// The emulator against what GPUs have answered (golden/*.txt, written by golden/record.cu).
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "emulator/golden/inputs.h"
#include "emulator/launch.h"

namespace quire::device::golden {
namespace {

std::string folder;  // of the recordings

// By "probe case".
using Recording = std::map<std::string, std::vector<uint32_t>>;

std::vector<std::filesystem::path> recordings() {
  std::vector<std::filesystem::path> found;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().extension() == ".txt") found.push_back(entry.path());
  return found;
}

Recording read(const std::filesystem::path& path) {
  Recording recording;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name, index;
    words >> name >> index;
    auto& values = recording[name + " " + index];
    for (uint32_t word; words >> std::hex >> word;) values.push_back(word);
  }
  return recording;
}

// What the emulator answers, lane after lane.
template <class Probe>
std::vector<uint32_t> ask(std::vector<uint32_t> input) {
  std::vector<uint32_t> output(input.size()), result;
  const emulator::Report report = emulator::launch({1, kWarpSize, kSharedBytes}, {}, [&] {
    Probe::run(input.data() + lane() * kWords, output.data() + lane() * kWords);
  });
  CHECK(report.error == "");
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < Probe::kOut; ++i) result.push_back(output[lane * kWords + i]);
  return result;
}

double ulps_apart(float a, float b) {
  if (a == b || (std::isnan(a) && std::isnan(b))) return 0;
  if (!std::isfinite(a) || !std::isfinite(b)) return INFINITY;
  const float larger = std::fmax(std::fabs(a), std::fabs(b));
  return std::fabs(double{a} - b) / (std::nextafter(larger, INFINITY) - larger);
}

// How far `got` may be from `recorded`; subnormals may have been flushed to zero.
struct Tolerance {
  double ulps, absolute;
};

Tolerance tolerance_of(const std::string& probe) {
  if (probe == "exp2" || probe == "rcp") return {2, 1.2e-38};  // approximate instructions
  if (probe == "log2") return {2, 2.4e-7};
  return {0, 0};
}

bool agrees(const std::string& probe, uint32_t got, uint32_t recorded) {
  if (got == recorded) return true;
  const float a = as_float(got), b = as_float(recorded);
  if (probe.rfind("pack", 0) == 0) {  // two halves; which NaN it is does not matter
    const uint32_t infinity = probe == "pack_float16" ? 0x7C00 : 0x7F80;
    const auto same = [&](uint32_t x, uint32_t y) {
      return x == y || ((x & 0x7FFF) > infinity && (y & 0x7FFF) > infinity);
    };
    return same(got & 0xFFFF, recorded & 0xFFFF) && same(got >> 16, recorded >> 16);
  }
  if (std::isnan(a) && std::isnan(b)) return true;
  const Tolerance tolerance = tolerance_of(probe);
  return tolerance.ulps > 0 &&
         (ulps_apart(a, b) <= tolerance.ulps || std::fabs(double{a} - b) <= tolerance.absolute);
}

// Sums of products are exact to a few units in the last place of the sum of their magnitudes.
template <class Probe>
std::vector<double> bounds(const std::string& probe, std::vector<uint32_t> input) {
  if (probe.rfind("mma", 0) != 0) return {};
  for (uint32_t& word : input) word &= 0x7FFF7FFFu;
  std::vector<double> result;
  for (uint32_t word : ask<Probe>(input)) result.push_back(as_float(word) * 0x1p-22);
  return result;
}

template <class Probe>
void compare(const std::string& name, int probe, const Recording& recording) {
  for (int index = 0; index < kCases; ++index) {
    const auto entry = recording.find(name + " " + std::to_string(index));
    REQUIRE_MESSAGE(entry != recording.end(), name, " was not recorded");
    const std::vector<uint32_t> input = make_input(Probe::kInput, probe, index);
    const std::vector<uint32_t> got = ask<Probe>(input);
    const std::vector<double> bound = bounds<Probe>(name, input);
    REQUIRE(entry->second.size() == got.size());
    for (size_t i = 0; i < got.size(); ++i) {
      const uint32_t recorded = entry->second[i];
      const bool near =
          !bound.empty() && std::fabs(double{as_float(got[i])} - as_float(recorded)) <= bound[i];
      CHECK_MESSAGE((near || agrees(name, got[i], recorded)), name, " case ", index, " word ", i,
                    ": ", got[i], " recorded ", recorded);
    }
  }
}

TEST_CASE("the emulator answers as the recorded GPUs did") {
  for (const auto& path : recordings()) {
    INFO(path.string());
    const Recording recording = read(path);
    int probe = 0;
#define QUIRE_COMPARE(name, ...) compare<__VA_ARGS__>(#name, probe++, recording);
    QUIRE_PROBES(QUIRE_COMPARE)
  }
}

TEST_CASE("the probes answer something, and the comparison sees a wrong word") {
  int probe = 0;
#define QUIRE_ANSWERS(name, ...)                                                               \
  {                                                                                            \
    const auto got = ask<__VA_ARGS__>(make_input(__VA_ARGS__::kInput, probe++, 1));            \
    CHECK(got.size() == size_t{kWarpSize} * __VA_ARGS__::kOut);                                \
    CHECK(std::any_of(got.begin(), got.end(), [&](uint32_t word) { return word != got[0]; })); \
  }
  QUIRE_PROBES(QUIRE_ANSWERS)
  CHECK(agrees("exp2", 0x3F800000, 0x3F800002));
  CHECK(!agrees("exp2", 0x3F800000, 0x3F800003));
  CHECK(!agrees("mul", 0x3F800000, 0x3F800001));
  CHECK(agrees("pack_float16", 0x7FFF3C00, 0x7E003C00));
  CHECK(!agrees("pack_float16", 0x7C003C00, 0x7E003C00));
}

}  // namespace
}  // namespace quire::device::golden

int main(int argc, char** argv) {
  if (argc > 1) quire::device::golden::folder = argv[1];
  doctest::Context context;
  return context.run();
}
