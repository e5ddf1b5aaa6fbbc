// SPDX-License-Identifier: Apache-2.0
// One work item of an attention launch as a thread block holds it.
#pragma once

#include "kernels/launch.h"
#include "kernels/traits.h"
#include "prim/math.h"
#include "prim/sm80.h"

namespace quire::device {

// The items of this launch. Their end is read again for each: no register holds it meanwhile.
QUIRE_DEVICE int first_item(const AttentionArgs& args) {
  return args.range ? ld_global(&args.range->begin) : 0;
}
QUIRE_DEVICE int end_of_items(const AttentionArgs& args) {
  return args.range ? ld_global(&args.range->end) : args.num_items;
}

// A work item. Its rows are query rows times the heads that share the kv head, heads fastest.
struct Item {
  Sequence sequence;
  int sequence_index;
  int kv_head;
  int q_begin;
  int kv_begin, kv_end;
  int partial;  // first slot or -1
  int merge;    // or -1
  int group;    // query heads a kv head
  int num_rows;

  QUIRE_DEVICE int query(int row) const { return q_begin + row / group; }
  QUIRE_DEVICE int head(int row) const { return kv_head * group + row % group; }
  // The key that query row `row` is aligned to.
  QUIRE_DEVICE int position(int row) const {
    return sequence.seq_len - sequence.q_len + query(row);
  }
  // Query row of the whole batch.
  QUIRE_DEVICE int64_t batch_row(int row) const { return int64_t{sequence.q_begin} + query(row); }
};

QUIRE_DEVICE Sequence load_sequence(const Sequence* s) {
  return {ld_global(&s->q_begin), ld_global(&s->q_len), ld_global(&s->seq_len),
          ld_global(&s->kv_row)};
}

QUIRE_DEVICE Item load_item(const AttentionArgs& args, int index) {
  const WorkItem* work = &args.items[index].work;
  Item item;
  item.sequence_index = ld_global(&work->sequence);
  item.sequence = load_sequence(&args.items[index].sequence);
  item.kv_head = ld_global(&work->kv_head);
  item.q_begin = ld_global(&work->q_begin);
  item.kv_begin = ld_global(&work->kv_begin);
  item.kv_end = ld_global(&work->kv_end);
  item.partial = ld_global(&work->partial);
  item.merge = ld_global(&work->merge);
  item.group = args.params.num_heads / args.params.num_kv_heads;
  item.num_rows = (ld_global(&work->q_end) - item.q_begin) * item.group;
  return item;
}

// Keys [begin, end) that a row sees through causality and window.
struct KeyRange {
  int begin, end;
};

QUIRE_DEVICE KeyRange visible_keys(const AttentionParams& p, const Item& item, int row) {
  const int position = item.position(row);
  const int after = item.sequence.seq_len - position;  // compared so that nothing overflows
  const bool left_open = p.window_left < 0 || p.window_left >= position;
  const bool right_open = p.window_right < 0 || p.window_right >= after;
  return {left_open ? 0 : position - p.window_left,
          right_open ? item.sequence.seq_len : position + p.window_right + 1};
}

// Keys of the item that one of its rows [first_row, last_row] may see: nothing else is read.
QUIRE_DEVICE KeyRange keys_to_read(const AttentionParams& p, const Item& item, int first_row,
                                   int last_row) {
  const int begin = max(item.kv_begin, visible_keys(p, item, first_row).begin);
  const int end = min(item.kv_end, visible_keys(p, item, last_row).end);
  return {begin, max(begin, end)};
}

}  // namespace quire::device
