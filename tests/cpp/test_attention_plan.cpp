// SPDX-License-Identifier: Apache-2.0
// validate, plan and dispatch: pure functions, so every machine's decisions are tested here.
#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <tuple>

#include "quire/backend.h"
#include "quire/error.h"

using namespace quire;

namespace {

AttentionDesc paged_desc() {
  AttentionDesc desc;
  desc.num_heads = 8;
  desc.num_kv_heads = 2;
  desc.head_dim = 64;
  desc.block_size = 16;
  return desc;
}

// A paged batch with block ids 0, 1, 2, ... and garbage behind the used ones.
struct Paged {
  std::vector<int32_t> q_lens, seq_lens, cu_seqlens_q, block_table;
  int max_blocks = 0;

  Paged(std::vector<int32_t> q_lens_, std::vector<int32_t> seq_lens_, int block_size)
      : q_lens(std::move(q_lens_)), seq_lens(std::move(seq_lens_)), cu_seqlens_q{0} {
    for (int32_t q_len : q_lens) cu_seqlens_q.push_back(cu_seqlens_q.back() + q_len);
    for (int32_t length : seq_lens)
      max_blocks = std::max(max_blocks, (length + block_size - 1) / block_size);
    ++max_blocks;
    int32_t next = 0;
    for (int32_t length : seq_lens)
      for (int i = 0; i < max_blocks; ++i)
        block_table.push_back(i * block_size < length ? next++ : -7);
  }

