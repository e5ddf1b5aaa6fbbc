// SPDX-License-Identifier: Apache-2.0
// What is fixed when an attention kernel is compiled: tile shapes, and how shared memory is laid
// out. The host reads the same numbers to launch it.
#pragma once

#include "prim/marks.h"
#include "quire/kernel_params.h"

namespace quire::device {

// kFast: plain or causal, scale > 0, 16-byte rows. kFull: everything that AttentionParams can say.
enum class Mode { kFast, kFull };

// Blocks a multiprocessor that the compiler leaves registers for. Left to itself it spills to make
// room for more blocks than shared memory allows.
constexpr int blocks_per_multiprocessor(int threads) { return threads <= 128 ? 2 : 1; }

inline constexpr int kPieceBytes = 16;  // the unit of copies and of swizzling
inline constexpr int kPiece = 8;        // 16-bit elements in it
inline constexpr int kTile = 16;        // rows, keys or columns that one mma step covers

// Tiles of K and V in shared memory: of Type, or of something narrower that is widened in
// registers.
template <class Type_, class KvType_, int kHeadDim, int kKeys>
struct KeyTiles {
  using Type = Type_;      // of queries and results
  using KvType = KvType_;  // of K and V
  using Product = typename KvType::Product;
  static constexpr bool kIsQuantised = sizeof(typename KvType::Bits) == 1;
  static constexpr int kPolynomialEvery = 0;  // of the exponentials; 0: none is a polynomial
  static constexpr int kKvPiece = kPieceBytes / sizeof(typename KvType::Bits);  // elements
  static constexpr int kKeyBytes = kHeadDim * sizeof(typename KvType::Bits);    // of a row
  static constexpr int kKeyTileBytes = kKeys * kKeyBytes;
  // K, V and, of a quantised cache, the scales of their tokens.
  static constexpr int kStageBytes = 2 * kKeyTileBytes + (kIsQuantised ? 2 * kKeys * 4 : 0);
  static_assert(kHeadDim % 32 == 0 && kKeys % kTile == 0);
};

template <class Type_, int kHeadDim_, int kRows_, int kKeys_, Mode kMode_, class KvType_ = Type_>
struct PrefillTraits : KeyTiles<Type_, KvType_, kHeadDim_, kKeys_> {
  using Base = KeyTiles<Type_, KvType_, kHeadDim_, kKeys_>;
  static constexpr int kHeadDim = kHeadDim_;  // of the tiles; that of the tensors may be less
  static constexpr int kRows = kRows_;
  static constexpr int kKeys = kKeys_;  // a tile
  static constexpr Mode kMode = kMode_;
  static constexpr int kThreads = kRows / kTile * kWarpSize;
  // Fragments of queries stay in registers where there is room for them.
  static constexpr bool kKeepQueries = kHeadDim <= 128;

  // Shared memory, in bytes from its begin. Queries that are kept make room for `total`.
  static constexpr int kTotalBytes = kRows * kHeadDim * 4;
  static constexpr int kStageOffset = 0;  // stage 0, stage 1
  static constexpr int kTotalOffset = 2 * Base::kStageBytes;
  static constexpr int kQueryOffset = kKeepQueries ? kTotalOffset : kTotalOffset + kTotalBytes;
  static constexpr int kStatsOffset =
      kKeepQueries ? kTotalOffset + kTotalBytes : kQueryOffset + kRows * kHeadDim * 2;
  static constexpr int kLocationOffset = kStatsOffset + kRows * 8;  // [2][kKeys]
  static constexpr int kFlagOffset = kLocationOffset + 2 * kKeys * 8;
  static constexpr int kUnitOffset = kFlagOffset + 16;  // [kRows], see prepare_queries
  static constexpr int kSharedBytes = kUnitOffset + (Base::kIsQuantised ? kRows * 4 : 0);

