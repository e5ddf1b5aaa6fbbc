// SPDX-License-Identifier: Apache-2.0
// append_kv, copy_blocks and merge_states: what they write, and that they write nothing else.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "emulator/launch.h"
#include "kernels/cache_ops.h"

namespace quire::device {
namespace {

constexpr int kThreads = 128;

// [outer, rows, heads, dim], `gap` elements after each head.
struct Tensor {
  int rows, heads, dim, gap;
  std::vector<uint16_t> data;

  Tensor(int outer, int rows, int heads, int dim, int gap)
      : rows(rows), heads(heads), dim(dim), gap(gap), data(outer * rows * heads * (dim + gap)) {}
  CacheView view() {
    const int64_t head = dim + gap;
    return {data.data(), rows * heads * head, heads * head, head};
  }
  View<uint8_t> bytes() {
    const int64_t head = 2 * (dim + gap);
    return {reinterpret_cast<uint8_t*>(data.data()), rows * heads * head, heads * head, head};
  }
  uint16_t& at(int64_t outer, int row, int head, int column) {
    return *view().at(outer, row, head, column);
  }
  void fill(int start) {
    for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint16_t>(start + 7 * i);
  }
};

template <class Kernel, class... Arrays>
void run(Kernel kernel, Arrays&... arrays) {
  emulator::Options options;
  (options.global.allow(arrays.data(), arrays.size() * sizeof(arrays[0])), ...);
  const emulator::Report report = emulator::launch({3, kThreads, 16}, options, kernel);
  CHECK(report.error == "");
}

AppendArgs append_args(Tensor& k, Tensor& v, Tensor& k_cache, Tensor& v_cache,
                       const std::vector<int64_t>& slots) {
  AppendArgs args{};
  args.k = {k.view(), k_cache.view(), k.dim, {}, {}};
  args.v = {v.view(), v_cache.view(), v.dim, {}, {}};
  args.slot_mapping = slots.data();
  args.num_slots = 30;
  args.num_tokens = static_cast<int>(slots.size());
  args.num_heads = k.heads;
  args.block_size = k_cache.rows;
  args.is_aligned = k.gap == 0;
  return args;
}

TEST_CASE("append_kv writes its slots and nothing else") {
  for (int gap : {0, 3}) {
    const int dim = 64, dim_v = gap ? 37 : 32, heads = 2, block_size = 5;
    Tensor k(6, 1, heads, dim, gap), v(6, 1, heads, dim_v, gap);
    Tensor k_cache(6, block_size, heads, dim, gap), v_cache(6, block_size, heads, dim_v, gap);
    k.fill(1), v.fill(2), k_cache.fill(30000), v_cache.fill(40000);
    std::vector<int64_t> slots = {17, -1, 0, 29, 30, int64_t{1} << 40};
    Tensor k_expected = k_cache, v_expected = v_cache;
    for (int t = 0; t < 4; ++t)  // the last two slots are out of range
      for (int head = 0; head < heads && slots[t] >= 0; ++head) {
        const int64_t block = slots[t] / block_size, row = slots[t] % block_size;
        for (int d = 0; d < dim; ++d) k_expected.at(block, row, head, d) = k.at(t, 0, head, d);
        for (int d = 0; d < dim_v; ++d) v_expected.at(block, row, head, d) = v.at(t, 0, head, d);
      }
    const AppendArgs args = append_args(k, v, k_cache, v_cache, slots);
    run([&] { append_kv<Float16, kThreads>(args); }, k.data, v.data, k_cache.data, v_cache.data,
        slots);
    CHECK(k_cache.data == k_expected.data);
    CHECK(v_cache.data == v_expected.data);
  }
}

// What a rope makes of a row, in float32 and rounded once.
template <class Type>
std::vector<uint16_t> turned(const uint16_t* row, int dim, const float* cos_sin, int rotary_dim,
                             bool is_interleaved) {
  std::vector<uint16_t> out(row, row + dim);
  for (int pair = 0; pair < rotary_dim / 2; ++pair) {
    const int a = is_interleaved ? 2 * pair : pair;
    const int b = is_interleaved ? 2 * pair + 1 : pair + rotary_dim / 2;
    float low = emulator::widen<Type>(row[a]), high = emulator::widen<Type>(row[b]);
    rotate(low, high, cos_sin[pair], cos_sin[rotary_dim / 2 + pair]);
    out[a] = emulator::narrow<Type>(low);
    out[b] = emulator::narrow<Type>(high);
  }
  return out;
}

TEST_CASE_TEMPLATE("a rope turns keys on their way, and queries in place", Type, Float16,
                   BFloat16) {
  for (const int rotary_dim : {64, 48, 20, 2})
    for (const bool is_interleaved : {false, true})
      for (const int gap : {0, 3}) {
        const int dim = 64, heads = 2, tokens = 5, max_position = 7;
        Tensor k(tokens, 1, heads, dim, gap), v = k, k_cache(6, 5, heads, dim, gap);
        Tensor v_cache = k_cache;
        for (size_t i = 0; i < k.data.size(); ++i)
          k.data[i] = emulator::narrow<Type>(std::sin(static_cast<float>(3 * i)));
        std::vector<float> table(max_position * rotary_dim);
        for (size_t i = 0; i < table.size(); ++i) table[i] = std::cos(static_cast<float>(i));
        std::vector<int32_t> positions = {6, 0, 3, 7, -1};  // the last two are out of range
        std::vector<int64_t> slots = {4, 11, 29, 2, 3};
        AppendArgs args = append_args(k, v, k_cache, v_cache, slots);
        args.cos_sin = table.data();
        args.cos_sin_stride = rotary_dim;
        args.positions = positions.data();
        args.max_position = max_position;
        args.rotary_dim = rotary_dim;
        args.is_interleaved = is_interleaved;
        Tensor expected = k_cache, in_place = k;
        for (int t = 0; t < 3; ++t)
          for (int head = 0; head < heads; ++head) {
            const auto row =
                turned<Type>(&k.at(t, 0, head, 0), dim, &table[positions[t] * rotary_dim],
                             rotary_dim, is_interleaved);
            for (int d = 0; d < dim; ++d) {
              expected.at(slots[t] / 5, static_cast<int>(slots[t] % 5), head, d) = row[d];
              in_place.at(t, 0, head, d) = row[d];
            }
          }
        run([&] { append_kv<Type, kThreads>(args); }, k.data, v.data, k_cache.data, v_cache.data,
            slots, table, positions);
        CHECK(k_cache.data == expected.data);
        args.k.cache = args.k.from;
        args.v.dim = 0;
        args.slot_mapping = nullptr;
        args.block_size = 1;
        run([&] { append_kv<Type, kThreads>(args); }, k.data, table, positions);
        CHECK(k.data == in_place.data);
      }
}

TEST_CASE("floats become codes like the reference says") {
  for (uint64_t i = 0; i < uint64_t{1} << 32; i += 9973) {
    const auto x = std::bit_cast<float>(static_cast<uint32_t>(i));
    const uint8_t expected = emulator::narrow_e4m3(x);
    if ((expected & 127) == 127) {
      CHECK((narrow_e4m3(x) & 127) == 127);
    } else {
      CHECK(narrow_e4m3(x) == expected);
    }
  }
  for (int code = 0; code < 127; ++code) {  // ties between a code and the next
    const auto value = [](int c) {
      return emulator::widen_float16(emulator::widen_e4m3(static_cast<uint8_t>(c)));
    };
    CHECK(narrow_e4m3(value(code)) == static_cast<uint32_t>(code));
    if (code < 126)
      CHECK(narrow_e4m3((value(code) + value(code + 1)) / 2) ==
            static_cast<uint32_t>(code + code % 2));
  }
}

// A cache of codes and the scales of its tokens.
struct Codes {
  std::vector<uint8_t> data;
  std::vector<float> scales;
  AppendArgs::Side side(Tensor& from, int block_size, bool is_per_token) {
    const int64_t head = from.dim + from.gap;
    const int64_t heads = from.heads;
    return {from.view(),
            {},
            from.dim,
            {data.data(), block_size * heads * head, heads * head, head},
            {scales.data(), is_per_token ? block_size * heads : 0, is_per_token ? heads : 0, 1,
             1.0f, is_per_token}};
  }
};

TEST_CASE_TEMPLATE("append_kv_e4m3 divides, rounds and leaves the scales", Type, Float16,
                   BFloat16) {
  for (const bool is_per_token : {false, true})
    for (const int rotary_dim : {0, 64, 20})
      for (const bool is_interleaved : {false, true})
        for (const int gap : {0, 3}) {
          const int dim = 136, heads = 2, tokens = 5, block_size = 5, max_position = 7;
          Tensor k(tokens, 1, heads, dim, gap), v = k;
          for (size_t i = 0; i < k.data.size(); ++i) {
            k.data[i] = emulator::narrow<Type>(std::sin(static_cast<float>(3 * i)));
            v.data[i] = emulator::narrow<Type>(9 * std::cos(static_cast<float>(i)));
          }
          for (int d = 0; d < dim; ++d) v.at(1, 0, 1, d) = 0;
          std::vector<float> table(max_position * 64);
          for (size_t i = 0; i < table.size(); ++i) table[i] = std::cos(static_cast<float>(i));
          std::vector<int32_t> positions = {6, 0, 3, 2, 1};
          std::vector<int64_t> slots = {4, 11, 29, -1, 30};
          Codes k_codes, v_codes;
          for (Codes* codes : {&k_codes, &v_codes}) {
            codes->data.assign(6 * block_size * heads * (dim + gap), 0x55);
            codes->scales.assign(is_per_token ? 6 * block_size * heads : heads, 0.125f);
          }
          Codes expected[] = {k_codes, v_codes};
          for (int t = 0; t < 3; ++t)
            for (int head = 0; head < heads; ++head)
              for (int side = 0; side < 2; ++side) {
                std::vector<float> row(dim);
                const uint16_t* from = &(side ? v : k).at(t, 0, head, 0);
                for (int d = 0; d < dim; ++d) row[d] = emulator::widen<Type>(from[d]);
                const float* angles = &table[positions[t] * 64];
                for (int pair = 0; side == 0 && pair < rotary_dim / 2; ++pair)
                  rotate(row[is_interleaved ? 2 * pair : pair],
                         row[is_interleaved ? 2 * pair + 1 : pair + rotary_dim / 2], angles[pair],
                         angles[rotary_dim / 2 + pair]);
                float top = 0;
                for (const float x : row) top = std::max(top, std::fabs(x));
                const int64_t place = slots[t] * heads + head;
                if (is_per_token) expected[side].scales[place] = std::max(top / 448.0f, 0x1p-126f);
                const float scale = expected[side].scales[is_per_token ? place : head];
                for (int d = 0; d < dim; ++d)
                  expected[side].data[place * (dim + gap) + d] =
                      emulator::narrow_e4m3(row[d] / scale);
              }
          Tensor unused(6, block_size, heads, dim, gap);
          AppendArgs args = append_args(k, v, unused, unused, slots);
          args.k = k_codes.side(k, block_size, is_per_token);
          args.v = v_codes.side(v, block_size, is_per_token);
          args.cos_sin = table.data();
          args.cos_sin_stride = 64;
          args.positions = positions.data();
          args.max_position = max_position;
          args.rotary_dim = rotary_dim;
          args.is_interleaved = is_interleaved;
          run([&] { append_kv_e4m3<Type, kThreads>(args); }, k.data, v.data, k_codes.data,
              v_codes.data, k_codes.scales, v_codes.scales, slots, table, positions);
          CHECK(k_codes.data == expected[0].data);
          CHECK(v_codes.data == expected[1].data);
          CHECK(k_codes.scales == expected[0].scales);
          CHECK(v_codes.scales == expected[1].scales);
        }
}

TEST_CASE("copy_blocks") {
  for (int gap : {0, 1}) {
    const int dim = 40, heads = 3, block_size = 4;
    Tensor k_cache(6, block_size, heads, dim, gap), v_cache = k_cache;
    k_cache.fill(1), v_cache.fill(2);
    std::vector<int32_t> pairs = {0, 5, 0, 3, 2, 1};
    Tensor k_expected = k_cache, v_expected = v_cache;
    for (int i = 0; i < 3; ++i)
      for (int row = 0; row < block_size; ++row)
        for (int head = 0; head < heads; ++head)
          for (int d = 0; d < dim; ++d) {
            k_expected.at(pairs[2 * i + 1], row, head, d) = k_cache.at(pairs[2 * i], row, head, d);
            v_expected.at(pairs[2 * i + 1], row, head, d) = v_cache.at(pairs[2 * i], row, head, d);
          }
    const CopyBlocksArgs args{{k_cache.bytes(), k_cache.bytes(), 2 * dim},
                              {v_cache.bytes(), v_cache.bytes(), 2 * dim},
                              pairs.data(),
                              3,
                              heads,
                              block_size,
                              gap == 0};
    run([&] { copy_blocks<kThreads>(args); }, k_cache.data, v_cache.data, pairs);
    CHECK(k_cache.data == k_expected.data);
    CHECK(v_cache.data == v_expected.data);
  }
}

TEST_CASE_TEMPLATE("merge_states joins what attention over parts has left", Type, Float16,
                   BFloat16) {
  const int states = 3, rows = 5, heads = 2, dim = 24;
  Tensor outs(states, rows, heads, dim, 0), out(1, rows, heads, dim, 0);
  std::vector<float> lses(states * heads * rows), lse(heads * rows);
  for (size_t i = 0; i < outs.data.size(); ++i)
    outs.data[i] = emulator::narrow<Type>(std::sin(static_cast<float>(i)));
  for (size_t i = 0; i < lses.size(); ++i) lses[i] = 3 * std::cos(static_cast<float>(i));
  const auto lse_at = [&](int state, int head, int row) -> float& {
    return lses[(state * heads + head) * rows + row];
  };
  for (int row = 0; row < rows; ++row) {  // state 1 is empty and holds NaN; row 2, head 0 has none
    for (int head = 0; head < heads; ++head) {
      lse_at(1, head, row) = -INFINITY;
      for (int d = 0; d < dim; ++d) outs.at(1, row, head, d) = 0xFFFF;
    }
  }
  for (int state = 0; state < states; ++state) lse_at(state, 0, 2) = -INFINITY;
  const MergeStatesArgs args{outs.view(), lses.data(), heads * rows, rows, 1,
                             out.view(),  lse.data(),  rows,         1,    states,
                             rows,        heads,       dim,          true};
  run([&] { merge_states<Type, kThreads>(args); }, outs.data, out.data, lses, lse);
  for (int row = 0; row < rows; ++row)
    for (int head = 0; head < heads; ++head) {
      double sum = 0;
      for (int state = 0; state < states; ++state) sum += std::exp(lse_at(state, head, row));
      if (sum == 0)
        CHECK(lse[head * rows + row] == -INFINITY);
      else
        CHECK(lse[head * rows + row] == doctest::Approx(std::log(sum)).epsilon(1e-5));
      for (int d = 0; d < dim; ++d) {
        double exact = 0;
        for (int state = 0; state < states; state += 2)
          exact += std::exp(lse_at(state, head, row)) *
                   emulator::widen<Type>(outs.at(state, row, head, d)) / (sum > 0 ? sum : 1);
        const double got = emulator::widen<Type>(out.at(0, row, head, d));
        CHECK(std::fabs(got - exact) <= (Type::is_bfloat16 ? 4e-3 : 5e-4));
      }
    }
}

}  // namespace
}  // namespace quire::device
