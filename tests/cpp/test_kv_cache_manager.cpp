// SPDX-License-Identifier: Apache-2.0
// The manager, driven through a toy engine: prefix caching, batches and chunks, isolation, leaks,
// wrong arguments.
#include <doctest/doctest.h>

#include <vector>

#include "kv_engine.h"
#include "quire/error.h"

using namespace kv_engine;
using quire::InvalidArgument;

TEST_CASE("prefix caching: share, free, revive, evict in order") {
  Engine engine(10, 16);
  const Ids common = range(0, 48);
  Ids first = common, second = common;
  first.resize(55, 3);
  second.resize(55, 4);

  const SequenceId a = engine.start(first);
  CHECK(engine.blocks(a) == Ids{0, 1, 2, 3});
  CHECK(engine.manager.num_cached_tokens(a) == 0);

  const SequenceId b = engine.start(second);
  CHECK(engine.blocks(b) == Ids{0, 1, 2, 4});
  CHECK(engine.manager.num_cached_tokens(b) == 48);
  CHECK(engine.manager.allocator().refcount(1) == 2);
  CHECK(engine.manager.stats().used_tokens == 48 + 7 + 7);

  engine.free(a);
  engine.free(b);
  CHECK(engine.manager.allocator().num_cached() == 5);  // the partial ones too

  // The cached prefix is revived, all but its last token; the partial block is copied.
  const SequenceId c = engine.manager.create(second);
  CHECK(engine.manager.num_cached_tokens(c) == 54);
  CHECK(engine.blocks(c) == Ids{0, 1, 2, 4});
  engine.run(c);
  CHECK(engine.blocks(c) == Ids{0, 1, 2, 5});
  engine.free(c);  // nothing new in block 5: it is free

  // A miss that needs everything: free blocks first, then the cached ones, tail first.
  const SequenceId d = engine.start(range(1000, 160));
  CHECK(engine.blocks(d) == Ids{5, 6, 7, 8, 9, 3, 4, 2, 1, 0});
  CHECK(engine.manager.stats().evicted_blocks == 5);
  CHECK(engine.manager.match(second).num_tokens == 0);
}

TEST_CASE("decode fills a block, which then can be shared") {
  Engine engine(8, 4);
  const SequenceId seq = engine.manager.create(range(0, 3));
  engine.run(seq, {3});
  CHECK(engine.manager.match(range(0, 5)).num_tokens == 0);
  engine.run(seq, {4});
  CHECK(engine.manager.match(range(0, 5)).num_tokens == 4);
  CHECK(engine.blocks(seq).size() == 1);  // a new block only when it is needed
}

TEST_CASE("a prompt that is cached whole leaves its last token to compute") {
  Engine engine(8, 4);
  engine.free(engine.start(range(0, 8)));
  CHECK(engine.manager.match(range(0, 8)).num_tokens == 7);
  CHECK(engine.manager.match(range(0, 8)).num_idle_blocks == 1);  // of whole ones
  CHECK(engine.manager.match(range(0, 9)).num_tokens == 8);
  const SequenceId seq = engine.start(range(0, 8));
  CHECK(engine.manager.num_cached_tokens(seq) == 7);
  CHECK(engine.manager.batch().copies().size() == 2);
  CHECK(engine.manager.stats().prefix_query_tokens == 16);
  CHECK(engine.manager.stats().prefix_hit_tokens == 7);
}

TEST_CASE("a prompt that diverges inside a cached block copies what is equal") {
  for (int32_t depth : {0, 2})
    for (int32_t equal = 1; equal <= 12; ++equal) {
      Engine engine(12, 4, true, depth);
      const SequenceId first = engine.start(range(0, 12));
      Ids prompt = range(0, equal);
      prompt.resize(14, 999);
      CHECK(engine.manager.match(prompt).num_tokens == equal);
      const SequenceId second = engine.manager.create(prompt);
      CHECK(engine.manager.num_cached_tokens(second) == equal);
      CHECK(engine.blocks(second).size() == size_t(equal + 3) / 4);
      engine.run(second);
      CHECK(engine.manager.batch().copies().size() == (equal % 4 == 0 ? 0 : 2));
      engine.check(first);
      if (depth > 0) engine.manager.retire(2);
      engine.free(first);
      engine.check(second);
      engine.free(second);
      CHECK(engine.manager.allocator().num_used() == 0);
    }
}

