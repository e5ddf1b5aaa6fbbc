# SPDX-License-Identifier: Apache-2.0
"""Bugs that mutations.py plants in the prefill of e4m3 queries."""

from __future__ import annotations

from mutation import Mutation

FILE = "cuda/kernels/sm90/prefill_e4m3.h"
PREFILL, PRODUCER, SOFTMAX = (
    f"cuda/kernels/{x}.h" for x in "sm90/prefill sm90/producer softmax".split()
)

MUTATIONS = [
    Mutation("sm90_e4m3: values are turned before they have landed", FILE,
     "    mbarrier_wait(ring.template barrier<Side::kValues, Handover::kLanded>(), ring.parity);\n",
     ""),
    Mutation("sm90_e4m3: turned values are not fenced for products", FILE,
     "    fence_proxy_async();\n    sync_warp();\n", "    sync_warp();\n"),
    Mutation("sm90_e4m3: two blocks on the diagonal change places", FILE,
     "is_diagonal ? a : b, b, is_diagonal ? b : a);", "b, b, a);"),
    Mutation("sm90_e4m3: the values of the tile in hand are turned", FILE,
     "if (tile > tiles.begin) turn(this->ring.previous());",
     "if (tile > tiles.begin) turn(this->ring);"),
    Mutation("sm90_e4m3: the values of an item's last tile are not turned", FILE,
     "    if (tiles.begin < tiles.end) turn(this->ring.previous());\n", ""),
    Mutation("sm90_e4m3: scales of tokens are in use when they come", FILE,
     "static_cast<int>(ring.parity) * Traits::kStages + ring.stage", "ring.stage"),
    Mutation("sm90_e4m3: scales of tokens are told of by the first lane alone", FILE,
     "    load(Side::kValues, p.v_scale);\n    sync_warp();\n",
     "    load(Side::kValues, p.v_scale);\n"),
    Mutation("sm90_e4m3: a lane's scale is that of the next key", FILE,
     "locate(p, item, keys, key);", "locate(p, item, keys, key + 1);"),
    Mutation("sm90_e4m3: both parts of a tile have the scales of the first", FILE,
     "static_cast<uint32_t>(part % 2 * kKeys * 4), scales.exist", "0u, scales.exist"),
    Mutation("sm90_e4m3: keys are released after their first part", FILE,
     "if (part % 2 == 1) release_stage<Traits, Side::kKeys>(ring);",
     "if (part % 2 == 0) release_stage<Traits, Side::kKeys>(ring);"),
    Mutation("sm90_e4m3: the second part has the values of the first", FILE,
     "static_cast<uint32_t>(part % 2 * kKeys);", "0u;"),
    Mutation("sm90_e4m3: maxima stay where weights are not", FILE, " - kWeightShift;", ";"),
    Mutation("sm90_e4m3: sums keep an old maximum", FILE,
     "fma(state.sums[n][e], rescale.rows[e / 2], sums[n][e])", "state.sums[n][e] + sums[n][e]"),
    Mutation("sm90_e4m3: weights are in the order of keys", FILE,
     "pack_e4m3(a[h], a[h + 1], b[h], b[h + 1])", "pack_e4m3(a[h], b[h], a[h + 1], b[h + 1])"),
    Mutation("sm90_e4m3: queries are read before they have landed", FILE,
     "    cp_async_wait<0>();\n    sync_warp();\n", "    sync_warp();\n"),
    Mutation("sm90_e4m3: `total` is in the place of queries before all lanes have them", FILE,
     "    sync_warp();  // before `total` takes their place\n", ""),
    Mutation("sm90_e4m3_full: scores are scaled before the options, too", FILE,
     "Traits::kMode == Mode::kFast ? p.scale * kLog2E : 1.0f", "p.scale * kLog2E"),
    Mutation("sm90_e4m3_full: options see scores without the scale of keys", FILE,
     "return Traits::kMode == Mode::kFast && !args", "return !args"),
    Mutation("sm90_e4m3_full: scores are read before the products are done", FILE,
     "      wgmma_wait<0>();\n      if (part % 2 == 1) release_stage<Traits, Side::kKeys>(ring);\n"
     "      const Rescale rescale",
     "      if (part % 2 == 1) release_stage<Traits, Side::kKeys>(ring);\n"
     "      const Rescale rescale"),
    Mutation("sm90_e4m3_full: keys are released after their first part", FILE,
     "if (part % 2 == 1) release_stage<Traits, Side::kKeys>(ring);\n      const Rescale rescale",
     "if (part % 2 == 0) release_stage<Traits, Side::kKeys>(ring);\n      const Rescale rescale"),
    Mutation("sm90_e4m3_full: sums are read before the products are done", FILE,
     "      issue_values(sums, ring, part);\n      wgmma_wait<0>();",
     "      issue_values(sums, ring, part);"),
    Mutation("sm90_e4m3_full: values are released after their first part", FILE,
     "if (part % 2 == 0) continue;\n      release_stage<Traits, Side::kValues>(ring);",
     "if (part % 2 == 0) release_stage<Traits, Side::kValues>(ring);\n"
     "      if (part % 2 == 0) continue;"),
    Mutation("sm90_e4m3_full: a chunk is finished with the sums of the next", FILE,
     "      take(part, stats);\n      round(scores);\n      Sums sums;",
     "      round(scores);\n      Sums sums;\n      if (part < 0) take(part, stats);\n"
     "      struct Late { CodeConsumer& c; int part; RowStats (&stats)[2];"
     " ~Late() { c.take(part, stats); } } late{*this, part, stats};"),
    Mutation("sm90_e4m3_full: weights are those of the part before", FILE,
     "      round(scores);\n      Sums sums;\n      issue_values(sums, ring, part);",
     "      Sums sums;\n      issue_values(sums, ring, part);\n      round(scores);"),
    Mutation("sm90_e4m3_full: both parts of a tile have the positions of the first", FILE,
     "mask_stored_rows<Traits, kKeys>(p, part * kKeys, scores);",
     "mask_stored_rows<Traits, kKeys>(p, part / 2 * 2 * kKeys, scores);"),
    Mutation("sm90_e4m3_full: warps share what masks know of rows", PREFILL,
     "(warp * kTile + row) * 32", "row * 32"),
    Mutation("sm90_e4m3_full: a row is masked as the one eight before", PREFILL,
     "masked_row_slot<Traits>(row + 8))", "masked_row_slot<Traits>(row))"),
    Mutation("sm90_e4m3_full: rows are masked before their lanes have said how", PREFILL,
     "make_score_row(p, item, min(first_row + row, last_row)));\n  sync_warp();",
     "make_score_row(p, item, min(first_row + row, last_row)));"),
    Mutation("sm90_e4m3_full: a tree begins with the sequence", SOFTMAX,
     "U32x4{word(row.mask_begin),", "U32x4{word(0),"),
    Mutation("sm90_e4m3_full: keys beyond the square are not turned", FILE,
     "if constexpr (kBlocks == 4)", "if constexpr (kBlocks == 0)"),
    Mutation("sm90_e4m3_full: keys beyond the square change places", FILE,
     "turn_blocks(tile, 4 + warp, i, 4 + warp, i + 1)",
     "turn_blocks(tile, 4 + warp, i, 4 + (warp ^ 1), i + 1)"),
    Mutation("sm90_e4m3_full: boxes bring more than is announced", PRODUCER,
     "Traits::kWarpKeys * kBoxes<kSide> * 128", "Traits::kWarpKeys * kRowBytes<kSide>"),
]  # fmt: skip
