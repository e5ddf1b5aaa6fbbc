// SPDX-License-Identifier: Apache-2.0
// Block: the threads of one CUDA thread block as fibers, one running at a time.
//
// Collectives are rendezvous points: lanes park there, the last to arrive does the work for all
// and checks that all came for the same operation at the same source line. Who runs next is drawn
// from a seeded generator, so a run can be repeated exactly.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "emulator/async.h"
#include "emulator/fiber.h"
#include "emulator/hopper.h"
#include "emulator/memory.h"
#include "emulator/site.h"

namespace quire::emulator {

struct Options {
  AsyncMode async = AsyncMode::kLazy;
  uint32_t seed = 1;
  bool check_races = true;
  GlobalMemory global;
};

struct Report {
  std::string error;  // empty: the run was clean
  uint64_t collectives = 0;
  uint64_t ldmatrix = 0;            // 8 x 8 matrices read
  uint64_t ldmatrix_conflicts = 0;  // extra passes because rows lay in the same banks
  uint64_t boxes = 0;               // that bulk copies have brought

  bool ok() const { return error.empty(); }
};

class Block {
 public:
  static constexpr int kWarpSize = 32;

  Block(int index, int grid_size, int num_threads, size_t shared_bytes, const Options& options,
        FiberStacks& stacks, Report& report, const std::function<void()>& kernel)
      : index_(index),
        grid_size_(grid_size),
        options_(options),
        report_(report),
        kernel_(kernel),
        random_(options.seed * 2654435761u + index),
        threads_(num_threads),
        arrived_lanes_(num_threads / kWarpSize),
        shared_(num_threads, shared_bytes, options.check_races) {
    hopper_.groups.resize(num_threads / kGroupThreads);
    for (int i = 0; i < num_threads; ++i) {
      threads_[i].id = i;
      threads_[i].fiber.prepare(stacks.stack(i), FiberStacks::kStackSize, &Block::enter);
    }
  }

  static Block& current() { return *current_block(); }

  // Runs all threads to their end, or to the first error, which is in the report then.
  void run() {
    current_block() = this;
    while (report_.ok()) {
      Thread* next = choose();
      if (!next) break;
      resume(scheduler_, *next);
    }
    current_block() = nullptr;
  }

  int index() const { return index_; }
  int grid_size() const { return grid_size_; }
  int num_threads() const { return static_cast<int>(threads_.size()); }
  int thread() const { return running_->id; }
  Report& report() { return report_; }
  uint8_t* shared() { return shared_.data(); }

  // Records the error and ends the run: nothing of this block runs again.
  [[noreturn]] void fail(const std::string& what) {
    const Thread& t = *running_;
    report_.error = "block " + std::to_string(index_) + " thread " + std::to_string(t.id) +
                    " (warp " + std::to_string(t.id / kWarpSize) + " lane " +
                    std::to_string(t.id % kWarpSize) + "), " + describe(t) + ": " + what;
    running_->fiber.switch_to(scheduler_.fiber, true);
    __builtin_unreachable();
  }

  // The running thread is about to do `op`: what an error message will say.
  void at(const char* op, Site site) {
    running_->op = op;
    running_->site = site;
  }

  void check_shared(int thread, uint32_t address, uint32_t bytes, uint32_t alignment, bool write) {
    const std::string error = shared_.check(thread, address, bytes, alignment, write);
    if (!error.empty()) fail(error);
  }

  void check_global(const void* pointer, size_t bytes, size_t alignment) {
    const std::string error = options_.global.check(pointer, bytes, alignment);
    if (!error.empty()) fail(error);
  }

  // run(Argument* (&)[32]) is called once, with what each lane of the warp gave.
  template <class Argument, class Run>
  void warp_collective(const char* op, Site site, Argument& argument, Run run) {
    at(op, site);
    Thread& me = *running_;
    const int warp = me.id / kWarpSize;
    me.argument = &argument;
    arrived_lanes_[warp] |= 1u << (me.id % kWarpSize);
    if (arrived_lanes_[warp] != ~0u) return park(State::kParked);
    Argument* arguments[kWarpSize];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Thread& t = threads_[warp * kWarpSize + lane];
      if (t.op != op || t.site != site)
        fail("the warp has diverged: lane " + std::to_string(lane) + " is at " + describe(t));
      arguments[lane] = static_cast<Argument*>(t.argument);
    }
    run(arguments);
    ++report_.collectives;
    arrived_lanes_[warp] = 0;
    for (int lane = 0; lane < kWarpSize; ++lane)
      threads_[warp * kWarpSize + lane].state = State::kReady;
  }

  void sync_warp(Site site) {
    int nothing = 0;
    warp_collective("sync_warp", site, nothing, [this](auto&) {
      const int begin = thread() / kWarpSize * kWarpSize;
      shared_.races().synchronize(begin, begin + kWarpSize, ~0u);
    });
  }