  static_assert(kRows % kTile == 0);
  static_assert(kKvChunk % kKeys == 0, "a tile belongs to one chunk");
  static_assert(kKeys <= kThreads, "a thread locates at most one key of a tile");
  static_assert(Base::kKeyTileBytes / kPieceBytes % kThreads == 0);
};

template <class Type_, int kHeadDim_, int kWarps_, int kStages_, Mode kMode_, class KvType_ = Type_>
struct DecodeTraits : KeyTiles<Type_, KvType_, kHeadDim_, kTile> {
  using Base = KeyTiles<Type_, KvType_, kHeadDim_, kTile>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kTile;
  static constexpr int kKeys = kTile;
  static constexpr int kWarps = kWarps_;
  static constexpr int kStages = kStages_;
  static constexpr Mode kMode = kMode_;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr bool kKeepQueries = kHeadDim <= 128;

  // The warps' results are exchanged so many columns at a time that each thread gets one piece.
  static constexpr int kRoundColumns = kThreads * kPiece / kRows;
  static constexpr int kRounds = (kHeadDim + kRoundColumns - 1) / kRoundColumns;

  // Shared memory, in bytes from its begin. Queries that are kept make room for the exchange: with
  // head dim 128 and three stages two blocks then fit the 228 KB of a Hopper multiprocessor.
  static constexpr int kStageOffset = 0;  // [kWarps][kStages]
  static constexpr int kQueryOffset = kWarps * kStages * Base::kStageBytes;
  static constexpr int kExchangeOffset =
      kKeepQueries ? kQueryOffset : kQueryOffset + kRows * kHeadDim * 2;
  static constexpr int kStatsOffset = kExchangeOffset + kWarps * kRows * kRoundColumns * 4;
  static constexpr int kFlagOffset = kStatsOffset + kWarps * kRows * 8;
  static constexpr int kUnitOffset = kFlagOffset + 16;  // [kRows], see prepare_queries
  static constexpr int kTotalOffset = kUnitOffset + (Base::kIsQuantised ? kRows * 4 : 0);
  // Few threads have no registers for the total of long rows.
  static constexpr bool kKeepTotal = kRounds < 8;
  static constexpr int kSharedBytes = kTotalOffset + (kKeepTotal ? 0 : kRows * kHeadDim * 4);

  static_assert(kStages >= 2 && kRoundColumns % 32 == 0);
  static_assert(!kKeepQueries || kRows * kHeadDim * 2 <= kWarps * kRows * kRoundColumns * 4);
  static_assert(kKvChunk / kKeys % kWarps == 0, "every chunk is dealt alike");
};

// Decode over a latent cache: the first kHeadDim - 64 columns of a key are its value.
template <class Type_, int kHeadDim_, int kRows_, int kKeys_, int kStages_, Mode kMode_>
struct MlaTraits : KeyTiles<Type_, Type_, kHeadDim_, kKeys_> {
  using Base = KeyTiles<Type_, Type_, kHeadDim_, kKeys_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDim - 64;
  static constexpr int kRows = kRows_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kStages_;
  static constexpr Mode kMode = kMode_;
  static constexpr int kColumnWarps = 4;  // that share 16 rows
  static constexpr int kWarps = kRows / kTile * kColumnWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSteps = kHeadDim / kTile / kColumnWarps;  // of the product with keys
  static constexpr int kColumns = kHeadDimV / kColumnWarps;       // of that with values

  // Shared memory, in bytes from its begin. Queries are in registers before the last stage is
  // first filled.
  static constexpr int kStageBytes = Base::kKeyTileBytes;  // K alone
  static constexpr int kStageOffset = 0;
  static constexpr int kQueryOffset = kStageOffset + (kStages - 1) * kStageBytes;
  static constexpr int kScoreOffset = kStageOffset + kStages * kStageBytes;  // [kWarps]
  static constexpr int kStatsOffset = kScoreOffset + kWarps * kTile * kKeys * 4;
  static constexpr int kFlagOffset = kStatsOffset + kWarps * kTile * 8;
  static constexpr int kRowOffset = kFlagOffset + 16;  // [kRows], see store_score_row
  static constexpr int kSharedBytes = kRowOffset + kRows * 32;

