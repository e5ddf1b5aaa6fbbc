// SPDX-License-Identifier: Apache-2.0
// The pool: order of allocation, revival out of the middle of a list, exact token counts.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <random>
#include <vector>

#include "quire/block_allocator.h"
#include "quire/error.h"

using quire::BlockAllocator;
using Ids = std::vector<int32_t>;

namespace {

Ids take(BlockAllocator& pool, size_t count) {
  Ids blocks(count);
  REQUIRE(pool.allocate(blocks));
  return blocks;
}

}  // namespace

TEST_CASE("a fresh pool hands out its blocks in order and refuses what it can't give") {
  BlockAllocator pool(4, 16);
  CHECK(take(pool, 3) == Ids{0, 1, 2});
  Ids two(2, -1);
  CHECK_FALSE(pool.allocate(two));
  CHECK(two == Ids{-1, -1});
  CHECK(pool.num_free() == 1);
  CHECK(take(pool, 1) == Ids{3});
  CHECK(pool.num_used() == 4);
  CHECK(pool.allocate({}) == 0);
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
  CHECK(pool.allocate(blocks) == 2);
  CHECK(blocks == Ids{3, 2, 0});
  CHECK_FALSE(pool.is_cached(2));
  CHECK(pool.is_cached(1));
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
  CHECK_FALSE(pool.allocate(blocks));
  pool.release(1);  // now the most recently used
  CHECK(pool.allocate(blocks) == 3);
  CHECK(blocks == Ids{0, 2, 1});
}

TEST_CASE("tokens are counted once however many share a block") {
  BlockAllocator pool(4, 16);
  take(pool, 2);
  pool.set_num_tokens(0, 16);
  pool.set_num_tokens(1, 5);
  CHECK(pool.num_used_tokens() == 21);
  pool.share(0);
  CHECK(pool.num_used_tokens() == 21);
  pool.mark_cached(0);
  pool.release(0);
  pool.release(0);
  CHECK(pool.num_used_tokens() == 5);  // a cached block is not used
  pool.share(0);
  CHECK(pool.num_used_tokens() == 21);
  pool.release(1);
  CHECK(pool.num_used_tokens() == 16);
  CHECK(pool.high_water() == 2);
  pool.validate();
}

TEST_CASE("five and a half million blocks") {
  BlockAllocator pool(5'500'000, 16);
  Ids blocks(5'500'000);
  REQUIRE(pool.allocate(blocks));
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
      if (pool.allocate(blocks)) held.insert(held.end(), blocks.begin(), blocks.end());
    } else if (!held.empty()) {
      const size_t i = random() % held.size();
      const int32_t block = held[i];
      if (choice == 1) {
        pool.share(block);
        held.push_back(block);
      } else if (choice == 2 && !pool.is_cached(block)) {
        pool.set_num_tokens(block, static_cast<int32_t>(random() % 5));
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
  CHECK(pool.num_used_tokens() == 0);
  pool.validate();
}
