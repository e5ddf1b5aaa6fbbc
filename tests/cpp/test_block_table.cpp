// SPDX-License-Identifier: Apache-2.0
// Block tables, and the rows of a batch that remember them.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "quire/block_table.h"
#include "quire/step_batch.h"

using quire::BlockTable;
using quire::StepBatch;
using Ids = std::vector<int32_t>;

namespace {

BlockTable table_of(const Ids& ids, int32_t block_size = 4) {
  BlockTable table(block_size);
  table.append(ids);
  return table;
}

Ids changes_of(const StepBatch& batch) { return {batch.changes().begin(), batch.changes().end()}; }

Ids row_of(const StepBatch& batch, int32_t row, int32_t size) {
  const int32_t* first = &batch.block_table()[row * batch.block_table_stride()];
  return {first, first + size};
}

}  // namespace

TEST_CASE("a token's slot") {
  const BlockTable table = table_of({7, 3});
  CHECK(table.slot(0) == 28);
  CHECK(table.slot(3) == 31);
  CHECK(table.slot(4) == 12);
  CHECK(table_of({2'000'000'000}, 16).slot(1) == 32'000'000'001);  // beyond 2^31
}

TEST_CASE("blocks that tokens take") {
  const BlockTable table(4);
  CHECK(table.blocks_for(0) == 0);
  CHECK(table.blocks_for(1) == 1);
  CHECK(table.blocks_for(4) == 1);
  CHECK(table.blocks_for(5) == 2);
}

TEST_CASE("append, replace, truncate") {
  BlockTable table = table_of({7, 3, 9});
  table.append(5);
  table.replace(0, 8);
  CHECK(table.ids() == Ids{8, 3, 9, 5});
  table.truncate(1);
  CHECK(table.ids() == Ids{8});
}

TEST_CASE("tables that share their first ids") {
  const Ids shared{7, 3};
  BlockTable table = table_of({7, 3, 9}), child(4);
  table.share(shared);
  child.share(shared);
  CHECK(table.num_shared() == 2);
  CHECK(table.ids() == Ids{7, 3, 9});
  child.append(5);
  CHECK(child.size() == 3);
  CHECK(child[1] == 3);
  CHECK(child.slot(9) == 21);
  Ids row(3, -1);
  CHECK(child.write_row(row.data(), 0, false, 3) == 0);
  CHECK(row == Ids{7, 3, 5});
  child.replace(2, 6);
  CHECK(child.write_row(row.data(), 0, true, 3) == 2);
  CHECK(row == Ids{7, 3, 6});
  child.truncate(2);
  CHECK(child.ids() == shared);
  table.unshare();
  table.replace(0, 1);
  CHECK(table.ids() == Ids{1, 3, 9});
  CHECK(shared == Ids{7, 3});
}

TEST_CASE("a row is rewritten only where its table has changed") {
  BlockTable table = table_of({7, 3, 9});
  Ids row(4, -1);
  table.write_row(row.data(), 0, false, 3);
  CHECK(row == Ids{7, 3, 9, -1});
  std::fill(row.begin(), row.end(), -1);
  table.append(5);
  table.write_row(row.data(), 0, true, 4);
  CHECK(row == Ids{-1, -1, -1, 5});
  table.replace(1, 6);
  table.write_row(row.data(), 0, true, 4);
  CHECK(row == Ids{-1, 6, 9, 5});
  table.write_row(row.data(), 0, false, 4);  // somebody else was here
  CHECK(row == Ids{7, 6, 9, 5});
}

TEST_CASE("a batch of two sequences that change rows") {
  StepBatch batch;
  BlockTable a = table_of({1, 2}), b = table_of({5, 6, 7});
  batch.begin(1, {2, 3, 3, 0, 5});
  batch.add_row(11, a, 5, 7, 7);
  batch.add_row(22, b, 8, 9, 9);
  const auto stride = static_cast<int32_t>(batch.block_table_stride());
  CHECK(changes_of(batch) == Ids{0, 1, 1, 2, stride, 5, stride + 1, 6, stride + 2, 7});
  CHECK(row_of(batch, 0, 2) == Ids{1, 2});
  CHECK(row_of(batch, 1, 3) == Ids{5, 6, 7});
  CHECK(Ids(batch.seq_lens().begin(), batch.seq_lens().end()) == Ids{7, 9});
  CHECK(Ids(batch.cu_seqlens_q().begin(), batch.cu_seqlens_q().end()) == Ids{0, 2, 3});
  CHECK(Ids(batch.positions().begin(), batch.positions().end()) == Ids{5, 6, 8});
  CHECK(batch.slot_mapping()[0] == 9);
  CHECK(batch.slot_mapping()[2] == 28);

  batch.begin(2, {2, 3, 2, 0, 5});
  batch.add_row(22, b, 9, 10, 10);
  batch.add_row(11, a, 7, 8, 8);
  CHECK(row_of(batch, 0, 3) == Ids{5, 6, 7});
  CHECK(row_of(batch, 1, 2) == Ids{1, 2});

  a.replace(0, 4);
  batch.begin(3, {2, 3, 2, 0, 5});
  batch.add_row(11, a, 7, 8, 8);  // row 0 held it once, before it changed
  batch.add_row(22, b, 9, 10, 10);
  CHECK(row_of(batch, 0, 2) == Ids{4, 2});
  CHECK(row_of(batch, 1, 3) == Ids{5, 6, 7});

  batch.advance(4);  // a to position 8, b to position 10
  batch.begin_block(0, 2, 3, 12);
  CHECK(Ids(batch.seq_lens().begin(), batch.seq_lens().end()) == Ids{9, 11});
  CHECK(Ids(batch.positions().begin(), batch.positions().end()) == Ids{8, 10});
  CHECK(batch.slot_mapping()[0] == 12);
  CHECK(batch.slot_mapping()[1] == 30);
  CHECK(changes_of(batch) == Ids{2, 3});
  CHECK(row_of(batch, 0, 3) == Ids{4, 2, 3});
}

TEST_CASE("a row of which less is in use when it moves tells of the rest later") {
  StepBatch batch;
  BlockTable a = table_of({9}), b = table_of({5, 6, 7});
  batch.begin(1, {2, 3, 2, 0, 4});
  batch.add_row(11, a, 0, 1, 1);
  batch.add_row(22, b, 8, 9, 9);
  batch.begin(2, {1, 1, 1, 0, 1});
  batch.add_row(22, b, 3, 4, 4);
  CHECK(changes_of(batch) == Ids{0, 5});
  batch.begin(3, {1, 3, 1, 0, 3});
  batch.add_row(22, b, 8, 9, 9);
  CHECK(changes_of(batch) == Ids{1, 6, 2, 7});
  CHECK(row_of(batch, 0, 3) == Ids{5, 6, 7});
}

TEST_CASE("growing keeps the memory that others look at, and every row right") {
  StepBatch batch;
  BlockTable a = table_of({1, 2});
  batch.begin(1, {1, 2, 1, 1, 2});
  batch.add_copy(3, 4);
  batch.add_row(11, a, 4, 5, 5);
  const auto view = batch.block_table().owner();
  for (int32_t i = 0; i < 100; ++i) a.append(10 + i);
  batch.begin(2, {1, 102, 400, 0, 102});
  CHECK(batch.copies().size() == 0);
  batch.add_row(11, a, 5, 405, 405);
  CHECK(batch.changes().size() == 2 * 102);
  CHECK_FALSE(batch.may_hold({1 << 20, 1 << 12, 0, 0}));
  CHECK(view[0] == 1);
  CHECK(row_of(batch, 0, 102) == a.ids());
}