TEST_CASE("the source of a copy can't be evicted before the copy") {
  Engine engine(4, 4);
  engine.free(engine.start(range(0, 4)));
  const SequenceId second = engine.manager.create(Ids{0, 1, 2, 77, 78});
  const SequenceId third = engine.manager.create(range(100, 16));
  CHECK_FALSE(engine.step({third}, {16}));
  CHECK(engine.step({third}, {4}));
  CHECK(engine.manager.stats().evicted_blocks == 0);
  engine.commit({third});
  engine.run(second);
  CHECK(engine.manager.match(range(0, 5)).num_tokens == 4);  // released, and still cached
}

TEST_CASE("when blocks run out, a cached block is written in place instead of copied") {
  Engine engine(3, 4);
  engine.free(engine.start(range(0, 8)));
  Ids prompt = range(0, 6);
  prompt.resize(12, 50);
  const SequenceId seq = engine.start(prompt);  // needs all three blocks
  CHECK(engine.manager.num_cached_tokens(seq) == 6);
  CHECK(engine.manager.batch().copies().size() == 0);
  CHECK(engine.manager.stats().evicted_blocks == 1);
  CHECK(engine.manager.match(range(0, 8)).num_tokens == 6);
  engine.free(seq);
}

TEST_CASE("a conversation goes on where it ended, in the middle of a block") {
  Engine engine(8, 4);
  Ids text = range(0, 6);
  for (int32_t turn = 0; turn < 4; ++turn) {
    const SequenceId seq = engine.start(text);
    CHECK(engine.manager.num_cached_tokens(seq) == (turn == 0 ? 0 : int64_t(text.size()) - 3));
    engine.free(seq);
    for (int32_t i = 0; i < 3; ++i) text.push_back(100 * turn + i);
  }
}

TEST_CASE("hits are not evicted by the step of their own sequence; failure changes nothing") {
  Engine engine(4, 4);
  engine.free(engine.start(range(0, 8)));
  engine.free(engine.start(range(100, 8)));
  const SequenceId seq = engine.manager.create(range(0, 20));  // two hits, three more to go
  CHECK(engine.manager.num_cached_tokens(seq) == 8);
  CHECK_FALSE(engine.step({seq}, {12}));
  CHECK(engine.manager.match(range(100, 9)).num_tokens == 8);
  CHECK(engine.blocks(seq).size() == 2);
  CHECK(engine.step({seq}, {8}));
}

TEST_CASE("a batch gets all of its blocks or none") {
  Engine engine(3, 4);
  const SequenceId a = engine.manager.create(range(0, 8));
  const SequenceId b = engine.manager.create(range(50, 8));
  CHECK_FALSE(engine.step({a, b}, {8, 8}));
  CHECK(engine.manager.allocator().num_free() == 3);
  CHECK(engine.step({a, b}, {8, 4}));
}

TEST_CASE("the same prompt computed twice at once ends up in the same blocks") {
  Engine engine(8, 4);
  const SequenceId a = engine.manager.create(range(0, 10));
  const SequenceId b = engine.manager.create(range(0, 10));
  REQUIRE(engine.step({a, b}, {10, 10}));
  CHECK(engine.manager.allocator().num_used() == 6);
  engine.commit({a, b});
  CHECK(engine.blocks(b)[0] == engine.blocks(a)[0]);
  CHECK(engine.blocks(b)[1] == engine.blocks(a)[1]);
  CHECK(engine.manager.allocator().num_used() == 4);
  // The next step shows the swapped blocks in the rows that are kept.
  engine.manager.commit(std::vector{a, b}, Ids{77, 88});
  REQUIRE(engine.step({a, b}, {1, 1}));
  const StepBatch& batch = engine.manager.batch();
  CHECK(batch.block_table()[0] == batch.block_table()[batch.block_table_stride()]);
}

TEST_CASE("without prefix caching nothing ever hits") {
  Engine engine(8, 4, false);
  engine.free(engine.start(range(0, 8)));
  CHECK(engine.manager.match(range(0, 9)).num_tokens == 0);
  CHECK(engine.manager.allocator().num_free() == 8);
  engine.start(range(0, 8));
}

TEST_CASE("salts never share") {
  Engine engine(16, 4);
  const SequenceId a = engine.start(range(0, 9), "a");
  CHECK(engine.manager.match(range(0, 9), "a").num_tokens == 8);
  for (quire::Salt salt : {quire::Salt{}, quire::Salt{"b"}, quire::Salt{""}})
    CHECK(engine.manager.match(range(0, 9), salt).num_tokens == 0);
  const SequenceId b = engine.start(range(0, 9), "b");
  CHECK(engine.blocks(a)[0] != engine.blocks(b)[0]);
  engine.free(a);
  CHECK(engine.manager.match(range(0, 9), "a").num_tokens == 8);  // outlives its sequence
}

