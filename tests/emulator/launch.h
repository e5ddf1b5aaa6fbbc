// SPDX-License-Identifier: Apache-2.0
// launch(): runs a kernel over a grid, one block after the other in an order drawn from the seed.
//
//   Report report = launch({.blocks = 4, .threads = 128, .shared_bytes = 4096}, options,
//                          [&] { my_kernel(params); });
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "emulator/block.h"

namespace quire::emulator {

struct Grid {
  int blocks = 1;
  int threads = 32;  // a multiple of 32
  int shared_bytes = 0;
};

inline Report launch(const Grid& grid, const Options& options,
                     const std::function<void()>& kernel) {
  std::vector<int> order(grid.blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::minstd_rand(options.seed));
  FiberStacks stacks(grid.threads);
  Report report;
  for (int index : order) {
    if (!report.ok()) break;
    Block(index, grid.blocks, grid.threads, static_cast<size_t>(grid.shared_bytes), options, stacks,
          report, kernel)
        .run();
  }
  return report;
}

}  // namespace quire::emulator