  // What the parts that kernels share see: results of all columns, and those of one warp.
  struct Values {
    using Type = Type_;
    static constexpr bool kIsQuantised = false;
    static constexpr int kHeadDim = kHeadDimV;
    static constexpr Mode kMode = kMode_;
    static constexpr int kThreads = MlaTraits::kThreads;
  };
  struct Columns {
    using Product = Type_;
    static constexpr bool kIsQuantised = false;
    static constexpr int kPolynomialEvery = 0;
    static constexpr int kHeadDim = kColumns;
    static constexpr int kKeys = kKeys_;
    static constexpr int kKvPiece = kPiece;
    static constexpr int kKeyBytes = Base::kKeyBytes;
  };

  static_assert(kStages >= 2 && kRows <= kKeys, "queries fit one stage");
  static_assert(kHeadDim % (kTile * kColumnWarps) == 0 && kHeadDimV % (kTile * kColumnWarps) == 0);
  static_assert(2 * kColumnWarps == 8 && kThreads == 8 * kKeys &&
                Base::kKeyBytes % (8 * kPieceBytes) == 0);
  static_assert(kWarps * kTile * kColumns * 4 <= kStages * kStageBytes, "results fit the stages");
  static_assert(kKvChunk % kKeys == 0, "a tile belongs to one chunk");
};

// Prefill on compute capability 9.0a: consumers are warpgroups of 64 rows each, and one warpgroup
// more brings keys and values. Tiles lie in columns of 64 elements, rows of 128 bytes.
template <class Type_, int kKeyDim_, int kHeadDim_, int kRows_, int kKeys_, int kStages_,
          Mode kMode_>
struct Sm90PrefillTraits {
  using Type = Type_;
  using KvType = Type_;
  static constexpr bool kIsQuantised = false;
  // At head dim 64 the exponentials take as long as the products: every fourth is arithmetic.
  static constexpr int kPolynomialEvery = kHeadDim_ == 64 ? 4 : 0;
  static constexpr int kKeyDim = kKeyDim_;    // head dim of queries and keys
  static constexpr int kHeadDim = kHeadDim_;  // of values and results
  static constexpr int kRows = kRows_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kStages_;
  static constexpr Mode kMode = kMode_;
  static constexpr int kConsumers = kRows / 64;  // warpgroups
  static constexpr int kConsumerThreads = kConsumers * 4 * kWarpSize;
  static constexpr int kThreads = kConsumerThreads + 4 * kWarpSize;
  static constexpr int kWarpKeys = kKeys / 4;  // of a tile, that one warp of the producer brings
  // Registers a thread; two times the first and the second are three times the 168 of the launch.
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;

  // Shared memory, in bytes from its begin.
  static constexpr int kColumnBytes = kKeys * 128;  // 64 columns of a tile of keys
  static constexpr int kKeyTileBytes = kKeys * kKeyDim * 2;
  static constexpr int kStageBytes = kKeyTileBytes + kKeys * kHeadDim * 2;  // of K, then of V
  static constexpr int kQueryOffset = 0;
  static constexpr int kStageOffset = kRows * kKeyDim * 2;
  static constexpr int kTotalOffset = kStageOffset + kStages * kStageBytes;
  // Sums of long rows take half of all registers, and their total has no room in shared memory: it
  // lies in global memory together with its stats, a place for each block.
  static constexpr bool kIsLong = kHeadDim > 128;
  static constexpr int kTotalBytes = kRows * kHeadDim * 4;
  static constexpr int kGlobalBytes = kIsLong ? kTotalBytes + kConsumerThreads * 16 : 0;
  static constexpr int kStatsOffset = kTotalOffset + (kIsLong ? 0 : kTotalBytes);
  static constexpr int kBarrierOffset = kStatsOffset + kRows * 8;  // [K, V][full, empty][kStages]
  static constexpr int kItemOffset = kBarrierOffset + 4 * kStages * 8;  // of ItemQueue
  static constexpr int kItemSlots = 4;
  static constexpr int kFlagOffset = kItemOffset + kItemSlots * (8 + 8 + 4);
  static constexpr int kRowOffset = kFlagOffset + 16;  // [kRows] of long rows: what masks know
  static constexpr int kSharedBytes = kRowOffset + (kIsLong ? kRows * 32 : 0);