  AttentionBatch batch() const {
    AttentionBatch batch;
    batch.batch_size = static_cast<int>(seq_lens.size());
    batch.seq_lens = seq_lens.data();
    batch.cu_seqlens_q = cu_seqlens_q.data();
    batch.block_table = block_table.data();
    batch.block_table_stride = max_blocks;
    batch.max_blocks = max_blocks;
    return batch;
  }
};

std::string refusal(auto&& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "(accepted)";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Units cover the items in order; items of one unit are the same rows for other kv heads, or read
// the same whole chunks, all visible to all of their rows.
void check_units(const AttentionDesc& desc, const AttentionPlan& plan) {
  int next = 0, shared = 0;
  for (const WorkUnit& unit : plan.units) {
    CHECK(unit.begin == next);
    REQUIRE(unit.end > unit.begin);
    next = unit.end;
    if (unit.end - unit.begin == 1) continue;
    const WorkItem& first = plan.items[unit.begin];
    if (plan.items[unit.begin + 1].kv_head != first.kv_head) {
      for (int i = unit.begin + 1; i < unit.end; ++i) {
        WorkItem item = plan.items[i];
        CHECK(item.kv_head == plan.items[i - 1].kv_head + 1);
        CHECK(std::tie(item.sequence, item.q_begin, item.q_end, item.kv_begin, item.kv_end) ==
              std::tie(first.sequence, first.q_begin, first.q_end, first.kv_begin, first.kv_end));
        CHECK((item.partial >= 0) == (first.partial >= 0));
      }
      continue;
    }
    shared += unit.end - unit.begin;
    for (int i = unit.begin; i < unit.end; ++i) {
      const WorkItem& item = plan.items[i];
      CHECK(std::tie(item.kv_head, item.kv_begin, item.kv_end) ==
            std::tie(first.kv_head, first.kv_begin, first.kv_end));
      CHECK(item.partial >= 0);
      CHECK(item.kv_end % kKvChunk == 0);
      const Sequence &s = plan.sequences[item.sequence], &t = plan.sequences[first.sequence];
      const int position = s.seq_len - s.q_len + item.q_begin;
      CHECK(item.kv_end <= (desc.causal ? position + 1 : s.seq_len));
      if (desc.window_left >= 0)
        CHECK(item.kv_begin >= s.seq_len - s.q_len + item.q_end - 1 - desc.window_left);
      for (int key = item.kv_begin; key < item.kv_end; key += desc.block_size)
        CHECK(plan.block_ids[s.kv_row + key / desc.block_size] ==
              plan.block_ids[t.kv_row + key / desc.block_size]);
    }
  }
  CHECK(next == static_cast<int>(plan.items.size()));
  CHECK(shared == plan.num_shared_items);
}

// Each (sequence, kv head, query row) has its visible keys covered exactly once, by items whose
// boundaries are chunk boundaries; partial slots are disjoint and all belong to a merge.
void check_plan(const AttentionDesc& desc, const AttentionPlan& plan) {
  using Row = std::tuple<int, int, int>;
  std::map<Row, std::vector<std::pair<int, int>>> ranges;
  std::map<int, int> items_of_merge;
  std::set<int> slots;
  for (const WorkItem& item : plan.items) {
    REQUIRE(item.kv_begin % kKvChunk == 0);
    REQUIRE(item.q_begin < item.q_end);
    for (int row = item.q_begin; row < item.q_end; ++row)
      ranges[{item.sequence, item.kv_head, row}].push_back({item.kv_begin, item.kv_end});
    CHECK((item.partial >= 0) == (item.merge >= 0));
    if (item.merge < 0) continue;
    ++items_of_merge[item.merge];
    const MergeItem& merge = plan.merges[item.merge];
    CHECK(std::tie(merge.sequence, merge.kv_head, merge.q_begin, merge.q_end) ==
          std::tie(item.sequence, item.kv_head, item.q_begin, item.q_end));
    CHECK((item.kv_end == plan.items[0].kv_end || item.kv_begin < item.kv_end));
    const int chunks = (item.kv_end - item.kv_begin + kKvChunk - 1) / kKvChunk;
    const int rows = (item.q_end - item.q_begin) * desc.num_heads / desc.num_kv_heads;
    const int taken = chunks * ((rows + plan.partial_rows - 1) / plan.partial_rows);
    for (int i = 0; i < taken; ++i) CHECK(slots.insert(item.partial + i).second);
  }
  CHECK(static_cast<int>(slots.size()) == plan.num_partials);
  check_units(desc, plan);
  for (size_t i = 0; i < plan.merges.size(); ++i)
    CHECK(items_of_merge[static_cast<int>(i)] == plan.merges[i].num_items);
  for (size_t b = 0; b < plan.sequences.size(); ++b) {
    const Sequence& s = plan.sequences[b];
    for (int head = 0; head < desc.num_kv_heads; ++head)
      for (int row = 0; row < s.q_len; ++row) {
        auto& parts = ranges[{static_cast<int>(b), head, row}];
        REQUIRE(!parts.empty());
        std::sort(parts.begin(), parts.end());
        for (size_t i = 1; i < parts.size(); ++i) CHECK(parts[i].first == parts[i - 1].second);
        const int position = s.seq_len - s.q_len + row;
        const int end = desc.causal ? std::min(s.seq_len, position + 1) : s.seq_len;
        const int begin = desc.window_left < 0 ? 0 : std::max(0, position - desc.window_left);
        if (begin < end) {
          CHECK(parts.front().first <= begin);
          CHECK(parts.back().second >= end);
        }
      }
  }
}

}  // namespace

TEST_CASE("a plan covers every visible key of every row once") {
  std::mt19937 rng(1);
  const auto pick = [&](std::initializer_list<int> values) {
    return values.begin()[rng() % values.size()];
  };
  for (int round = 0; round < 300; ++round) {
    AttentionDesc desc = paged_desc();
    desc.causal = rng() % 2;
    desc.window_left = pick({-1, -1, 0, 100, 700});
    desc.block_size = pick({1, 16, 300});
    std::vector<int32_t> q_lens, seq_lens;
    for (int b = rng() % 6; b > 0; --b) {
      q_lens.push_back(pick({0, 1, 1, 3, 40, 300}));
      seq_lens.push_back(pick({0, 1, 512, 513, 2000, 5000}));
    }
    const Paged paged(q_lens, seq_lens, desc.block_size);
    const PlanTraits traits{pick({1, 2, 16, 200}), pick({1, 4, 64, 384})};
    check_plan(desc, plan(desc, paged.batch(), traits));
  }
}

TEST_CASE("sequences that begin with the same blocks share units") {
  std::mt19937 rng(2);
  int64_t shared = 0, paying = 0;
  for (int round = 0; round < 200; ++round) {
    AttentionDesc desc = paged_desc();
    desc.block_size = round % 3 ? 16 : 60;
    desc.causal = rng() % 4 > 0;
    desc.window_left = rng() % 3 ? -1 : 900;
    std::vector<int32_t> q_lens, seq_lens;
    for (int b = 2 + rng() % 12; b > 0; --b) {
      q_lens.push_back(rng() % 4 ? 1 : 1 + rng() % 30);
      seq_lens.push_back(rng() % 5000);
    }
    Paged paged(q_lens, seq_lens, desc.block_size);
    for (size_t b = 1; b < seq_lens.size(); ++b) {  // like an earlier one for a while
      const int like = rng() % b;
      const int blocks = std::min(seq_lens[b], seq_lens[like]) / desc.block_size;
      const int count = blocks ? rng() % (blocks + 1) : 0;
      std::copy_n(&paged.block_table[like * paged.max_blocks], count,
                  &paged.block_table[b * paged.max_blocks]);
    }
    for (Sharing sharing : {Sharing::kAlways, Sharing::kWherePays}) {
      const PlanTraits traits{rng() % 2 ? 1 : 8, rng() % 2 ? 20 : 384, sharing};
      const AttentionPlan p = plan(desc, paged.batch(), traits);
      check_plan(desc, p);
      (sharing == Sharing::kAlways ? shared : paying) += p.num_shared_items;
    }
  }
  CHECK(paying > 0);
  CHECK(shared > paying);
}

TEST_CASE("a shared prefix becomes one unit a kv head, however the batch is ordered") {
  const AttentionDesc desc = paged_desc();
  for (bool backwards : {false, true}) {
    Paged paged(std::vector<int32_t>(9, 1), std::vector<int32_t>(9, 1100), 16);
    for (int b = 0; b < 9; ++b)  // the one in the middle is a stranger
      if (b != 4)
        for (int i = 0; i < 64; ++i)
          paged.block_table[b * paged.max_blocks + i] = backwards ? 5000 - i : 5000 + i;
    const AttentionPlan p = plan(desc, paged.batch(), {1, 384, Sharing::kWherePays});
    CHECK(p.num_shared_items == 2 * 8);    // of two kv heads
    REQUIRE(p.units.size() == 2 + 8 + 1);  // what is a sequence's own: both heads together
    CHECK(p.units[0].end - p.units[0].begin == 8);
    CHECK(p.items[0].kv_end == 1024);
    CHECK(p.merges.size() == 2 * 8);  // the stranger's item sees all it needs
    CHECK(plan(desc, paged.batch(), {1, 384}).num_shared_items == 0);
  }
}

TEST_CASE("a sequence alone is cut into chunks before its kv heads are") {
  const AttentionDesc desc = paged_desc();
  const Paged paged({1}, {8 * kKvChunk}, 16);
  const AttentionPlan few = plan(desc, paged.batch(), {2, 384, Sharing::kWherePays});
  REQUIRE(few.units.size() == 8);
  for (const WorkUnit& unit : few.units) CHECK(unit.end - unit.begin == 2);
  const AttentionPlan many = plan(desc, paged.batch(), {16, 384, Sharing::kWherePays});
  CHECK(many.units.size() == 16);
}

TEST_CASE("how rows are cut never moves a chunk boundary") {
  const AttentionDesc desc = paged_desc();
  const Paged paged({1}, {5000}, 16);
  const AttentionPlan one = plan(desc, paged.batch(), {1, 64});
  const AttentionPlan many = plan(desc, paged.batch(), {64, 64});
  CHECK(one.items.size() == 2);
  CHECK(one.merges.empty());
  CHECK(many.merges.size() == 2);
  CHECK(many.num_partials == 2 * 10);  // ten chunks of 512 a kv head
}

TEST_CASE("the longest work comes first") {
  const AttentionDesc desc = paged_desc();
  const Paged paged({1, 1, 1}, {100, 4000, 900}, 16);
  const AttentionPlan p = plan(desc, paged.batch(), {1, 64});
  REQUIRE(p.items.size() == 6);
  CHECK(p.items[0].sequence == 1);
  CHECK(p.items[5].sequence == 0);
}

TEST_CASE("a plan keeps nothing of the caller's arrays") {
  const AttentionDesc desc = paged_desc();
  Paged paged({1, 1}, {20, 40}, 16);
  const AttentionPlan p = plan(desc, paged.batch(), {1, 64});
  std::fill(paged.block_table.begin(), paged.block_table.end(), 12345);
  CHECK(p.block_ids == std::vector<int32_t>{0, 1, 2, 3, 4});
  CHECK(p.sequences[1].kv_row == 2);
  CHECK(p.max_block_id == 4);
}

TEST_CASE("flops and bytes count visible pairs") {
  AttentionDesc desc = paged_desc();
  const Paged paged({4}, {4}, 16);
  const AttentionPlan causal = plan(desc, paged.batch(), {1, 64});
  CHECK(causal.flops == 2 * (1 + 2 + 3 + 4) * 8 * 128);
  CHECK(causal.kv_bytes == 4 * 2 * 128 * 2);
  desc.causal = false;
  CHECK(plan(desc, paged.batch(), {1, 64}).flops == 2 * 16 * 8 * 128);
}

TEST_CASE("the longest of sequences is planned without overflow") {
  AttentionDesc desc = paged_desc();
  const int32_t seq_len = std::numeric_limits<int32_t>::max(), block = 0;
  desc.block_size = seq_len;
  AttentionBatch batch;
  batch.batch_size = batch.max_blocks = 1;
  batch.seq_lens = &seq_len;
  batch.block_table = &block;
  const AttentionPlan p = plan(desc, batch, {4, 64});
  int64_t keys = 0;
  for (const WorkItem& item : p.items) {
    CHECK(item.kv_begin < item.kv_end);
    keys += item.kv_end - item.kv_begin;
  }
  CHECK(keys == int64_t{seq_len} * desc.num_kv_heads);
  CHECK(p.num_partials == (1 << 22) * desc.num_kv_heads);
}

TEST_CASE("wrong batches are refused by name") {
  const AttentionDesc desc = paged_desc();
  Paged paged({1, 1}, {20, 40}, 16);
  const auto refused = [&] { return refusal([&] { plan(desc, paged.batch(), {1, 64}); }); };
  paged.seq_lens[1] = -1;
  CHECK(contains(refused(), "seq_lens[1]: expected a length >= 0, got -1"));
  paged.seq_lens[1] = 400;
  CHECK(contains(refused(), "block_table: expected at least 25 blocks a row"));
  paged.seq_lens[1] = 40;
  paged.block_table[4] = -3;
  CHECK(contains(refused(), "block_table[1, 0]: expected a block id >= 0, got -3"));
  paged.block_table[4] = 9;
  CHECK(refused() == "(accepted)");
  paged.cu_seqlens_q[2] = 0;
  CHECK(contains(refused(), "cu_seqlens_q[2]: expected at least 1"));
  paged.cu_seqlens_q[0] = 1;
  CHECK(contains(refused(), "cu_seqlens_q[0]: expected 0, got 1"));
}

TEST_CASE("wrong descriptions are refused by name") {
  const std::pair<const char*, void (*)(AttentionDesc&)> cases[] = {
      {"num_heads", [](AttentionDesc& d) { d.num_heads = 0; }},
      {"num_kv_heads: expected a divisor", [](AttentionDesc& d) { d.num_kv_heads = 3; }},
      {"head_dim", [](AttentionDesc& d) { d.head_dim = 0; }},
      {"block_size", [](AttentionDesc& d) { d.block_size = -1; }},
      {"window", [](AttentionDesc& d) { d.window_left = -2; }},
      {"softcap", [](AttentionDesc& d) { d.softcap = -1; }},
      {"scale", [](AttentionDesc& d) { d.scale = INFINITY; }},
      {"dtype", [](AttentionDesc& d) { d.dtype = DType::kInt32; }},
  };
  for (const auto& [expected, spoil] : cases) {
    AttentionDesc desc = paged_desc();
    validate(desc);
    spoil(desc);
    CHECK_MESSAGE(contains(refusal([&] { validate(desc); }), expected), expected);
  }
}

TEST_CASE("dispatch explains itself, for this machine and for others") {
  AttentionDesc desc = paged_desc();
  const DeviceInfo here = cpu_backend()->device_info(0);
  const Dispatch chosen = dispatch(desc, here);
  CHECK(chosen.backend == cpu_backend());
  CHECK(contains(chosen.explain(), "cpu." + here.isa + ": chosen"));

  desc.head_dim = 100000;
  const Dispatch none = dispatch(desc, here);
  CHECK(none.backend == nullptr);
  CHECK(contains(none.explain(), "head_dim"));
  CHECK_THROWS_AS(Attention{desc}, Unsupported);

  DeviceInfo gpu{{DeviceType::kCUDA, 0}, "sm_90", 132};
  if (!cuda_backend()) CHECK(contains(dispatch(paged_desc(), gpu).explain(), cuda_state()));
}

TEST_CASE("tensors are checked against the plan before any work") {
  AttentionDesc desc = paged_desc();
  desc.dtype = desc.kv_dtype = DType::kFloat32;
  const Paged paged({1, 1}, {20, 40}, 16);
  const Attention attention(desc);
  const AttentionPlan p = attention.plan(paged.batch());
  std::vector<float> q(2 * 8 * 64), out(q.size(), 1.0f), cache(5 * 16 * 2 * 64);
  AttentionTensors good;
  good.q = {q.data(), DType::kFloat32, {2, 8, 64}};
  good.out = {out.data(), DType::kFloat32, {2, 8, 64}};
  good.k = good.v = {cache.data(), DType::kFloat32, {5, 16, 2, 64}};
  const auto refused = [&](auto spoil) {
    AttentionTensors tensors = good;
    spoil(tensors);
    return refusal([&] { attention.run(p, tensors); });
  };
  CHECK(contains(refused([](auto& t) { t.q.shape[0] = 3; }),
                 "paged_attention: q: expected [2, 8, 64] float32, got [3, 8, 64] float32"));
  CHECK(contains(refused([](auto& t) { t.v.dtype = DType::kFloat16; }),
                 "v_cache: expected [5, 16, 2, 64] float32, got [5, 16, 2, 64] float16"));
  CHECK(contains(refused([](auto& t) { t.k.shape[0] = t.v.shape[0] = 4; }),
                 "block_table: expected block ids in [0, 4), got 4"));
  CHECK(contains(refused([](auto& t) { t.out.read_only = true; }), "out: expected writable"));
  CHECK(contains(refused([](auto& t) { t.out.strides[0] = 0; }), "distinct addresses"));
  CHECK(contains(refused([](auto& t) { t.k.strides[3] = 2; }), "contiguous last dimension"));
  CHECK(contains(refused([](auto& t) { t.q.data = t.q.template as<char>() + 1; }), "aligned"));
  CHECK(
      contains(refused([](auto& t) { t.v.data = nullptr; }), "v_cache: expected data, got a null"));
  CHECK(contains(refused([](auto& t) { t.q.ndim = 9; }), "got [2, 8, 64, 0, 0, 0, 0, 0, ...]"));
  CHECK(contains(refused([](auto& t) { t.k.shape[0] = t.v.shape[0] = -5; }), "k_cache: expected"));
  CHECK(contains(refused([&](auto& t) { t.lse = {q.data(), DType::kFloat32, {2, 8}}; }),
                 "lse: expected [8, 2] float32"));
  CHECK(contains(refused([](auto& t) { t.out.data = t.k.template as<float>() + 64; }),
                 "out: expected memory of its own, got memory that overlaps k_cache"));
  desc.num_kv_heads = 1;
  CHECK(contains(refusal([&] { Attention(desc).run(p, good); }),
                 "plan: expected one made for num_kv_heads 1, got 2"));
  CHECK(std::all_of(out.begin(), out.end(), [](float x) { return x == 1.0f; }));
  CHECK(refused([](auto&) {}) == "(accepted)");
}
