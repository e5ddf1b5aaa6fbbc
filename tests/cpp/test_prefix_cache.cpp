// SPDX-License-Identifier: Apache-2.0
// The tree of cached blocks: exact match, namespaces, leaves before parents.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "quire/block_allocator.h"
#include "quire/error.h"
#include "quire/prefix_cache.h"

using quire::PrefixCache;
using Tokens = std::vector<int32_t>;

namespace {

int32_t insert(PrefixCache& cache, int32_t parent, const Tokens& tokens, int32_t block) {
  return cache.insert(parent, tokens.data(), static_cast<int32_t>(tokens.size()), block);
}

// The child that holds exactly these tokens.
int32_t find(const PrefixCache& cache, int32_t parent, const Tokens& tokens) {
  const auto found = cache.find(parent, tokens.data(), static_cast<int32_t>(tokens.size()));
  return found.num_tokens == static_cast<int32_t>(tokens.size()) ? found.block : PrefixCache::kNone;
}

PrefixCache::Match longest(const PrefixCache& cache, int32_t parent, const Tokens& tokens) {
  return cache.find(parent, tokens.data(), static_cast<int32_t>(tokens.size()));
}

}  // namespace

TEST_CASE("a block is found by its parent and its tokens") {
  PrefixCache cache(8, 2);
  const int32_t root = cache.open_root({});
  const Tokens ab{1, 2}, cd{3, 4};
  CHECK(find(cache, root, ab) == PrefixCache::kNone);
  CHECK(insert(cache, root, ab, 5) == 5);
  CHECK(insert(cache, 5, cd, 6) == 6);
  CHECK(find(cache, root, ab) == 5);
  CHECK(find(cache, 5, cd) == 6);
  CHECK(find(cache, root, cd) == PrefixCache::kNone);  // same tokens, other prefix
  CHECK(cache.parent(6) == 5);
  CHECK(cache.size() == 2);
  cache.validate();
}

TEST_CASE("the same contents are cached once") {
  PrefixCache cache(8, 2);
  const int32_t root = cache.open_root({});
  const Tokens ab{1, 2};
  CHECK(insert(cache, root, ab, 3) == 3);
  CHECK(insert(cache, root, ab, 4) == 3);
  CHECK_FALSE(cache.contains(4));
  CHECK(cache.size() == 1);
}

TEST_CASE("every one of many siblings is found") {
  const int32_t count = 1000;
  PrefixCache cache(count, 1);
  const int32_t root = cache.open_root({});
  for (int32_t i = 0; i < count; ++i) CHECK(insert(cache, root, {i}, i) == i);
  for (int32_t i = 0; i < count; ++i) CHECK(find(cache, root, {i}) == i);
  cache.validate();
  for (int32_t i = 0; i < count; i += 2) cache.erase(i);
  for (int32_t i = 0; i < count; ++i)
    CHECK(find(cache, root, {i}) == (i % 2 == 0 ? PrefixCache::kNone : i));
  cache.validate();
}

TEST_CASE("negative and extreme tokens are as good as any") {
  PrefixCache cache(4, 2);
  const int32_t root = cache.open_root({});
  const Tokens low{-1, INT32_MIN}, high{-1, INT32_MAX};
  insert(cache, root, low, 0);
  CHECK(find(cache, root, high) == PrefixCache::kNone);
  CHECK(find(cache, root, low) == 0);
}

TEST_CASE("ids beyond 20 bits are exact too, beside ids that share their low bits") {
  PrefixCache cache(6, 2);
  const int32_t root = cache.open_root({});
  const int32_t high = 1 << 20;
  CHECK(insert(cache, root, {5, 7}, 0) == 0);
  CHECK(insert(cache, root, {5, high + 7}, 1) == 1);
  CHECK(insert(cache, root, {high + 5, 7}, 2) == 2);
  CHECK(insert(cache, root, {5, high - 1}, 3) == 3);
  cache.validate();
  CHECK(find(cache, root, {5, 7}) == 0);
  CHECK(find(cache, root, {5, high + 7}) == 1);
  CHECK(find(cache, root, {high + 5, 7}) == 2);
  CHECK(cache.tokens(1) == Tokens{5, high + 7});
  CHECK(cache.tokens(3) == Tokens{5, high - 1});
  cache.erase(1);
  CHECK(find(cache, root, {5, high + 7}) == PrefixCache::kNone);
  cache.validate();
}

