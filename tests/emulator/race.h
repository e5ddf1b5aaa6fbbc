// SPDX-License-Identifier: Apache-2.0
// RaceDetector: two threads that touch the same shared word, one of them writing, must be ordered
// by a barrier or a warp sync. Vector clocks, so what is found does not depend on the schedule.
// Agents are threads that nobody wrote: the copies that complete on one mbarrier are one.
//
// Granularity is a 4-byte word. Of each warp the last reader of a word is remembered.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace quire::emulator {

class RaceDetector {
 public:
  static constexpr int kMaxWarps = 16;
  static constexpr int kMaxAgents = 32;
  using Clock = std::vector<uint32_t>;

  RaceDetector(int num_threads, size_t shared_bytes)
      : num_threads_(num_threads),
        width_(num_threads + kMaxAgents),
        clocks_(static_cast<size_t>(width_) * width_),
        joined_(width_),
        words_((shared_bytes + 3) / 4) {
    for (int thread = 0; thread < width_; ++thread) clock(thread)[thread] = 1;
  }

  // Each returns what is wrong, or an empty string.
  std::string read(int thread, uint32_t address, uint32_t bytes) {
    for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i) {
      Word& word = words_[i];
      if (!ordered_after(thread, word.writer))
        return conflict("read", i, "the write by thread ", word.writer.thread);
      word.readers[thread / 32] = {static_cast<uint16_t>(thread), clock(thread)[thread]};
    }
    return {};
  }

  std::string write(int thread, uint32_t address, uint32_t bytes) {
    return write_as(thread, thread, address, bytes);
  }

  // What `thread` sends `agent` to write: it must be ordered like a write by the thread, and is
  // seen by whoever acquires the agent's clock.
  std::string write_by_agent(int agent, int thread, uint32_t address, uint32_t bytes) {
    join(clock(num_threads_ + agent), clock(thread));
    return write_as(num_threads_ + agent, thread, address, bytes);
  }

  // All that the thread, or the agent, has done happens before what follows an acquire() of `to`.
  void release(int thread, Clock& to) {
    to.resize(width_);
    join(to.data(), clock(thread));
    ++clock(thread)[thread];
  }
  void release_agent(int agent, Clock& to) { release(num_threads_ + agent, to); }
  void acquire(int thread, const Clock& from) {
    if (!from.empty()) join(clock(thread), from.data());
  }

  // Everything that threads [begin, end) whose bit in `mask` is set have done happens before all
  // that they do from now on. Bit i is thread begin + i % 32.
  void synchronize(int begin, int end, uint32_t mask) {
    std::fill(joined_.begin(), joined_.end(), 0);
    const auto takes_part = [mask](int thread) { return mask >> (thread & 31) & 1; };
    for (int thread = begin; thread < end; ++thread)
      if (takes_part(thread)) join(joined_.data(), clock(thread));
    for (int thread = begin; thread < end; ++thread)
      if (takes_part(thread)) {
        std::copy(joined_.begin(), joined_.end(), clock(thread));
        ++clock(thread)[thread];
      }
  }

 private:
  struct Access {
    uint16_t thread = 0;
    uint32_t clock = 0;  // 0: never
  };
  struct Word {
    Access writer;
    Access readers[kMaxWarps];
  };

  uint32_t* clock(int thread) { return &clocks_[static_cast<size_t>(thread) * width_]; }

  void join(uint32_t* to, const uint32_t* from) const {
    for (int i = 0; i < width_; ++i) to[i] = std::max(to[i], from[i]);
  }

  std::string write_as(int writer, int thread, uint32_t address, uint32_t bytes) {
    for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i) {
      Word& word = words_[i];
      if (!ordered_after(thread, word.writer))
        return conflict("write", i, "the write by thread ", word.writer.thread);
      for (Access& reader : word.readers) {
        if (!ordered_after(thread, reader))
          return conflict("write", i, "the read by thread ", reader.thread);
        reader = {};
      }
      word.writer = {static_cast<uint16_t>(writer), clock(writer)[writer]};
    }
    return {};
  }

  bool ordered_after(int thread, const Access& access) {
    return access.clock == 0 || access.thread == thread ||
           clock(thread)[access.thread] >= access.clock;
  }

  static std::string conflict(const char* what, uint32_t word, const char* other, int thread) {
    return std::string("race: ") + what + " of shared byte " + std::to_string(word * 4) +
           " is not ordered after " + other + std::to_string(thread);
  }

  int num_threads_;
  int width_;                     // threads and agents
  std::vector<uint32_t> clocks_;  // [thread or agent, likewise]
  std::vector<uint32_t> joined_;
  std::vector<Word> words_;
};

}  // namespace quire::emulator
