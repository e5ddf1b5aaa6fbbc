// SPDX-License-Identifier: Apache-2.0
// The CUDA backend over a driver that only pretends, and batches for it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "fake_driver.h"
#include "host/select.h"
#include "kernels/launch.h"
#include "quire/error.h"

namespace quire::cuda {

// An image for every group of kernels; the fake driver finds any kernel in any image.
inline const Images& all_images() {
  static const std::vector<Image> list = [] {
    static const std::vector<std::string> names = [] {
      std::vector<std::string> result = {"cache_ops", "mla_decode_576", "mla_decode_sm90_576"};
      for (int dim : {64, 96, 128, 192, 256})
        for (const char* family : {"prefill_", "prefill_sm90_", "decode_"})
          result.push_back(concat(family, dim));
      for (int dim : head_dims(ElementType::kFloat8E4M3))
        for (const char* family : {"prefill_e4m3_", "prefill_sm90_e4m3_", "decode_e4m3_"})
          result.push_back(concat(family, dim));
      return result;
    }();
    std::vector<Image> images;
    for (const std::string& name : names) images.push_back({name.c_str(), name.data()});
    return images;
  }();
  static const Images images = {list.data(), list.data() + list.size(), "80 90a 100 120"};
  return images;
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// The last launch's arguments, copied while they were alive.
template <class Args>
struct Seen {
  std::vector<Args> all;
  explicit Seen(FakeDriver& driver) {
    driver.on_launch = [this](const FakeLaunch& launch) {
      all.push_back(*static_cast<const Args*>(launch.args));
    };
  }
};

struct Setup {
  FakeDriver driver;
  Driver table = FakeDriver::table();
  Made made = make_backend(table, all_images());
  const Backend& backend() const { return *made.backend; }
};

const Device kGpu{DeviceType::kCUDA, 0};
const Handle kStream = reinterpret_cast<Handle>(0x77);

inline AttentionDesc model(int head_dim = 128) {
  AttentionDesc desc;
  desc.num_heads = 8;
  desc.num_kv_heads = 2;
  desc.head_dim = desc.head_dim_v = head_dim;
  desc.block_size = 16;
  return desc;
}

// A batch of (q_len, seq_len), blocks counting up.
struct Batch {
  std::vector<int32_t> seq_lens, cu = {0}, table;
  AttentionBatch view;

  explicit Batch(std::vector<std::pair<int, int>> lengths, int block_size = 16) {
    int blocks = 0;
    for (const auto& [q, s] : lengths) {
      seq_lens.push_back(s);
      cu.push_back(cu.back() + q);
      blocks = std::max(blocks, (s + block_size - 1) / block_size);
    }
    for (size_t i = 0; i < lengths.size() * blocks; ++i) table.push_back(static_cast<int>(i) % 97);
    view.batch_size = static_cast<int>(lengths.size());
    view.seq_lens = seq_lens.data();
    view.cu_seqlens_q = cu.data();
    view.block_table = table.data();
    view.block_table_stride = view.max_blocks = blocks;
  }
};

inline AttentionPlan make_plan(const Backend& backend, const AttentionDesc& desc,
                               const Batch& batch, Device device = kGpu) {
  AttentionPlan made =
      plan(desc, batch.view, backend.plan_traits(desc, backend.device_info(device.index)));
  made.on_device = backend.prepare(desc, made, device);
  return made;
}

inline AttentionParams params_of(const AttentionDesc& desc, const AttentionPlan& plan) {
  AttentionParams p{};
  p.num_heads = desc.num_heads;
  p.num_kv_heads = desc.num_kv_heads;
  p.head_dim = desc.head_dim;
  p.head_dim_v = desc.head_dim_v;
  p.dtype = element_type(desc.dtype);
  p.kv_dtype = element_type(desc.kv_dtype);
  p.scale = 0.1f;
  p.window_left = -1;
  p.window_right = 0;
  p.block_table = plan.block_ids.data();
  p.block_table_stride = 1;
  p.block_size = desc.block_size;
  p.q = p.k = p.v = reinterpret_cast<void*>(0x100000);
  p.out = reinterpret_cast<void*>(0x200000);
  p.q_stride_row = p.out_stride_row = desc.num_heads * desc.head_dim;
  p.q_stride_head = p.out_stride_head = p.k_stride_head = p.v_stride_head = desc.head_dim;
  p.k_stride_row = p.v_stride_row = desc.num_kv_heads * desc.head_dim;
  p.k_stride_block = p.v_stride_block = 16 * p.k_stride_row;
  return p;
}

}  // namespace quire::cuda
