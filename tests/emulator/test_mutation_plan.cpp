// SPDX-License-Identifier: Apache-2.0
// Likewise the planner, against that of the host.
#include "emulator/mutation.h"
#include "emulator/plan_suite.h"
#include "kernels/plan.h"

namespace quire::emulator {
namespace {

std::string run_all(uint32_t seed) {
  const Planner planner = device::plan<PlannerShape>;
  PlanCase mixed = mixed_plan_case();
  PlanCase window = mixed;
  window.desc.causal = false;
  window.desc.window_left = 50, window.desc.window_right = 700;
  PlanCase decode{plan_model(64, 8), {132, 128}};
  decode.one_row_each = true;
  for (int i = 0; i < 1100; ++i) decode.lengths.push_back({1, i * 37 % 3000});
  PlanCase one{plan_model(8, 2), {132, 128}};
  one.lengths = {{1, 65536}};
  PlanCase worker = one;
  worker.cut.parallelism = 1;
  PlanCase shares{plan_model(4, 1), {2, 128}};  // eight of them, and nine chunks
  shares.lengths = {{1, 9 * kKvChunk}};
  PlanCase few{plan_model(32, 8), {132, 128}};  // pieces for a warp, items for more than one
  few.lengths = {{1, 700}, {1, 30}, {1, 900}, {1, 1}};
  for (const PlanCase& c : {few, shares, mixed, window, decode, one, worker})
    if (const std::string error = compare_plans(planner, c, seed); !error.empty()) return error;
  return {};
}

}  // namespace
}  // namespace quire::emulator

int main() { return quire::emulator::run_seeds(quire::emulator::run_all); }
