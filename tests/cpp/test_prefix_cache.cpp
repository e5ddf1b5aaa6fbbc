// SPDX-License-Identifier: Apache-2.0
// The tree of cached blocks: exact match, namespaces, leaves before parents.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <vector>

#include "quire/error.h"
#include "quire/prefix_cache.h"

using quire::PrefixCache;
using Tokens = std::vector<int32_t>;

TEST_CASE("a block is found by its parent and its tokens") {
  PrefixCache cache(8, 2);
  const int32_t root = cache.open_root({});
  const Tokens ab{1, 2}, cd{3, 4};
  CHECK(cache.find(root, ab.data()) == PrefixCache::kNone);
  CHECK(cache.insert(root, ab.data(), 5) == 5);
  CHECK(cache.insert(5, cd.data(), 6) == 6);
  CHECK(cache.find(root, ab.data()) == 5);
  CHECK(cache.find(5, cd.data()) == 6);
  CHECK(cache.find(root, cd.data()) == PrefixCache::kNone);  // same tokens, other prefix
  CHECK(cache.parent(6) == 5);
  CHECK(cache.size() == 2);
  cache.validate();
}

TEST_CASE("the same contents are cached once") {
  PrefixCache cache(8, 2);
  const int32_t root = cache.open_root({});
  const Tokens ab{1, 2};
  CHECK(cache.insert(root, ab.data(), 3) == 3);
  CHECK(cache.insert(root, ab.data(), 4) == 3);
  CHECK_FALSE(cache.contains(4));
  CHECK(cache.size() == 1);
}

TEST_CASE("every one of many siblings is found, in one bucket or in many") {
  const int32_t count = 1000;
  PrefixCache cache(count, 1);
  const int32_t root = cache.open_root({});
  for (int32_t i = 0; i < count; ++i) CHECK(cache.insert(root, &i, i) == i);
  for (int32_t i = 0; i < count; ++i) CHECK(cache.find(root, &i) == i);
  cache.validate();
  for (int32_t i = 0; i < count; i += 2) cache.erase(i);
  for (int32_t i = 0; i < count; ++i)
    CHECK(cache.find(root, &i) == (i % 2 == 0 ? PrefixCache::kNone : i));
  cache.validate();
}

TEST_CASE("negative and extreme tokens are as good as any") {
  PrefixCache cache(4, 2);
  const int32_t root = cache.open_root({});
  const Tokens low{-1, INT32_MIN}, high{-1, INT32_MAX};
  cache.insert(root, low.data(), 0);
  CHECK(cache.find(root, high.data()) == PrefixCache::kNone);
  CHECK(cache.find(root, low.data()) == 0);
}

TEST_CASE("a parent can't go before its children") {
  PrefixCache cache(4, 1);
  const int32_t root = cache.open_root({});
  const int32_t token = 1;
  cache.insert(root, &token, 0);
  cache.insert(0, &token, 1);
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
  cache.insert(root, &a, 0);
  cache.insert(0, &b, 1);
  cache.erase(1);
  cache.erase(0);
  cache.insert(root, &b, 0);
  CHECK(cache.find(0, &b) == PrefixCache::kNone);
  CHECK(cache.find(root, &a) == PrefixCache::kNone);
  CHECK(cache.find(root, &b) == 0);
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
  cache.insert(red, &token, 0);
  CHECK(cache.find(plain, &token) == PrefixCache::kNone);
  CHECK(cache.find(empty, &token) == PrefixCache::kNone);
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
