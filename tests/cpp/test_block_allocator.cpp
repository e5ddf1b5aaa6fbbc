// SPDX-License-Identifier: Apache-2.0
// The pool: order of allocation, revival out of the middle of a list, levels.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "quire/block_allocator.h"
#include "quire/error.h"

using quire::BlockAllocator;
using Ids = std::vector<int32_t>;

namespace {

int32_t oldest(int32_t victim) { return victim; }

bool fill(BlockAllocator& pool, std::span<int32_t> blocks) { return pool.allocate(blocks, oldest); }

Ids take(BlockAllocator& pool, size_t count) {
  Ids blocks(count);
  REQUIRE(fill(pool, blocks));
  return blocks;
}

}  // namespace

TEST_CASE("a fresh pool hands out its blocks in order and refuses what it can't give") {
  BlockAllocator pool(4, 16);
  CHECK(take(pool, 3) == Ids{0, 1, 2});
  Ids two(2, -1);
  CHECK_FALSE(fill(pool, two));
  CHECK(two == Ids{-1, -1});
  CHECK(pool.num_free() == 1);
  CHECK(take(pool, 1) == Ids{3});
  CHECK(pool.num_used() == 4);
  CHECK(fill(pool, {}));
  pool.validate();
}

TEST_CASE("bad sizes are refused by name") {
  CHECK_THROWS_WITH_AS(BlockAllocator(0, 16),
                       "BlockAllocator: num_blocks: expected 1 or more, got 0",
                       quire::InvalidArgument);
  CHECK_THROWS_WITH_AS(BlockAllocator(1, 0),
                       "BlockAllocator: block_size: expected 1 or more, got 0",
                       quire::InvalidArgument);
}

TEST_CASE("more blocks than 28 bits can name are refused") {
  CHECK_THROWS_WITH_AS(BlockAllocator(BlockAllocator::kMaxBlocks + 1, 16),
                       "BlockAllocator: num_blocks: expected at most 268434947, got 268434948",
                       quire::InvalidArgument);
}

TEST_CASE("the block freed last is used first") {
  BlockAllocator pool(4, 16);
  take(pool, 3);
  pool.release(0);
  pool.release(2);
  CHECK(take(pool, 3) == Ids{2, 0, 3});
}

TEST_CASE("cached blocks are taken last, the least recently used first") {
  BlockAllocator pool(4, 16);
  take(pool, 4);
  for (int32_t block : {0, 1, 2}) pool.mark_cached(block);
  for (int32_t block : {2, 0, 1, 3}) pool.release(block);
  CHECK(pool.num_cached() == 3);
  CHECK(pool.num_free() == 1);
  Ids blocks(3);
  CHECK(fill(pool, blocks));
  CHECK(blocks == Ids{3, 2, 0});
  CHECK_FALSE(pool.is_cached(2));
  CHECK(pool.num_cached() == 1);
  pool.validate();
}

TEST_CASE("a cached block revives out of the middle of the LRU list") {
  BlockAllocator pool(3, 16);
  take(pool, 3);
  for (int32_t block : {0, 1, 2}) pool.mark_cached(block);
  for (int32_t block : {0, 1, 2}) pool.release(block);
  pool.share(1);
  CHECK(pool.refcount(1) == 1);
  pool.validate();
  Ids blocks(3);
  CHECK(pool.is_cached(1));
  CHECK_FALSE(fill(pool, blocks));
  pool.release(1);  // now the most recently used
  CHECK(fill(pool, blocks));
  CHECK(blocks == Ids{0, 2, 1});
}

TEST_CASE("lower levels are taken first, each in its own order") {
  BlockAllocator pool(5, 16);
  take(pool, 5);
  for (int32_t block : {0, 1, 2, 3, 4}) pool.mark_cached(block);
  pool.set_level(0, 90);
  pool.set_level(2, 10);
  for (int32_t block : {0, 1, 2, 3}) pool.release(block);
  pool.set_level(3, 10);  // of an idle block: behind those of its new level
  pool.release(4);
  CHECK(pool.level(4) == BlockAllocator::kStartLevel);
  pool.validate();
  CHECK(take(pool, 5) == Ids{1, 4, 2, 3, 0});
  CHECK(pool.level(0) == BlockAllocator::kStartLevel);  // a new life
  pool.validate();
}

TEST_CASE("the caller may take another cached block than the oldest") {
  BlockAllocator pool(3, 16);
  take(pool, 3);
  for (int32_t block : {0, 1, 2}) pool.mark_cached(block);
  for (int32_t block : {0, 1, 2}) pool.release(block);
  Ids blocks(2);
  Ids chosen{1, 2};
  CHECK(pool.allocate(blocks, [&](int32_t victim) {
    CHECK(victim == 0);
    const int32_t block = chosen.back();
    chosen.pop_back();
    return block;
  }));
  CHECK(blocks == Ids{2, 1});
  CHECK(pool.num_cached() == 1);
  pool.validate();
}

TEST_CASE("five and a half million blocks") {
  BlockAllocator pool(5'500'000, 16);
  Ids blocks(5'500'000);
  REQUIRE(fill(pool, blocks));
  for (int32_t block : blocks) pool.release(block);
  CHECK(pool.num_free() == 5'500'000);
  pool.validate();
}

TEST_CASE("random traffic keeps the pool consistent") {
  std::mt19937 random(7);
  BlockAllocator pool(13, 4);
  Ids held;  // one entry a reference
  for (int turn = 0; turn < 3000; ++turn) {
    const uint32_t choice = random() % 5;
    if (choice == 0) {
      Ids blocks(random() % 4);
      if (fill(pool, blocks)) held.insert(held.end(), blocks.begin(), blocks.end());
    } else if (!held.empty()) {
      const size_t i = random() % held.size();
      const int32_t block = held[i];
      if (choice == 1) {
        pool.share(block);
        held.push_back(block);
      } else if (choice == 2 && !pool.is_cached(block)) {
        pool.set_level(block, static_cast<int32_t>(random() % 3));
        pool.mark_cached(block);
      } else {
        pool.release(block);
        held.erase(held.begin() + static_cast<int64_t>(i));
      }
    }
    pool.validate();
  }
  for (int32_t block : held) pool.release(block);
  CHECK(pool.num_used() == 0);
  pool.validate();
}

TEST_CASE("runs of the free list, however it came about: each block is handed out once") {
  BlockAllocator pool(64, 16);
  std::mt19937 random(5);
  std::vector<Ids> held;
  for (int turn = 0; turn < 2000; ++turn) {
    if (random() % 2) {
      held.emplace_back(random() % 12);
      if (!fill(pool, held.back())) held.pop_back();
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      Ids blocks = held.back();
      held.pop_back();
      if (random() % 3 == 0) std::shuffle(blocks.begin(), blocks.end(), random);
      if (!blocks.empty() && random() % 3 == 0) {  // one of them is held twice, one worth keeping
        pool.share(blocks[0]);
        pool.mark_cached(blocks.back());
        held.push_back({blocks[0]});
      }
      pool.release(blocks);
    }
    pool.validate();
    size_t num_held = 0;
    std::vector<int> seen(64, 0);
    for (const Ids& blocks : held)
      for (int32_t block : blocks) {
        ++num_held;
        CHECK(++seen[block] <= pool.refcount(block));
      }
    CHECK(num_held == static_cast<size_t>(pool.num_used()));
  }
}

TEST_CASE("a list of blocks is given back the last first") {
  BlockAllocator pool(8, 16);
  const Ids blocks = take(pool, 5);
  pool.release(blocks);
  CHECK(take(pool, 6) == Ids{0, 1, 2, 3, 4, 5});
}