  static_assert(kConsumers == 2);
  static_assert(kRows % 64 == 0 && kKeys % 64 == 0 && kStages >= 2);
  static_assert(kKeyDim % 64 == 0 && kHeadDim % 64 == 0);
  static_assert(kKvChunk % kKeys == 0, "a tile belongs to one chunk");
  static_assert(kWarpKeys <= kWarpSize, "a lane locates at most one key of a tile");
};

// Likewise of e4m3 queries over e4m3 keys and values. Type is that of results. Rows are of 128
// bytes: of 64 columns what lies beyond them is not read, but for values that have been turned,
// whose keys it holds. Consumers take half a tile at a time.
template <class Type_, int kHeadDim_, int kRows_, int kKeys_, int kStages_, Mode kMode_>
struct Sm90E4m3Traits {
  using Type = Type_;
  using KvType = Float8E4M3;
  static constexpr bool kIsQuantised = true;
  static constexpr int kPolynomialEvery = 0;
  static constexpr int kKeyDim = kHeadDim_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kStages_;
  static constexpr Mode kMode = kMode_;
  static constexpr int kConsumers = kRows / 64;
  static constexpr int kConsumerThreads = kConsumers * 4 * kWarpSize;
  static constexpr int kThreads = kConsumerThreads + 4 * kWarpSize;
  static constexpr int kWarpKeys = kKeys / 4;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;
  static constexpr bool kIsLong = false;
  static constexpr int kGlobalBytes = 0;

  // Shared memory, in bytes from its begin. A warp's queries are brought through its `total`.
  static constexpr int kColumnBytes = kKeys * 128;
  static constexpr int kKeyTileBytes = kKeys * 128;
  static constexpr int kStageBytes = 2 * kKeyTileBytes;
  static constexpr int kStageOffset = 0;
  static constexpr int kTotalOffset = kStages * kStageBytes;
  static constexpr int kStatsOffset = kTotalOffset + kRows * kHeadDim * 4;
  // Scales of tokens, [2 kStages][K, V][kKeys]: read after the keys are released, so there are
  // places for twice the stages.
  static constexpr int kScaleOffset = kStatsOffset + kRows * 8;
  static constexpr int kScaleBytes = 2 * kKeys * 4;
  static constexpr int kBarrierOffset = kScaleOffset + 2 * kStages * kScaleBytes;
  static constexpr int kItemOffset = kBarrierOffset + 5 * kStages * 8;
  static constexpr int kItemSlots = 4;
  static constexpr int kFlagOffset = kItemOffset + kItemSlots * (8 + 8 + 4);
  static constexpr int kRowOffset = kFlagOffset + 16;  // [kRows]: what masks know
  static constexpr int kSharedBytes = kRowOffset + kRows * 32;

  // What consumers take at a time.
  struct Half {
    static constexpr bool kIsQuantised = true;
    static constexpr int kPolynomialEvery = 0;
    static constexpr int kKeys = kKeys_ / 2;
  };

