// SPDX-License-Identifier: Apache-2.0
// BlockAllocator: which blocks of the KV cache are free, in use, or kept for their contents.
//
// Every block is in exactly one state:
//   free    no references, no contents worth keeping; in the free list
//   used    one reference or more
//   cached  no references, but its contents may be wanted again; in the LRU list
// It knows ids and counts only; what a block holds is the prefix cache's affair.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace quire {

// Structure of arrays, 17 bytes a block. Every operation on a block is O(1).
class BlockAllocator {
 public:
  BlockAllocator(int32_t num_blocks, int32_t block_size);

  // Fills `blocks` with ids that hold one reference each, or changes nothing and returns nullopt.
  // Free blocks are taken first, the last freed first; then cached ones, the least recently used
  // first. The result k says that the last k of `blocks` were cached until now.
  std::optional<size_t> allocate(std::span<int32_t> blocks);

  // One reference more. A cached block leaves the LRU list, wherever in it it lies.
  void share(int32_t block);

  // One reference less. The last one sends the block to the end of the LRU list if its contents
  // are worth keeping, else to the free list.
  void release(int32_t block);

  // The contents of a used block are worth keeping until allocate() takes the block.
  void mark_cached(int32_t block) { cached_[block] = 1; }

  // How many tokens a used block holds, 0 ... block_size.
  void set_num_tokens(int32_t block, int32_t count) {
    num_used_tokens_ += count - num_tokens_[block];
    num_tokens_[block] = count;
  }

  int32_t refcount(int32_t block) const { return refcount_[block]; }
  bool is_cached(int32_t block) const { return cached_[block] != 0; }
  int32_t num_tokens(int32_t block) const { return num_tokens_[block]; }

  int32_t num_blocks() const { return num_blocks_; }
  int32_t block_size() const { return block_size_; }
  int32_t num_free() const { return num_free_; }
  int32_t num_cached() const { return num_cached_; }
  int32_t num_used() const { return num_blocks_ - num_free_ - num_cached_; }
  int32_t num_available() const { return num_free_ + num_cached_; }  // what allocate() can give
  int32_t high_water() const { return high_water_; }            // most blocks ever used at once
  int64_t num_used_tokens() const { return num_used_tokens_; }  // in used blocks, each once

  // Walks everything; throws InvariantError.
  void validate() const;

 private:
  // Both lists are circular through a sentinel that lies behind the blocks.
  int32_t free_list() const { return num_blocks_; }
  int32_t lru_list() const { return num_blocks_ + 1; }
  void insert_after(int32_t position, int32_t block);
  void unlink(int32_t block);
  int32_t check_list(int32_t list, bool cached) const;

  int32_t num_blocks_;
  int32_t block_size_;
  int32_t num_free_;
  int32_t num_cached_ = 0;
  int32_t high_water_ = 0;
  int64_t num_used_tokens_ = 0;
  std::vector<int32_t> prev_, next_;  // [num_blocks + 2]
  std::vector<int32_t> refcount_;
  std::vector<int32_t> num_tokens_;
  std::vector<uint8_t> cached_;
};

}  // namespace quire
