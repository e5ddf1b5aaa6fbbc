# SPDX-License-Identifier: Apache-2.0
"""Bugs that mutations.py plants in the prefill of e4m3 queries."""

from __future__ import annotations

from mutation import Mutation

FILE = "cuda/kernels/sm90/prefill_e4m3.h"

MUTATIONS = [
    Mutation("sm90_e4m3: values are turned before they have landed", FILE,
     "    mbarrier_wait(ring.template barrier<Side::kValues, Handover::kLanded>(), ring.parity);\n",
     ""),
    Mutation("sm90_e4m3: turned values are not fenced for products", FILE,
     "    fence_proxy_async();\n    sync_warp();\n", "    sync_warp();\n"),
    Mutation("sm90_e4m3: two blocks on the diagonal change places", FILE,
     "codes[0], codes[1], a, is_diagonal ? a : b)", "codes[0], codes[1], a, b)"),
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
]  # fmt: skip