  static_assert(kConsumers == 2);
  static_assert((kHeadDim == 64 || kHeadDim == 128) && kKeys == 128,
                "tiles of values are turned in place");
  static_assert(kKvChunk % kKeys == 0 && kWarpKeys == kWarpSize);
};

// Attention over a latent cache on compute capability 9.0a. Of four warpgroups two sum weights
// times values, half of the columns each, one weighs the keys for both, and one brings tiles of
// keys.
template <class Type_, int kHeadDim_, int kRows_, int kKeys_, int kStages_, Mode kMode_>
struct Sm90MlaTraits {
  using Type = Type_;
  using KvType = Type_;
  static constexpr bool kIsQuantised = false;
  static constexpr int kPolynomialEvery = 0;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeyDim = kHeadDim;
  static constexpr int kHeadDimV = kHeadDim - 64;
  static constexpr int kColumns = kHeadDimV / 2;  // that a warpgroup sums
  static constexpr int kRows = kRows_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kStages_;
  static constexpr Mode kMode = kMode_;
  static constexpr int kSumThreads = 2 * 4 * kWarpSize;  // the first ones; then those that weigh
  static constexpr int kConsumerThreads = kSumThreads + 4 * kWarpSize;
  static constexpr int kThreads = kConsumerThreads + 4 * kWarpSize;
  static constexpr int kWarpKeys = kKeys;  // a warp of the producer brings columns of a whole tile
  // Registers a thread; twice the first and the others are four times the 128 of the launch.
  static constexpr int kSumRegisters = 176;
  static constexpr int kScoreRegisters = 120;
  static constexpr int kProducerRegisters = 40;

  // Shared memory, in bytes from its begin.
  static constexpr int kColumnBytes = kKeys * 128;  // 64 columns of a tile of keys
  static constexpr int kKeyTileBytes = kKeys * kHeadDim * 2;
  static constexpr int kStageBytes = kKeyTileBytes;  // K alone
  static constexpr int kQueryOffset = 0;
  static constexpr int kStageOffset = kRows * kHeadDim * 2;
  static constexpr int kWeightOffset =
      kStageOffset + kStages * kStageBytes;                           // [kRows] of 128 bytes
  static constexpr int kRescaleOffset = kWeightOffset + kRows * 128;  // [2][kRows]
  static constexpr int kFoldOffset = kRescaleOffset + 2 * kRows * 4;  // [kRows]
  static constexpr int kBarrierOffset = kFoldOffset + kRows * 16;     // [full, empty][kStages]
  static constexpr int kWeightBarrierOffset = kBarrierOffset + 2 * kStages * 8;  // likewise [2]
  static constexpr int kFoldBarrierOffset = kWeightBarrierOffset + 2 * 2 * 8;    // likewise [1]
  static constexpr int kItemOffset = kFoldBarrierOffset + 2 * 8;                 // of ItemQueue
  static constexpr int kItemSlots = 4;
  static constexpr int kFlagOffset = kItemOffset + kItemSlots * (8 + 8 + 4);
  static constexpr int kSharedBytes = kFlagOffset + 16;
  // The total of a block is in global memory.
  static constexpr int kGlobalBytes = kRows * kHeadDimV * 4;

  // What the parts that kernels share see of results.
  struct Values {
    using Type = Type_;
    static constexpr bool kIsQuantised = false;
    static constexpr int kHeadDim = kHeadDimV;
    static constexpr Mode kMode = kMode_;
  };

  static_assert(kRows == 64, "one product of a warpgroup");
  static_assert(kKeys == kWarpSize, "a lane locates a key, and two tiles of weights are 128 bytes");
  static_assert(kColumns == 256 && kHeadDim % 64 == 0 && kWeightOffset % 1024 == 0);
  static_assert(kKvChunk % kKeys == 0, "a tile belongs to one chunk");
};

// The planner: one block.
template <int kThreads_>
struct PlannerTraits {
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kMaxPieces = 8192;  // a power of 2

  // Shared memory, in bytes from its begin.
  static constexpr int kSumOffset = 0;                              // [kWarps] of 8 bytes
  static constexpr int kKeyOffset = kSumOffset + kWarps * 8;        // [kMaxPieces]: see key_of
  static constexpr int kOrderOffset = kKeyOffset + kMaxPieces * 8;  // [kMaxPieces]: pieces
  static constexpr int kSharedBytes = kOrderOffset + kMaxPieces * 4;
};

}  // namespace quire::device
