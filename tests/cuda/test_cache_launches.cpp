// SPDX-License-Identifier: Apache-2.0
// The CUDA backend over a driver that only pretends: what operations on caches launch, and what
// they refuse.
#include <doctest/doctest.h>

#include "backend_setup.h"

namespace quire::cuda {
namespace {

TensorView on_gpu(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view(data, dtype, shape);
  view.device = kGpu;
  return view;
}

TEST_CASE("append_kv: slots from the host, positions from the device, a rope") {
  Setup s;
  Seen<device::AppendArgs> seen(s.driver);
  alignas(16) static uint16_t memory[1 << 16];
  int64_t slots[] = {5, -1, 5, 12, 5, 0};  // every other one
  int32_t positions[3];
  float table[10 * 32];
  TensorView slot_view(slots, DType::kInt64, {3});
  slot_view.strides[0] = 2;
  const TensorView k = on_gpu(memory, DType::kFloat16, {3, 2, 64});
  const TensorView cache = on_gpu(memory + 4096, DType::kFloat16, {7, 16, 2, 64});
  Rope rope{on_gpu(table, DType::kFloat32, {10, 32}), on_gpu(positions, DType::kInt32, {3}), true};
  s.backend().append_kv(k, k, cache, cache, slot_view, &rope, {}, {kGpu, kStream});
  REQUIRE(seen.all.size() == 1);
  const device::AppendArgs& args = seen.all[0];
  CHECK(s.driver.launches[0].kernel == "append_kv_Float16_128");
  CHECK(s.driver.launches[0].blocks == 1);
  CHECK(args.slot_mapping[0] == 5);
  CHECK(args.slot_mapping[1] == 5);
  CHECK(args.slot_mapping[2] == 5);
  CHECK(args.num_slots == 112);
  CHECK(args.positions == positions);
  CHECK(args.rotary_dim == 32);
  CHECK(args.max_position == 10);
  CHECK(args.is_interleaved);
  CHECK(args.is_aligned);
  CHECK(args.k.cache.stride_outer == 16 * 2 * 64);
  CHECK(args.k.from.stride_outer == 128);
  s.driver.capture = 1;
  CHECK_THROWS_AS(
      s.backend().append_kv(k, k, cache, cache, slot_view, nullptr, {}, {kGpu, kStream}),
      InvalidArgument);
  const TensorView on_device = on_gpu(slots, DType::kInt64, {3});
  s.backend().append_kv(k, k, cache, cache, on_device, nullptr, {}, {kGpu, kStream});
  CHECK(seen.all.back().slot_mapping == slots);
  CHECK(s.driver.count("cuMemcpyHtoDAsync") == 1);
}

TEST_CASE("append_kv to codes: scales of every kind") {
  Setup s;
  Seen<device::AppendArgs> seen(s.driver);
  alignas(16) static uint16_t memory[1 << 16];
  alignas(4) static float scales[7 * 16 * 2];
  int64_t slots[] = {5, 0, 7};
  const TensorView slot_view = on_gpu(slots, DType::kInt64, {3});
  const TensorView k = on_gpu(memory, DType::kBFloat16, {3, 2, 64});
  const TensorView cache = on_gpu(memory + 4096, DType::kFloat8E4M3, {7, 16, 2, 64});
  float number = 0.5f;
  const KvScales given = {TensorView(&number, DType::kFloat32, {1}),
                          on_gpu(scales, DType::kFloat32, {7, 16, 2})};
  s.backend().append_kv(k, k, cache, cache, slot_view, nullptr, given, {kGpu, kStream});
  REQUIRE(seen.all.size() == 1);
  const device::AppendArgs& args = seen.all[0];
  CHECK(s.driver.launches[0].kernel == "append_kv_e4m3_BFloat16_128");
  CHECK(args.k.scale.value == 0.5f);
  CHECK(!args.k.scale.is_per_token);
  CHECK(args.v.scale.is_per_token);
  CHECK(args.v.scale.stride_block == 32);
  CHECK(args.v.codes.stride_row == 128);
  CHECK(args.is_aligned);
  const TensorView heads = on_gpu(scales, DType::kFloat32, {2});
  s.backend().append_kv(k, k, cache, cache, slot_view, nullptr, {{}, heads}, {kGpu, kStream});
  CHECK(seen.all[1].k.scale.value == 1.0f);
  CHECK(seen.all[1].v.scale.stride_head == 1);
  CHECK(!seen.all[1].v.scale.is_per_token);
  const TensorView bytes = on_gpu(memory + 4096, DType::kInt8, {7, 16, 2, 64});
  CHECK_THROWS_AS(
      s.backend().append_kv(k, k, bytes, bytes, slot_view, nullptr, {}, {kGpu, kStream}),
      Unsupported);
}

TEST_CASE("caches of any type are copied as bytes") {
  Setup s;
  Seen<device::CopyBlocksArgs> seen(s.driver);
  static float memory[1 << 14];
  const TensorView cache = on_gpu(memory, DType::kFloat32, {8, 4, 2, 24});
  int32_t pairs[] = {1, 2, 3, 4};
  s.backend().copy_blocks(cache, cache, TensorView(pairs, DType::kInt32, {2, 2}), {kGpu, nullptr});
  CHECK(seen.all[0].k.dim == 96);
  CHECK(seen.all[0].k.from.stride_outer == 4 * 4 * 2 * 24);
  CHECK(seen.all[0].pairs[3] == 4);
  CHECK(seen.all[0].num_pairs == 2);
  const TensorView rows = on_gpu(memory, DType::kFloat32, {2, 2, 24});
  const TensorView lses = on_gpu(memory, DType::kFloat32, {1, 2, 2});
  const TensorView outs = on_gpu(memory, DType::kFloat32, {1, 2, 2, 24});
  CHECK_THROWS_AS(s.backend().merge_states(outs, lses, rows, {}, {kGpu, nullptr}), Unsupported);
}

TEST_CASE("swap_blocks reaches pinned host memory and refuses other") {
  Setup s;
  Seen<device::CopyBlocksArgs> seen(s.driver);
  static uint16_t device_memory[4096], host_memory[4096];
  const TensorView device = on_gpu(device_memory, DType::kBFloat16, {4, 4, 2, 8});
  const TensorView host(host_memory, DType::kBFloat16, {4, 4, 2, 8});
  int32_t pair[] = {3, 0};
  const TensorView pairs(pair, DType::kInt32, {1, 2});
  CHECK_THROWS_AS(s.backend().swap_blocks(device, host, pairs, {kGpu, kStream}), InvalidArgument);
  s.driver.pinned.insert(host_memory);
  s.backend().swap_blocks(device, host, pairs, {kGpu, kStream});
  s.backend().swap_blocks(host, device, pairs, {kGpu, kStream});
  CHECK(static_cast<void*>(seen.all[0].k.to.data) == host_memory);
  CHECK(static_cast<void*>(seen.all[1].k.from.data) == host_memory);
  CHECK(seen.all[0].v.dim == 0);
}

TEST_CASE("nothing to do launches nothing") {
  Setup s;
  const TensorView none = on_gpu(nullptr, DType::kFloat16, {0, 2, 64});
  const TensorView cache = on_gpu(nullptr, DType::kFloat16, {7, 16, 2, 64});
  s.backend().append_kv(none, none, cache, cache, TensorView(nullptr, DType::kInt64, {0}), nullptr,
                        {}, {kGpu, nullptr});
  s.backend().copy_blocks(cache, cache, TensorView(nullptr, DType::kInt32, {0, 2}),
                          {kGpu, nullptr});
  CHECK(s.driver.count("cuLaunchKernel") == 0);
}

}  // namespace
}  // namespace quire::cuda