TEST_CASE("a second step without commit plans the same tokens again") {
  Engine engine(8, 4);
  const SequenceId seq = engine.manager.create(range(0, 10));
  REQUIRE(engine.step({seq}, {10}));
  const Ids blocks = engine.blocks(seq);
  REQUIRE(engine.step({seq}, {6}));
  CHECK(engine.manager.batch().positions()[0] == 0);
  CHECK(engine.blocks(seq) == blocks);
  engine.commit({seq});
  CHECK(engine.manager.num_computed_tokens(seq) == 6);
}

TEST_CASE("empty batches, zero counts, chunks") {
  Engine engine(8, 4);
  CHECK(engine.step({}, {}));
  CHECK(engine.manager.batch().cu_seqlens_q()[0] == 0);
  const SequenceId seq = engine.manager.create(range(0, 10));
  CHECK(engine.step({seq}, {0}));
  CHECK(engine.manager.batch().seq_lens()[0] == 0);
  for (int32_t count : {3, 3, 4}) {
    REQUIRE(engine.step({seq}, {count}));
    engine.commit({seq});
  }
  CHECK(engine.manager.num_computed_tokens(seq) == 10);
}

TEST_CASE("wrong arguments are refused by name and change nothing") {
  Engine engine(8, 4), stranger(8, 4);
  KVCacheManager& manager = engine.manager;
  const SequenceId seq = manager.create(range(0, 6));
  const SequenceId other = stranger.manager.create(range(0, 6));
  const SequenceId gone = manager.create(range(0, 6));
  engine.free(gone);
  const std::string not_live =
      ": expected a live sequence of this manager, got one that was freed or belongs to another";
  const auto step = [&](std::vector<SequenceId> seqs, Ids counts) { manager.step(seqs, counts); };
  CHECK_THROWS_WITH_AS(step({seq, gone}, {1, 1}), ("step: seqs[1]" + not_live).c_str(),
                       InvalidArgument);
  CHECK_THROWS_AS(step({other}, {1}), InvalidArgument);
  CHECK_THROWS_AS(step({SequenceId{}}, {1}), InvalidArgument);
  CHECK_THROWS_WITH_AS(step({seq, seq}, {1, 1}),
                       "step: seqs[1]: expected each sequence once, got one twice",
                       InvalidArgument);
  CHECK_THROWS_WITH_AS(step({seq}, {-1}),
                       "step: num_new_tokens[0]: expected 0 to 6 (known and not computed), got -1",
                       InvalidArgument);
  CHECK_THROWS_AS(step({seq}, {7}), InvalidArgument);
  CHECK_THROWS_AS(step({seq}, {}), InvalidArgument);
  CHECK_THROWS_AS(manager.free(std::vector{gone}), InvalidArgument);
  CHECK_THROWS_AS(manager.free(std::vector{seq, seq}), InvalidArgument);
  CHECK_THROWS_AS(manager.fork(gone), InvalidArgument);
  CHECK_THROWS_AS(manager.truncate(seq, 0), InvalidArgument);
  CHECK_THROWS_AS(manager.truncate(seq, 7), InvalidArgument);
  CHECK_THROWS_AS(manager.create({}), InvalidArgument);
  CHECK_THROWS_AS(manager.retire(1), InvalidArgument);
  REQUIRE(engine.step({seq}, {3}));
  CHECK_THROWS_WITH_AS(manager.commit(std::vector{seq}, Ids{1}),
                       "commit: sampled: expected no token for seqs[0], whose step left 3 known "
                       "tokens to compute",
                       InvalidArgument);
  CHECK_THROWS_AS(manager.commit(std::vector{seq}, Ids{1, 2}), InvalidArgument);
  CHECK_THROWS_AS(manager.commit(std::vector{seq}, Ids{}, Ids{-1}), InvalidArgument);
  CHECK(manager.num_computed_tokens(seq) == 0);
  engine.commit({seq});
  CHECK(manager.num_computed_tokens(seq) == 3);
}

TEST_CASE("one block may hold a whole sequence") {
  Engine engine(2, 100'000);
  const SequenceId a = engine.start(range(0, 10));
  const SequenceId b = engine.start(range(0, 20));
  CHECK(engine.manager.stats().waste_tokens == 200'000 - 30);
  CHECK_FALSE(engine.step({engine.manager.create(range(0, 5))}, {5}));
  engine.free(a);
  engine.free(b);
  CHECK(engine.manager.allocator().num_used() == 0);
}