TEST_CASE("the child that shares the longest beginning, among many that share some of it") {
  const int32_t count = 2000;
  PrefixCache cache(count, 20);
  const int32_t root = cache.open_root({});
  const auto tokens_of = [](int32_t i) {
    Tokens tokens(20, 9);
    tokens[3 + i % 14] = 1000 + i / 14;
    tokens[18] = i;
    return tokens;
  };
  for (int32_t i = 0; i < count; ++i) CHECK(insert(cache, root, tokens_of(i), i) == i);
  cache.validate();
  std::mt19937 random(5);
  for (int turn = 0; turn < 500; ++turn) {
    Tokens query = tokens_of(static_cast<int32_t>(random() % count));
    query[random() % 20] = static_cast<int32_t>(random() % 1200);
    query.resize(1 + random() % 20);
    int32_t most = 0;
    for (int32_t i = 0; i < count; ++i) {
      const Tokens other = tokens_of(i);
      const auto end = std::mismatch(query.begin(), query.end(), other.begin()).first;
      most = std::max(most, static_cast<int32_t>(end - query.begin()));
    }
    const auto found = longest(cache, root, query);
    CHECK(found.num_tokens == most);
    if (most == 0) continue;
    const Tokens other = cache.tokens(found.block);
    CHECK(std::equal(query.begin(), query.begin() + most, other.begin()));
  }
}

TEST_CASE("a partial block is found, and replaced by no other that begins alike") {
  PrefixCache cache(8, 4);
  const int32_t root = cache.open_root({});
  CHECK(insert(cache, root, {1, 2}, 0) == 0);
  CHECK(cache.num_tokens(0) == 2);
  CHECK_FALSE(cache.has_children(0));
  CHECK(insert(cache, root, {1, 2}, 1) == 0);
  CHECK(insert(cache, root, {1, 2, 3, 4}, 1) == 1);  // holds more
  CHECK(insert(cache, root, {1, 2, 3}, 2) == 1);     // nothing new
  CHECK(insert(cache, root, {1, 2, 4}, 3) == 3);
  const auto found = longest(cache, root, {1, 2, 4, 4});
  CHECK(found.block == 3);
  CHECK(found.num_tokens == 3);
  CHECK(longest(cache, root, {1, 2, 3, 4}).block == 1);
  cache.validate();
  for (int32_t block : {0, 3, 1}) cache.erase(block);
  CHECK(cache.size() == 0);
  cache.validate();
}

TEST_CASE("equally good children: the one before the tokens in their order") {
  PrefixCache cache(8, 2);
  const int32_t root = cache.open_root({});
  for (int32_t i = 0; i < 6; ++i) insert(cache, root, {1, 10 * i}, i);
  CHECK(longest(cache, root, {1, 25}).block == 2);
  CHECK(longest(cache, root, {1, -5}).block == 0);
  CHECK(longest(cache, root, {1}).block == 0);  // the first of those that go on
  CHECK(longest(cache, root, {2, 10}).block == PrefixCache::kNone);
}

TEST_CASE("memory: at most 64 bytes a block of 16 tokens, lists and references included") {
  const PrefixCache cache(1000, 16);
  const quire::BlockAllocator pool(1000, 16);
  CHECK(cache.num_bytes() + pool.num_bytes() <= 64 * 1000 + 128 * 8);
}

TEST_CASE("a parent can't go before its children") {
  PrefixCache cache(4, 1);
  const int32_t root = cache.open_root({});
  const int32_t token = 1;
  insert(cache, root, {token}, 0);
  insert(cache, 0, {token}, 1);
  CHECK_THROWS_AS(cache.erase(0), quire::InvariantError);
  cache.erase(1);
  cache.erase(0);
  CHECK_THROWS_AS(cache.erase(0), quire::InvariantError);
  CHECK(cache.size() == 0);
  cache.validate();
}

TEST_CASE("a reused block brings nothing of its former life") {
  PrefixCache cache(4, 1);
  const int32_t root = cache.open_root({});
  const int32_t a = 1, b = 2;
  insert(cache, root, {a}, 0);
  insert(cache, 0, {b}, 1);
  cache.erase(1);
  cache.erase(0);
  insert(cache, root, {b}, 0);
  CHECK(find(cache, 0, {b}) == PrefixCache::kNone);
  CHECK(find(cache, root, {a}) == PrefixCache::kNone);
  CHECK(find(cache, root, {b}) == 0);
}

TEST_CASE("salts are separate trees that live as long as somebody needs them") {
  PrefixCache cache(4, 1);
  const int32_t token = 1;
  const int32_t plain = cache.open_root({});
  const int32_t red = cache.open_root("red");
  const int32_t empty = cache.open_root("");  // a salt like any other
  CHECK(plain != red);
  CHECK(plain != empty);
  CHECK(cache.open_root("red") == red);
  insert(cache, red, {token}, 0);
  CHECK(find(cache, plain, {token}) == PrefixCache::kNone);
  CHECK(find(cache, empty, {token}) == PrefixCache::kNone);
  cache.close_root(red);
  cache.close_root(red);
  CHECK(cache.find_root("red") == red);  // something is cached there
  cache.erase(0);
  CHECK(cache.find_root("red") == PrefixCache::kNone);
  cache.close_root(empty);
  CHECK(cache.find_root("") == PrefixCache::kNone);
  CHECK(cache.find_root({}) == plain);
  cache.validate();
}
