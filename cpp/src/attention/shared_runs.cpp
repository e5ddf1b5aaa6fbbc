// SPDX-License-Identifier: Apache-2.0
// Which tiles read the same keys: sequences are followed chunk by chunk for as long as their block
// tables agree, as in a walk down a radix tree, but of the batch's own rows. No tensor is read.
//
// Source: sharing the attention of common prefixes after Juravsky et al., Hydragen (2024), and the
// cascade of FlashInfer (2024); here whole chunks, so that no sum is added in another order.
#include <cstring>
#include <functional>
#include <utility>

#include "attention/tile.h"

namespace quire {
namespace {

// Tiles with more rows are bound by arithmetic and gain nothing.
constexpr int kMostRows = 64;

class SharedRuns {
 public:
  SharedRuns(const AttentionDesc& desc, const AttentionPlan& plan, const std::vector<Tile>& tiles,
             Sharing sharing)
      : block_size_(desc.block_size), plan_(plan), tiles_(tiles), sharing_(sharing) {
    for (size_t i = 0; i < tiles.size(); ++i)
      if (tiles[i].whole_begin < tiles[i].whole_end && tiles[i].rows <= kMostRows)
        order_.push_back({0, static_cast<int32_t>(i)});
  }

  Runs find() {
    follow(0, order_.size(), 0);
    return std::move(result_);
  }

 private:
  struct Entry {
    uint64_t hash;  // of the block ids of the chunk where the group came apart
    int32_t tile;
  };

  const Tile& tile(size_t i) const { return tiles_[order_[i].tile]; }

  // Block ids of a chunk; a block that lies across its end is of both.
  std::pair<const int32_t*, size_t> blocks(size_t i, int chunk) const {
    const int64_t begin = int64_t{chunk} * kKvChunk / block_size_;
    const int64_t end = (int64_t{chunk + 1} * kKvChunk + block_size_ - 1) / block_size_;
    return {plan_.block_ids.data() + plan_.sequences[tile(i).sequence].kv_row + begin,
            static_cast<size_t>(end - begin)};
  }

  bool agree(size_t i, size_t j, int chunk) const {
    const auto [ids, count] = blocks(i, chunk);
    return std::memcmp(ids, blocks(j, chunk).first, count * sizeof *ids) == 0;
  }

  uint64_t hash(size_t i, int chunk) const {  // FNV-1a, a word at a time
    const auto [ids, count] = blocks(i, chunk);
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t k = 0; k < count; ++k) h = (h ^ static_cast<uint32_t>(ids[k])) * 0x100000001b3u;
    return h;
  }

  // Entries [begin, end) agree on all chunks before `chunk`.
  void follow(size_t begin, size_t end, int chunk) {
    for (int run_begin = chunk; end - begin >= 2; ++chunk) {
      const size_t going_on = drop_ended(begin, end, chunk);
      const bool joined = some_begin_at(begin, going_on, chunk);
      const bool apart = !all_agree(begin, going_on, chunk);
      if (going_on < end || joined || apart) {
        add_run(begin, end, run_begin, chunk);
        run_begin = chunk;
        end = going_on;
      }
      if (apart) return follow_each(begin, end, chunk);
    }
  }

  // Moves tiles whose whole chunks end before `chunk` to the back; returns where they begin.
  size_t drop_ended(size_t begin, size_t end, int chunk) {
    const auto ended = [&](const Entry& e) { return tiles_[e.tile].whole_end <= chunk; };
    const auto first = order_.begin() + static_cast<ptrdiff_t>(begin);
    const auto last = order_.begin() + static_cast<ptrdiff_t>(end);
    if (std::none_of(first, last, ended)) return end;
    const auto middle = std::stable_partition(first, last, std::not_fn(ended));
    return static_cast<size_t>(middle - order_.begin());
  }

  bool some_begin_at(size_t begin, size_t end, int chunk) const {
    for (size_t i = begin; i < end; ++i)
      if (chunk > 0 && tile(i).whole_begin == chunk) return true;
    return false;
  }

  bool all_agree(size_t begin, size_t end, int chunk) const {
    for (size_t i = begin + 1; i < end; ++i)
      if (!agree(begin, i, chunk)) return false;
    return true;
  }

  // Splits a group that comes apart at `chunk` and follows what is left of it.
  void follow_each(size_t begin, size_t end, int chunk) {
    for (size_t i = begin; i < end; ++i) order_[i].hash = hash(i, chunk);
    std::sort(order_.begin() + static_cast<ptrdiff_t>(begin),
              order_.begin() + static_cast<ptrdiff_t>(end), [](const Entry& a, const Entry& b) {
                return std::pair(a.hash, a.tile) < std::pair(b.hash, b.tile);
              });
    for (size_t i = begin, next; i < end; i = next) {
      for (next = i + 1; next < end && order_[next].hash == order_[i].hash;) ++next;
      // All are alike, or hashes have met that should not have: then nothing is shared.
      if (next - i >= 2 && all_agree(i, next, chunk)) follow(i, next, chunk);
    }
  }

  void add_run(size_t begin, size_t end, int chunk_begin, int chunk_end) {
    if (chunk_begin == chunk_end) return;
    const auto first = static_cast<int32_t>(result_.members.size());
    int64_t together = kReadCost, apart = 0;
    for (size_t i = begin; i < end; ++i) {
      if (tile(i).whole_begin > chunk_begin) continue;
      result_.members.push_back(order_[i].tile);
      together += tile(i).rows;
      apart += std::max<int64_t>(kReadCost, tile(i).rows);
    }
    const auto last = static_cast<int32_t>(result_.members.size());
    if (last - first >= 2 && (sharing_ == Sharing::kAlways || together < apart))
      result_.runs.push_back({first, last, chunk_begin, chunk_end});
    else
      result_.members.resize(first);
  }

  const int block_size_;
  const AttentionPlan& plan_;
  const std::vector<Tile>& tiles_;
  const Sharing sharing_;
  std::vector<Entry> order_;  // tiles; a group is a range
  Runs result_;
};

}  // namespace

Runs find_shared_runs(const AttentionDesc& desc, const AttentionPlan& plan,
                      const std::vector<Tile>& tiles, Sharing sharing) {
  if (sharing == Sharing::kNever || desc.block_size == 0) return {};
  return SharedRuns(desc, plan, tiles, sharing).find();
}

}  // namespace quire