  void sync_block(Site site) {
    at("sync_block", site);
    if (++num_at_barrier_ < num_threads()) return park(State::kParked);
    for (const Thread& t : threads_)
      if (t.site != site) fail("the block has diverged: another thread is at " + describe(t));
    shared_.races().synchronize(0, num_threads(), ~0u);
    ++report_.collectives;
    num_at_barrier_ = 0;
    for (Thread& t : threads_) t.state = State::kReady;
  }

  // Of `count` threads, whichever they are and whether they wait for the others or not.
  void sync_named(int id, int count, bool waits, Site site) {
    at(waits ? "bar.sync" : "bar.arrive", site);
    NamedBarrier& barrier = hopper_.named[id];
    if (const char* error = barrier.arrive(thread(), count, waits)) fail(error);
    shared_.races().release(thread(), barrier.arriving);
    if (barrier.arrived < count) return waits ? park(State::kParked) : void();
    const NamedBarrier complete = std::exchange(barrier, {});
    for (int waiting : complete.waiting) {
      shared_.races().acquire(waiting, complete.arriving);
      threads_[waiting].state = State::kReady;
    }
  }

  // run(Argument* (&)[128], group) is called once, with what each thread of the warpgroup gave.
  template <class Argument, class Run>
  void group_collective(const char* op, Site site, Argument& argument, Run run) {
    at(op, site);
    Thread& me = *running_;
    const int index = me.id / kGroupThreads;
    me.argument = &argument;
    Warpgroup& group = hopper_.groups[index];
    if (++group.arrived < kGroupThreads) return park(State::kParked);
    group.arrived = 0;
    Argument* arguments[kGroupThreads];
    for (int i = 0; i < kGroupThreads; ++i) {
      const Thread& t = threads_[index * kGroupThreads + i];
      if (t.op != op || t.site != site)
        fail("the warpgroup has diverged: thread " + std::to_string(t.id) + " is at " +
             describe(t));
      arguments[i] = static_cast<Argument*>(t.argument);
    }
    run(arguments, group);
    ++report_.collectives;
    for (int i = 0; i < kGroupThreads; ++i)
      threads_[index * kGroupThreads + i].state = State::kReady;
  }

  // Whether something in flight happens now, where it may.
  bool happens_now() {
    return options_.async == AsyncMode::kEager ||
           (options_.async == AsyncMode::kRandom && random_() % 2 == 0);
  }

  void init_mbarrier(uint32_t address, uint32_t count) {
    check_shared(thread(), address, 8, 8, true);
    const char* error = hopper_.init_mbarrier(address, count, thread());
    if (error) fail(error);
  }
  void fence_mbarriers() { hopper_.fence_mbarriers(thread()); }

  void arrive(uint32_t address, uint32_t bytes) {
    Mbarrier& barrier = mbarrier(address);
    if (barrier.arrived == barrier.count) fail("more arrivals than the mbarrier expects");
    shared_.races().release(thread(), barrier.arriving);
    ++barrier.arrived;
    barrier.missing_bytes += bytes;
    complete_phase(address, barrier);
  }

  // Until the phase of `parity` is complete.
  void wait_mbarrier(uint32_t address, bool parity) {
    Mbarrier& barrier = mbarrier(address);
    while (barrier.parity == parity) {
      running_->mbarrier = address;
      park(State::kAtMbarrier);
    }
    shared_.races().acquire(thread(), barrier.completed);
  }

  // A copy that `land` performs, of `bytes` bytes to `destination`.
  void copy_bulk(uint32_t destination, uint32_t bytes, uint32_t address,
                 std::function<void()> land) {
    Mbarrier& barrier = mbarrier(address);
    if (!barrier.is_fenced) fail("the mbarrier's initialisation is not fenced for copies");
    const std::string error = shared_.check_bulk(barrier.agent, thread(), destination, bytes);
    if (!error.empty()) fail(error);
    shared_.set_in_flight(thread(), destination, bytes, true);
    std::memset(shared() + destination, kPoison, bytes);
    ++report_.boxes;
    const int issuer = thread();
    hopper_.bulk.pending.push_back(
        [this, issuer, destination, bytes, address, land = std::move(land)] {
          shared_.set_in_flight(issuer, destination, bytes, false);
          land();
          Mbarrier& to = hopper_.mbarriers[address];
          shared_.races().release_agent(to.agent, to.arriving);
          to.missing_bytes -= bytes;
          complete_phase(address, to);
        });
    if (happens_now()) hopper_.bulk.land_any(hopper_.bulk.pending.size() - 1);
  }

  void check_product(int first_thread, uint32_t address) {
    const std::string error = shared_.check_product(first_thread, address);
    if (!error.empty()) fail(error);
  }
  void check_registers() {
    if (!hopper_.registers_are_there(num_threads()))
      fail("setmaxnreg asks for more registers than there are");
  }
  void fence_proxy() { shared_.fence_proxy(thread()); }

