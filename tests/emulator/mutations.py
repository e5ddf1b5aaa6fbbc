# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: each must be caught by the emulator's tests, for every seed.

    python tests/emulator/mutations.py [--only TEXT]

A mutation is a change of one place of the kernels' source. The kernel is built with it and run by
test_mutation*.cpp over a few cases, several seeds and all modes of asynchronous copies; it counts
as caught when every seed reports an error of the emulator or a wrong result in some case. The
unchanged source must pass every one. Takes about ten seconds a mutation, so it is not part of the
ordinary tests."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mutations_e4m3
import mutations_mla_sm90
import mutations_sm90
from mutation import Mutation

ROOT = Path(__file__).resolve().parents[2]


P, D, T, S, K, A = (f"cuda/kernels/{x}.h" for x in "prefill decode tile softmax keys args".split())
STATE, SCALES, TRAITS = (f"cuda/kernels/{x}.h" for x in "state scales traits".split())
L = "cuda/kernels/mla_decode.h"
PL = "cuda/kernels/plan.h"
# First words of descriptions; test_mutation.cpp is of all others.
PROGRAMS = {"sm90", "sm90_e4m3", "sm90_e4m3_full", "mla", "mla_sm90", "plan", "total"}

MUTATIONS = [
    Mutation("prefill: no barrier before a tile is read", P,
             "cp_async_wait<0>();\n      sync_block();", "cp_async_wait<0>();"),
    Mutation("prefill: a tile is read before it has landed", P,
             "cp_async_wait<0>();\n      sync_block();",
             "cp_async_wait<1>();\n      sync_block();"),
    Mutation("prefill: queries are read before they have landed", P,
             "cp_async_wait<1>();\n  sync_block();", "cp_async_wait<2>();\n  sync_block();"),
    Mutation("prefill: next tile goes to the stage in use", P,
             "load_keys(args, item, tiles, tile + 1);", "load_keys(args, item, tiles, tile + 2);"),
    Mutation("prefill: total takes the place of queries too early", P,
             "sync_block();  // before `total` may take the place of the queries", ""),
    Mutation("prefill: locations of a tile overwrite those in use", P,
             "tile % 2 * Traits::kKeys + row) * 8", "row) * 8"),
    Mutation("prefill: locations are not waited for", P,
             "  sync_block();\n  load_keys(args, item, tiles, tiles.begin);",
             "  load_keys(args, item, tiles, tiles.begin);"),
    Mutation("prefill: stats are read without a warp sync", P, "  sync_warp();\n", ""),
    Mutation("prefill: rows of the next block overwrite shared memory in use", P,
             "write_total<Traits>(args, same, state, first_row);\n  sync_block();",
             "write_total<Traits>(args, same, state, first_row);"),
    Mutation("prefill: 16 bytes of shared memory too few", TRAITS,
             "kKeys * 8;\n  static constexpr int kUnitOffset = kFlagOffset + 16",
             "kKeys * 8;\n  static constexpr int kUnitOffset = kFlagOffset"),
    Mutation("prefill: a chunk is not begun afresh", P,
             "state.chunk[h] = RowStats{};", ";"),
    Mutation("prefill: partial results one slot off", P,
             "const int slot = item.partial + chunk - item.kv_begin / kKvChunk;",
             "const int slot = item.partial + chunk - item.kv_begin / kKvChunk + 1;"),
    Mutation("decode: a tile is read before it has landed", D,
             "cp_async_wait<Traits::kStages - 2>();", "cp_async_wait<Traits::kStages - 1>();"),
    Mutation("decode: lanes do not wait for each other's copies", D,
             "cp_async_wait<Traits::kStages - 2>();\n    sync_warp();",
             "cp_async_wait<Traits::kStages - 2>();"),
    Mutation("decode: a warp reads the ring of another", D,
             "(warp * Traits::kStages + index)", "(index)"),
    Mutation("decode: a stage is read twice", D,
             "read_stage_ = (read_stage_ + 1) % Traits::kStages;", ""),
    Mutation("decode: warps' results are read before they are written", D,
             "give_columns<Traits>(state, round);\n    sync_block();",
             "give_columns<Traits>(state, round);"),
    Mutation("decode: the next round overwrites results in use", D,
             "    sync_block();\n  }\n}\n\n// --- The loop", "  }\n}\n\n// --- The loop"),
    Mutation("decode: a warp's share is that of another", D,
             "fma(given[i], shares[warp], values[i])", "fma(given[i], shares[0], values[i])"),
    Mutation("decode: a shuffle in a divergent branch", D,
             "if (next_ * Traits::kKeys < keys_.end) {",
             "if (next_ * Traits::kKeys + lane % 16 < keys_.end) {"),
    Mutation("decode: locations of the tile before", D,
             "    next_location_ = locate_own(next_);\n", ""),
    Mutation("decode: all stages begin with the keys of the first", D,
             "locate_own(next_ + i * Traits::kWarps)", "locate_own(next_)"),
    Mutation("swizzle forgotten by the writer", T, "((piece ^ swizzle) << 4)",
             "((piece ^ (kRowBytes > 1 ? 0 : swizzle)) << 4)"),
    Mutation("values are read untransposed", T, "ldmatrix<Transposed::kYes>(",
             "ldmatrix<Transposed::kNo>("),
    Mutation("keys of a fragment swapped", T, "query, low, high);", "query, high, low);"),
    Mutation("columns beyond the head dim are read", T,
             "kBytes * max(0, min(columns, kCount))", "kBytes * (columns > -99 ? kCount : 0)"),
    Mutation("decode: the exchange takes the place of queries too early", D,
             "if (Traits::kKeepQueries) sync_block();", ""),
    Mutation("e4m3: queries are read before they are prepared", D,
             "prepare_queries<Traits>(p, item, query_tile);\n    sync_block();",
             "prepare_queries<Traits>(p, item, query_tile);"),
    Mutation("e4m3: columns of queries in the order of 16-bit keys", SCALES,
             "piece[column] * to_one, piece[column + 2] * to_one",
             "piece[column] * to_one, piece[column + 1] * to_one"),
    Mutation("e4m3: scales of K where those of V are meant", SCALES,
             "2 * Traits::kKeyTileBytes + 4 * Traits::kKeys", "2 * Traits::kKeyTileBytes"),
    Mutation("e4m3: scales of keys that are not there are read", SCALES, "exists ? 4 : 0", "4"),
    Mutation("e4m3: a row has the unit of another", SCALES,
             "first_row + lane / 4 + 8 * h", "first_row + lane / 4"),
    Mutation("e4m3: sums in the order of 16-bit values", T,
             "8 * n + lane % 4 * 4 + 2 * odd", "8 * pair + lane % 4 * 2"),
    Mutation("causal mask off by one", A, "position + p.window_right + 1};",
             "position + p.window_right + 2};"),
    Mutation("window off by one", A, "position - p.window_left,", "position - p.window_left + 1,"),
    Mutation("block table entry off by one", K, "+ key / p.block_size;",
             "+ (key + 1) / p.block_size;"),
    Mutation("a 32-bit row where a block's is meant", K, "key % p.block_size}", "key % 16}"),
    Mutation("a row without keys divides by zero", STATE,
             "value = sees_a_key ? fma(value, factor, 0.0f) : 0.0f;",
             "value = fma(value, factor, 0.0f);"),
    Mutation("partial results are not fenced", STATE,
             "  fence_gpu();\n  Team::sync();", "  Team::sync();"),
    Mutation("the last block does not wait for its threads", STATE,
             "  fence_gpu();\n  Team::sync();", "  fence_gpu();"),
    Mutation("the counter does not come back to zero", STATE,
             "num_items) - 1);", "num_items));"),
    Mutation("partial results folded without their scale", STATE,
             "scales.apply(values[e], exists ? chunk[a][e] : 0.0f);",
             "values[e] + (exists ? chunk[a][e] : 0.0f);"),
    Mutation("the last slot is folded again where there are no more", STATE,
             "const bool exists = slot + a < end_slot;", "const bool exists = true;"),
    Mutation("a slot is left out where several are loaded at once", STATE,
             "const bool exists = slot + a < end_slot;",
             "const bool exists = slot + a < end_slot - 1;"),
    Mutation("slots of other rows are read ahead", STATE,
             "const int there = min(slot + a, end_slot - 1);", "const int there = slot + a;"),
    Mutation("slots that are loaded at once are one and the same", STATE,
             "const int there = min(slot + a, end_slot - 1);", "const int there = slot;"),
    Mutation("the rescale is not exactly 1", S, "exp2(mul(rows[h].max, factor) - base)",
             "exp2(fma(rows[h].max, factor, -base))"),
    Mutation("mla: a tile is read before it has landed", L,
             "cp_async_wait<Traits::kStages - 2>();", "cp_async_wait<Traits::kStages - 1>();"),
    Mutation("mla: no barrier before a tile is read", L,
             "cp_async_wait<Traits::kStages - 2>();\n    sync_block();",
             "cp_async_wait<Traits::kStages - 2>();"),
    Mutation("mla: a tile goes to the stage in use", L,
             "(stage_ + Traits::kStages - 1) % Traits::kStages", "stage_"),
    Mutation("mla: a stage is read twice", L, "stage_ = (stage_ + 1) % Traits::kStages;", ""),
    Mutation("mla: locations of the tile before", L, "next_location_ = locate_own(tile + 1);", ""),
    Mutation("mla: swizzle forgotten by the copies", L,
             "piece_offset<Traits::kKeyBytes>(row, first_piece)",
             "static_cast<uint32_t>(row * Traits::kKeyBytes + first_piece * 16)"),
    Mutation("mla: queries are read before they have landed", L,
             "cp_async_wait<Traits::kStages - 1>();", "cp_async_wait<Traits::kStages>();"),
    Mutation("mla: a warp has the queries of another", L,
             "Traits::kColumnWarps * step + column_warp<Traits>(),",
             "Traits::kColumnWarps * step,"),
    Mutation("mla: scores are read before they are written", L,
             "  sync_block();\n  if (own", "  if (own"),
    Mutation("mla: sums of scores are read before they are written", L,
             "  sync_block();\n  QUIRE_UNROLL", "  QUIRE_UNROLL"),
    Mutation("mla: scores of other rows", L,
             "first_warp = row_warp<Traits>() * Traits::kColumnWarps,", "first_warp = 0,"),
    Mutation("mla: every warp adds up the first keys", L,
             "score_slot<Traits>(first_warp + warp, own)",
             "score_slot<Traits>(first_warp + warp, 0)"),
    Mutation("mla: masks of the tile's first keys", L,
             "tile * Traits::kKeys + 8 * own, sum", "tile * Traits::kKeys, sum"),
    Mutation("mla: masks of other rows", L,
             "row_warp<Traits>() * kTile + fresh_thread_index() % kWarpSize / 4 + 8 * h",
             "fresh_thread_index() % kWarpSize / 4 + 8 * h"),
    Mutation("mla: masks of a thread's first row", L,
             "score_row_slot<Traits>(1)", "score_row_slot<Traits>(0)"),
    Mutation("mla: half of the shared memory that rows take", TRAITS,
             "store_score_row\n  static constexpr int kSharedBytes = kRowOffset + kRows * 32",
             "store_score_row\n  static constexpr int kSharedBytes = kRowOffset + kRows * 16"),
    Mutation("mla: every warp multiplies the first columns", L,
             "column_warp<Traits>() * (Traits::kColumns / kPiece)", "0"),
    Mutation("mla: partial results in the first columns", L,
             "(args, slot, row) + first_column;", "(args, slot, row);"),
    Mutation("mla: chunks in one slot", L,
             "again.partial + chunk - again.kv_begin / kKvChunk", "again.partial"),
    Mutation("mla: results overwrite a tile in use", L,
             "cp_async_wait<0>();\n  sync_block();", "cp_async_wait<0>();"),
    Mutation("mla: the next rows overwrite results in use", L,
             "total, first_row);\n    sync_block();", "total, first_row);"),
    Mutation("mla: results are read without a warp sync", L, "  sync_warp();\n", ""),
    Mutation("mla: tiles of rows share a counter", L, "item.merge * tiles + tile,", "item.merge,"),
    Mutation("mla: a tile merges the rows of another", L,
             "item.merge * tiles + tile, first_row,", "item.merge * tiles + tile, 0,"),
    Mutation("plan: sums are overwritten while they are read", PL,
             "  sync_block();  // before the sums may be overwritten\n", ""),
    Mutation("plan: sums are read before they are there", PL,
             "inclusive);\n  sync_block();", "inclusive);"),
    Mutation("plan: first tiles are read before they are there", PL,
             "  sync_block();  // what is in memory is read by other threads from here on\n", ""),
    Mutation("plan: tiles are read before they are there", PL,
             "num_partials);\n  }\n  sync_block();", "num_partials);\n  }"),
    Mutation("plan: pieces are sorted before they are there", PL,
             "    st_shared(Order::piece(i), i);\n  }\n  sync_block();",
             "    st_shared(Order::piece(i), i);\n  }"),
    Mutation("plan: no barrier between two steps of the sort", PL,
             "        sync_block();\n      else", "        sync_warp();\n      else"),
    Mutation("plan: warps do not wait between steps over 64 entries", PL,
             "max(distance, next) > kWarpSize", "max(distance, next) > 2 * kWarpSize"),
    Mutation("plan: lanes do not wait between two steps of the sort", PL,
             "      else\n        sync_warp();", ""),
    Mutation("plan: items are made before the pieces are in order", PL,
             "sync_warp();\n    }\n  sync_block();", "sync_warp();\n    }"),
    Mutation("plan: an item has the sequence before", PL,
             "planned_sequence(args, tile.sequence));",
             "planned_sequence(args, max(0, tile.sequence - 1)));"),
    Mutation("plan: equal pieces in any order", PL,
             "(low_key == high_key && low_piece < high_piece)", "low_key == high_key"),
    Mutation("plan: the cheap ones first", PL, "(kMost - cost)", "cost"),
    Mutation("plan: a sum includes the thread's own value", PL,
             "before + inclusive - value;", "before + inclusive;"),
    Mutation("plan: the second pass forgets the first", PL,
             "num_pieces += pieces,", "num_pieces = pieces,"),
    Mutation("plan: reading a key costs nothing", PL, "kReadCost = 16", "kReadCost = 1"),
    Mutation("plan: a share of one kv head", PL,
             "tile.kv_end - tile.kv_begin) * args.num_kv_heads;", "tile.kv_end - tile.kv_begin);"),
    Mutation("plan: what is just a share is cut", PL,
             "(cost > 1 ? cost - 1 : 0) / share", "cost / share"),
    Mutation("plan: the last row's keys are those of the next", PL,
             "tile.q_end - 1, last_begin", "tile.q_end, last_begin"),
    Mutation("plan: a tile begins inside a chunk", PL,
             "begin / kKvChunk * kKvChunk", "begin"),
    Mutation("plan: a counter keeps what it held", PL,
             "args.counters_a_merge + c, 0u);", "args.counters_a_merge, 0u);"),
    Mutation("plan: ranges of a plan before stay", PL,
             "    st_global(&args.counts->ranges[0].begin + i, 0);", "    (void)i;"),
    Mutation("plan: decode rows are one too few", PL, "rows <= args.decode_rows",
             "rows < args.decode_rows"),
    Mutation("plan: wide rows are one too many", PL, "rows >= args.wide_rows",
             "rows > args.wide_rows"),
    Mutation("plan: partial results of one kv head only", PL,
             "num_chunks(tile) * heads : 0", "num_chunks(tile) : 0"),
    Mutation("plan: one worker's tiles are cut", PL,
             "  if (args.parallelism == 1) return INT64_MAX;\n", ""),
]  # fmt: skip
MUTATIONS += mutations_sm90.MUTATIONS + mutations_e4m3.MUTATIONS + mutations_mla_sm90.MUTATIONS


