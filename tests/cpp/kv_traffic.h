// SPDX-License-Identifier: Apache-2.0
// KVTraffic: calls of a KVCacheManager chosen by a stream of bytes; for fuzzing, soaking,
// recording.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace kv_traffic {

struct Shape {
  int32_t num_blocks, block_size;
  bool prefix_caching;
  int32_t async_depth;
  int32_t max_seqs;      // beyond it sequences are freed instead of created
  int32_t max_tokens;    // of a sequence
  double short_ttl = 0;  // seconds, of some sequences
};

// A snapshot but for what is left to live, which is less at each look.
inline std::string without_times(const std::string& snapshot) {
  const size_t at = snapshot.find("\"expiries\"");
  return snapshot.substr(0, at) + snapshot.substr(snapshot.find(']', at));
}

struct Pin {
  std::vector<int32_t> tokens;
  bool is_salted;
  quire::Salt salt() const { return is_salted ? quire::Salt("a") : quire::Salt(); }
};

// Source: uint32_t next(), any bits. Manager: a KVCacheManager, or what has its functions; `view`
// is the manager to ask. Some calls are wrong on purpose: they must be refused.
template <class Manager, class Source>
class Traffic {
 public:
  Traffic(Manager& manager, const quire::KVCacheManager& view, const Shape& shape, Source& source)
      : manager_(manager), view_(view), shape_(shape), source_(source) {}

  void call() {
    try {
      choose();
    } catch (const quire::InvalidArgument&) {
      ++num_refused_;
    }
  }

  void free_all() {
    if constexpr (kPins)
      for (; !pinned_.empty(); pinned_.pop_back())
        manager_.unpin(pinned_.back().tokens, pinned_.back().salt());
    manager_.free(live_);
    live_.clear();
    if (shape_.async_depth > 0 && view_.batch().ticket() > retired_)
      manager_.retire(view_.batch().ticket());
    retired_ = view_.batch().ticket();
  }

  int64_t num_refused() const { return num_refused_; }

  // Goes on with the sequences of another.
  template <class Other>
  void adopt(const Other& other) {
    live_ = other.live();
    pinned_ = other.pinned();
    last_freed_ = other.last_freed();
    retired_ = other.retired();
  }
  const std::vector<quire::SequenceId>& live() const { return live_; }
  const std::vector<Pin>& pinned() const { return pinned_; }
  quire::SequenceId last_freed() const { return last_freed_; }
  int64_t retired() const { return retired_; }

 private:
  static constexpr bool kPins = requires(Manager& m) { m.clear_cache(); };

  uint32_t below(uint32_t bound) { return source_.next() % bound; }
  quire::SequenceId any() { return live_[below(static_cast<uint32_t>(live_.size()))]; }

  void choose() {
    const uint32_t action = below(18);
    if (live_.empty() || action == 0) return create();
    if (action < 6) return step_and_commit(true);
    if (action < 8) return step_and_commit(false);
    if (action < 9) return fork();
    if (action < 11) return truncate();
    if (action < 13) return free_some();
    if (action < 14) return retire();
    if (action < 15) return create();
    if (action < 16) return swap();
    if (action < 17) return misuse();
    if constexpr (kPins) return rare(below(4));
  }

  // What engines do now and then.
  void rare(uint32_t action) {
    if (action < 2) return change_pins();
    if (action < 3) return detach_or_attach();
    if (below(4) == 0)
      manager_.clear_cache();
    else
      step_ahead();
  }

  // Pins are held in tokens, so that they can be taken back when the sequence has ended.
  void change_pins() {
    if (!pinned_.empty() && below(2)) {
      std::swap(pinned_[below(static_cast<uint32_t>(pinned_.size()))], pinned_.back());
      const Pin pin = std::move(pinned_.back());
      pinned_.pop_back();
      manager_.unpin(pin.tokens, pin.salt());
    } else if (pinned_.size() < 4) {
      Pin pin{view_.tokens(any()), below(4) == 0};
      if (manager_.pin(pin.tokens, pin.salt()) > 0) pinned_.push_back(std::move(pin));
    } else {
      const quire::SequenceId seq = any();
      manager_.pin(seq);
      manager_.unpin(seq);
    }
  }

  void detach_or_attach() {
    for (quire::SequenceId seq : live_)
      if (view_.block_table(seq).empty() && !view_.is_swapped_out(seq)) return manager_.attach(seq);
    manager_.detach(any());
  }

  // One sequence, with room for drafts.
  void step_ahead() {
    if (!view_.may_step()) return retire();
    batch_ = {any()};
    const int64_t todo = view_.num_tokens(batch_[0]) - view_.num_computed_tokens(batch_[0]);
    counts_ = {static_cast<int32_t>(todo)};
    if (manager_.step(batch_, counts_, static_cast<int32_t>(below(2 * shape_.block_size))))
      commit();
  }