  void copy_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t valid) {
    check_shared(thread(), destination, bytes, bytes, true);
    if (valid > 0) check_global(source, bytes, bytes);
    shared_.set_in_flight(thread(), destination, bytes, true);
    running_->copies.issue(shared(), {destination, source, bytes, valid, false}, options_.async,
                           random_);
  }

  void commit_copies() { running_->copies.commit(); }

  void wait_copies(size_t allowed) {
    running_->copies.wait(shared(), allowed, [this](const AsyncCopies::Copy& copy) {
      shared_.set_in_flight(thread(), copy.destination, copy.bytes, false);
      shared_.wrote(thread(), copy.destination, copy.bytes);
    });
  }

  // Stores that other blocks are to see must be fenced by the thread that made them, before the
  // block announces them by an atomic.
  void stored_global() { running_->has_unfenced_stores = true; }
  void fence_global() { running_->has_unfenced_stores = false; }
  void announce() {
    for (const Thread& t : threads_)
      if (t.has_unfenced_stores)
        fail("global stores of thread " + std::to_string(t.id) + " are not fenced");
  }

 private:
  enum class State : uint8_t { kReady, kParked, kAtMbarrier, kDone };

  struct Thread {
    Fiber fiber;
    int id = 0;
    State state = State::kReady;
    const char* op = "start";
    Site site;
    void* argument = nullptr;  // of the collective that it waits in
    uint32_t mbarrier = 0;     // that it waits for
    bool has_unfenced_stores = false;
    AsyncCopies copies;
  };

  static Block*& current_block() {
    thread_local Block* block = nullptr;
    return block;
  }

  static std::string describe(const Thread& t) {
    return std::string(t.op) + " at " + t.site.file_name() + ":" + std::to_string(t.site.line);
  }

  static void enter() {
    Block& block = current();
    Fiber::entered(block.previous_->fiber);
    block.kernel_();
    if (!block.running_->copies.idle()) block.fail("the thread ends with copies in flight");
    if (block.hopper_.has_products(block.thread()))
      block.fail("the thread ends with products in flight");
    block.running_->state = State::kDone;
    block.leave(true);
    __builtin_unreachable();
  }

  Mbarrier& mbarrier(uint32_t address) {
    check_shared(thread(), address, 8, 8, false);
    const auto found = hopper_.mbarriers.find(address);
    if (found == hopper_.mbarriers.end()) fail("no mbarrier at " + std::to_string(address));
    return found->second;
  }

  void complete_phase(uint32_t address, Mbarrier& barrier) {
    if (!barrier.is_complete()) return;
    barrier.completed = barrier.arriving;
    barrier.arrived = 0;
    barrier.parity = !barrier.parity;
    for (Thread& t : threads_)
      if (t.state == State::kAtMbarrier && t.mbarrier == address) t.state = State::kReady;
  }

  void resume(Thread& from, Thread& next, bool last = false) {
    previous_ = &from;
    running_ = &next;
    from.fiber.switch_to(next.fiber, last);
  }

  void park(State state) {
    running_->state = state;
    leave(false);
  }

  // Goes on with another lane of the same warp, else with the scheduler.
  void leave(bool last) {
    Thread& me = *running_;
    Thread* next = ready_lane(me.id / kWarpSize);
    resume(me, next ? *next : scheduler_, last);
  }

  Thread* ready_lane(int warp) {
    const int start = static_cast<int>(random_() % kWarpSize);
    for (int i = 0; i < kWarpSize; ++i) {
      Thread& t = threads_[warp * kWarpSize + (start + i) % kWarpSize];
      if (t.state == State::kReady) return &t;
    }
    return nullptr;
  }

  // Null when all are done; none ready but not all done is a deadlock.
  Thread* choose() {
    BulkCopies& bulk = hopper_.bulk;
    if (!bulk.pending.empty() && happens_now()) bulk.land_any(random_());
    const int num_warps = num_threads() / kWarpSize;
    const int start = static_cast<int>(random_() % num_warps);
    for (int i = 0; i < num_warps; ++i)
      if (Thread* t = ready_lane((start + i) % num_warps)) return t;
    if (!bulk.pending.empty()) {  // as late as it can be
      bulk.land_any(random_());
      return choose();
    }
    for (const Thread& t : threads_)
      if (t.state != State::kDone) report_deadlock();
    return nullptr;
  }

  void report_deadlock() {
    report_.error = "block " + std::to_string(index_) + ": deadlock:";
    for (const Thread& t : threads_)
      if (t.id % kWarpSize == 0 || t.op != threads_[t.id - 1].op)
        report_.error += " [thread " + std::to_string(t.id) + " " +
                         (t.state == State::kDone ? "has ended" : describe(t)) + "]";
  }

  int index_;
  int grid_size_;
  const Options& options_;
  Report& report_;
  const std::function<void()>& kernel_;
  std::minstd_rand random_;
  std::vector<Thread> threads_;
  std::vector<uint32_t> arrived_lanes_;  // by warp
  int num_at_barrier_ = 0;
  SharedMemory shared_;
  HopperState hopper_;
  Thread scheduler_;  // stands for whoever called run()
  Thread* running_ = nullptr;
  Thread* previous_ = nullptr;
};

}  // namespace quire::emulator
