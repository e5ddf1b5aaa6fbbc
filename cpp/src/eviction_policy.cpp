// SPDX-License-Identifier: Apache-2.0
#include "quire/eviction_policy.h"

#include <bit>

#include "quire/error.h"

namespace quire {
namespace {

constexpr int32_t kMemoryPerBlock = 2;

// What is kept of an id: 13 bits, and one that is always set, as 0 stands for nothing.
uint16_t tag_of(uint64_t id) { return static_cast<uint16_t>((id | 1) & 0x3fff); }

uint64_t mix(uint64_t value) {
  value = (value ^ value >> 32) * 0xd6e8feb86659fd93;
  return value ^ value >> 29;
}

}  // namespace

ReuseClasses::ReuseClasses(int32_t num_blocks)
    : stamps_(static_cast<size_t>(num_blocks)),
      ids_(static_cast<size_t>(num_blocks)),
      memory_(static_cast<size_t>(num_blocks) * kMemoryPerBlock) {}

uint64_t ReuseClasses::content_id(uint64_t parent_id, std::span<const int32_t> tokens) {
  uint64_t id = parent_id + tokens.size();
  for (int32_t token : tokens) id = mix((id ^ static_cast<uint32_t>(token)) * 0x9e3779b97f4a7c15);
  return id;
}

void ReuseClasses::admit(int32_t block, uint64_t id, int32_t parent) {
  uint16_t& memory = memory_of(id);
  uint32_t reuse = 0;
  if (memory != 0 && memory >> 2 == tag_of(id)) {
    reuse = std::min<uint32_t>((memory & 3) + 1, kNumClasses - 1);
    memory = 0;
  }
  ids_[block] = id;
  stamps_[block].reuse = class_under(parent, reuse);
}

void ReuseClasses::use(int32_t block, int32_t parent) {
  const uint32_t reuse = std::min<uint32_t>(stamps_[block].reuse + 1, kNumClasses - 1);
  stamps_[block].reuse = class_under(parent, reuse);
}

void ReuseClasses::evict(int32_t block) {
  memory_of(ids_[block]) = static_cast<uint16_t>(tag_of(ids_[block]) << 2 | stamps_[block].reuse);
}

int32_t ReuseClasses::choose(const std::array<int32_t, kNumClasses>& oldest) const {
  int32_t best = kNone, best_class = 0;
  for (int32_t k = 0; k < kNumClasses; ++k) {
    const int32_t block = oldest[k];
    if (block == kNone) continue;
    // age / weight > best age / best weight; a tie stays with the lower class.
    if (best == kNone || age(block) * kWeights[best_class] > age(best) * kWeights[k]) {
      best = block;
      best_class = k;
    }
  }
  return best;
}

std::vector<int64_t> ReuseClasses::save() const {
  std::vector<int64_t> numbers = {now_};
  for (const Stamp& stamp : stamps_) numbers.push_back(stamp.reuse | int64_t{stamp.time} << 2);
  for (uint64_t id : ids_) numbers.push_back(std::bit_cast<int64_t>(id));
  numbers.insert(numbers.end(), memory_.begin(), memory_.end());
  return numbers;
}

void ReuseClasses::load(std::span<const int64_t> numbers) {
  const size_t size = 1 + stamps_.size() + ids_.size() + memory_.size();
  QUIRE_CHECK_ARG(numbers.size() == size, "restore: snapshot: reuse: expected ", size,
                  " numbers, got ", numbers.size());
  now_ = static_cast<uint32_t>(numbers[0]);
  auto at = numbers.begin() + 1;
  for (Stamp& stamp : stamps_) {
    const uint32_t bits = static_cast<uint32_t>(*at++);
    stamp.reuse = bits & 3;
    stamp.time = bits >> 2;
  }
  for (uint64_t& id : ids_) id = std::bit_cast<uint64_t>(*at++);
  for (uint16_t& entry : memory_) entry = static_cast<uint16_t>(*at++);
}

}  // namespace quire