  // Few different tokens and often a prefix of an older prompt, so that much is shared.
  void create() {
    if (static_cast<int32_t>(live_.size()) >= shape_.max_seqs) return free_some();
    std::vector<int32_t> tokens;
    if (!live_.empty() && below(2)) {
      const auto known = view_.tokens(any());
      tokens.assign(known.begin(), known.begin() + below(static_cast<uint32_t>(known.size())) + 1);
    }
    for (uint32_t n = 1 + below(2 * shape_.block_size); n > 0; --n)
      tokens.push_back(static_cast<int32_t>(below(3)));
    if (static_cast<int32_t>(tokens.size()) > shape_.max_tokens) tokens.resize(shape_.max_tokens);
    static constexpr const char* kSalts[] = {"", "a"};
    const uint32_t salt = below(8);
    const quire::Salt own = salt < 2 ? quire::Salt(kSalts[salt]) : quire::Salt();
    if constexpr (kPins) {
      const quire::Retention retention{.priority = static_cast<int32_t>(below(3)),
                                       .ttl = below(4) ? 1e9 : shape_.short_ttl};
      const uint32_t kind = below(8);
      if (kind == 0) return live_.push_back(manager_.open(tokens, own));
      if (kind == 1) return live_.push_back(manager_.create(tokens, own, retention));
    }
    live_.push_back(manager_.create(tokens, own));
  }

  void step_and_commit(bool commits) {
    if (!view_.may_step()) return retire();
    pick_batch();
    if (!manager_.step(batch_, counts_)) {
      if (below(2)) free_some();
      return;
    }
    if (commits) commit();
  }

  // Some of the live sequences; mostly all of what each has to compute, sometimes a part.
  void pick_batch() {
    batch_.clear();
    counts_.clear();
    const uint32_t share = 1 + below(4);
    for (quire::SequenceId seq : live_) {
      if (below(4) >= share) continue;
      const auto todo =
          static_cast<uint32_t>(view_.num_tokens(seq) - view_.num_computed_tokens(seq));
      batch_.push_back(seq);
      counts_.push_back(static_cast<int32_t>(below(4) ? todo : below(todo + 1)));
    }
  }

  void commit() {
    sampled_.clear();
    num_sampled_.clear();
    for (size_t i = 0; i < batch_.size(); ++i) {
      const int64_t left =
          view_.num_tokens(batch_[i]) - view_.num_computed_tokens(batch_[i]) - counts_[i];
      const bool is_full = view_.num_tokens(batch_[i]) + 3 > shape_.max_tokens;
      const uint32_t count = left > 0 || is_full ? 0 : below(4) ? 1 : below(4);
      num_sampled_.push_back(static_cast<int32_t>(count));
      for (uint32_t n = 0; n < count; ++n) sampled_.push_back(static_cast<int32_t>(below(3)));
    }
    manager_.commit(batch_, sampled_, num_sampled_);
  }

  void fork() {
    if (static_cast<int32_t>(live_.size()) >= shape_.max_seqs) return free_some();
    if constexpr (kPins) {
      if (below(4) == 0) {
        quire::SequenceId children[2];
        manager_.fork(any(), children);
        live_.insert(live_.end(), children, children + 2);
        return;
      }
    }
    live_.push_back(manager_.fork(any()));
  }

  void truncate() {
    const quire::SequenceId seq = any();
    const int64_t num_tokens = view_.num_tokens(seq);
    const int64_t cut = below(4) ? below(4) : below(static_cast<uint32_t>(num_tokens));
    manager_.truncate(seq, std::max<int64_t>(1, num_tokens - cut));
  }

  void free_some() {
    for (uint32_t n = 1 + below(3); n > 0 && !live_.empty(); --n) {
      std::swap(live_[below(static_cast<uint32_t>(live_.size()))], live_.back());
      last_freed_ = live_.back();
      live_.pop_back();
      manager_.free({&last_freed_, 1});
    }
  }

  void retire() {
    const int64_t running = view_.batch().ticket() - retired_;
    if (shape_.async_depth == 0 || running <= 0) return;
    const int64_t ticket = retired_ + 1 + below(static_cast<uint32_t>(running));
    manager_.retire(ticket);
    retired_ = ticket;
  }

  // Some sequence leaves for host memory, or one that has left comes back.
  void swap() {
    if constexpr (requires { manager_.swap_out(live_[0]); }) {
      if (view_.stats().num_host_blocks == 0) return;
      const quire::SequenceId seq = any();
      if (view_.is_swapped_out(seq))
        manager_.swap_in(seq);
      else
        manager_.swap_out(seq);
    }
  }

  void misuse() {
    const quire::SequenceId twice[] = {live_[0], live_[0]};
    const int32_t one = 1, many = 1 << 30;
    switch (below(7)) {
      case 0:
        manager_.free(twice);
        break;
      case 1:
        manager_.free({&last_freed_, 1});
        break;
      case 2:
        manager_.step({&live_[0], 1}, {&many, 1});
        break;
      case 3:
        manager_.step(live_, {});
        break;
      case 4:
        manager_.truncate(live_[0], 0);
        break;
      case 5:
        manager_.commit({&live_[0], 1}, {&one, 1}, {&many, 1});
        break;
      default:
        manager_.retire(view_.batch().ticket() + 1);
    }
    throw quire::InvariantError("a wrong call was not refused");
  }

  Manager& manager_;
  const quire::KVCacheManager& view_;
  const Shape shape_;
  Source& source_;
  std::vector<quire::SequenceId> live_, batch_;
  std::vector<int32_t> counts_, sampled_, num_sampled_;
  std::vector<Pin> pinned_;
  quire::SequenceId last_freed_;
  int64_t retired_ = 0;
  int64_t num_refused_ = 0;
};

}  // namespace kv_traffic