CPU_SECONDS = 150  # of a program; the slowest takes a third of it where nothing is planted

# What the programs need of the core: it is built once.
CORE = ("attention/plan", "attention/shared_runs", "attention/validate", "kv_scales", "tensor")


def compile_in(folder: Path, *arguments: str | Path) -> None:
    includes = (folder / "cuda", ROOT / "tests", ROOT / "cpp/include", ROOT / "cpp/src")
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-w", "-ffp-contract=off",
         *(f"-I{path}" for path in includes), *arguments],
        check=True, cwd=folder,
    )  # fmt: skip


def build_and_run(folder: Path, name: str) -> tuple[int, str]:
    """Exit status of the test program over the kernels in `folder`, and what it printed."""
    objects = sorted(folder.glob("*.o"))
    try:
        compile_in(folder, "-o", name, ROOT / "tests/emulator" / f"{name}.cpp", *objects)
    except subprocess.CalledProcessError:
        return 1, "does not compile"
    # A bug may be that the kernel never ends: then a signal does it.
    run = subprocess.run(
        ["/bin/sh", "-c", f"ulimit -t {CPU_SECONDS}; exec ./{name}"],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    return run.returncode, run.stdout


def program_of(mutation: Mutation) -> str:
    kernel = mutation.what.split(":")[0]
    return f"test_mutation_{kernel}" if kernel in PROGRAMS else "test_mutation"


def planted(source: str, mutation: Mutation) -> str:
    places = source.count(mutation.old)
    assert places == 1, f"{mutation.what}: {places} places in {mutation.file}, expected one"
    return source.replace(mutation.old, mutation.new)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose description contains this")
    only = parser.parse_args().only
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(ROOT / "cuda", folder / "cuda")
        compile_in(folder, "-c", *(ROOT / "cpp/src" / f"{name}.cpp" for name in CORE))
        chosen = [mutation for mutation in MUTATIONS if only in mutation.what]
        for program in sorted({program_of(mutation) for mutation in chosen}):
            status, output = build_and_run(folder, program)
            print(f"unchanged: {output.strip()}", flush=True)
            assert status == 0, "the unchanged kernels must pass"
        for mutation in chosen:
            path = folder / mutation.file
            original = path.read_text()
            path.write_text(planted(original, mutation))
            status, output = build_and_run(folder, program_of(mutation))
            path.write_text(original)
            caught = status == 2 or status < 0  # < 0: ended by a signal
            missed += not caught
            print(
                f"{'caught' if caught else 'MISSED'}  {mutation.what}: {output.strip()[:110]}",
                flush=True,
            )
    return missed != 0


if __name__ == "__main__":
    sys.exit(main())
