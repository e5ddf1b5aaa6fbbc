// SPDX-License-Identifier: Apache-2.0
// Blocks of several holders, through the toy engine: forks and copies on write, rollback, and what
// steps in flight still read.
#include <doctest/doctest.h>

#include <vector>

#include "kv_engine.h"
#include "quire/error.h"

using namespace kv_engine;
using quire::InvalidArgument;

TEST_CASE("used tokens: of all holders of a block the one that has computed most counts") {
  Engine engine(8, 4);
  const SequenceId parent = engine.start(range(0, 7));
  const SequenceId child = engine.manager.fork(parent);
  CHECK(engine.manager.stats().used_tokens == 7);
  engine.manager.truncate(child, 5);
  CHECK(engine.manager.stats().used_tokens == 7);
  engine.free(parent);
  CHECK(engine.manager.stats().used_tokens == 5);
  CHECK(engine.manager.stats().waste_tokens == 3);
}

TEST_CASE("fork at every offset, then both sides write") {
  for (bool prefix_caching : {true, false})
    for (bool child_first : {true, false})
      for (int32_t length = 1; length <= 13; ++length) {
        Engine engine(16, 4, prefix_caching);
        const SequenceId parent = engine.start(range(0, length));
        const int32_t used = engine.manager.allocator().num_used();
        const SequenceId child = engine.manager.fork(parent);
        engine.check(child);
        CHECK(engine.manager.allocator().num_used() == used);
        CHECK(engine.manager.num_cached_tokens(child) == length);
        const SequenceId order[] = {child_first ? child : parent, child_first ? parent : child};
        int32_t num_copies = 0;
        for (SequenceId seq : order) {
          engine.manager.commit({&seq, 1},
                                Ids{int32_t(100 + (seq.value >> SequenceId::kIndexBits)), 101, 102},
                                Ids{3});
          engine.run(seq);
          num_copies += static_cast<int32_t>(engine.manager.batch().copies().size()) / 2;
          engine.check(parent);
          engine.check(child);
        }
        CHECK(num_copies == (length % 4 == 0 ? 0 : 1));
        engine.free(parent);
        engine.check(child);
        engine.free(child);
        CHECK(engine.manager.allocator().num_used() == 0);
      }
}

TEST_CASE("two holders of a partial block in one batch: one copies, the other stays") {
  Engine engine(3, 4);
  const SequenceId parent = engine.start(range(0, 6));
  const SequenceId child = engine.manager.fork(parent);
  engine.manager.commit(std::vector{parent, child}, Ids{7, 8});
  REQUIRE(engine.step({parent, child}, {1, 1}));  // the pool has one block left
  CHECK(engine.manager.batch().copies().size() == 2);
  engine.commit({parent, child});
  engine.check(parent);
}

TEST_CASE("a failed step takes back the references it gave up for copies") {
  Engine engine(2, 4);
  const SequenceId parent = engine.start(range(0, 6));
  const SequenceId child = engine.manager.fork(parent);
  engine.manager.commit(std::vector{parent, child}, Ids{7, 8});
  CHECK_FALSE(engine.step({parent, child}, {1, 1}));
  CHECK(engine.manager.allocator().refcount(engine.blocks(parent)[1]) == 2);
}

TEST_CASE("rollback by any length, also into shared and cached blocks") {
  for (bool prefix_caching : {true, false})
    for (bool forked : {true, false})
      for (int32_t keep = 1; keep <= 14; ++keep) {
        Engine engine(16, 4, prefix_caching);
        const SequenceId seq = engine.start(range(0, 14));
        const SequenceId other = forked ? engine.manager.fork(seq) : seq;
        engine.manager.truncate(seq, keep);
        engine.check(seq);
        CHECK(engine.manager.num_computed_tokens(seq) == keep);
        CHECK(engine.blocks(seq).size() == size_t(keep + 3) / 4);
        engine.manager.commit({&seq, 1}, Ids{500, 501, 502, 503, 504}, Ids{5});
        engine.run(seq);
        engine.check(other);
        CHECK(engine.manager.num_tokens(seq) == keep + 5);
      }
}

TEST_CASE("speculative tokens: step all, truncate the rejected, commit the rest") {
  Engine engine(8, 4);
  const SequenceId seq = engine.start(range(0, 6));
  engine.manager.commit({&seq, 1}, Ids{6, 70, 80, 90}, Ids{4});  // one token and three drafts
  REQUIRE(engine.step({seq}, {4}));
  engine.manager.truncate(seq, 8);  // the first draft was right
  engine.commit({seq}, {81});
  CHECK(engine.manager.num_computed_tokens(seq) == 8);
  CHECK(engine.manager.num_tokens(seq) == 9);
  CHECK(engine.blocks(seq).size() == 2);
  CHECK(engine.manager.match(Ids{0, 1, 2, 3, 4, 5, 6, 70, 9}).num_tokens == 8);
}

TEST_CASE("steps in flight keep their blocks until they are retired") {
  Engine engine(4, 4, false, 2);
  const SequenceId a = engine.start(range(0, 8));
  CHECK_THROWS_AS(engine.manager.retire(2), InvalidArgument);
  engine.free(a);
  CHECK(engine.manager.allocator().num_free() == 2);
  CHECK(engine.manager.stats().deferred_refs == 2);
  const SequenceId b = engine.manager.create(range(0, 12));
  CHECK_FALSE(engine.step({b}, {12}));
  REQUIRE(engine.step({b}, {8}));
  CHECK_THROWS_AS(engine.step({b}, {8}), InvalidArgument);  // two steps run already
  engine.manager.retire(1);
  CHECK(engine.manager.allocator().num_free() == 2);
  CHECK_THROWS_AS(engine.manager.retire(1), InvalidArgument);
  CHECK(engine.step({b}, {12}));
  engine.manager.retire(3);
  engine.free(b);  // nothing runs: at once
  CHECK(engine.manager.allocator().num_free() == 4);
}

TEST_CASE("a block copied from rejoins the pool with the step that copies it") {
  Engine engine(4, 4, false, 1);
  const SequenceId parent = engine.start(range(0, 6));
  engine.manager.retire(1);
  const SequenceId child = engine.manager.fork(parent);
  engine.manager.commit(std::vector{parent, child}, Ids{6, 7});
  REQUIRE(engine.step({parent, child}, {1, 1}));
  CHECK(engine.manager.batch().copies().size() == 4);  // both leave the block that is being read
  CHECK(engine.manager.allocator().refcount(1) == 2);
  engine.commit({parent, child});
  engine.manager.retire(2);
  CHECK(engine.manager.allocator().refcount(1) == 0);
  CHECK(engine.manager.allocator().num_free() == 1);
}
