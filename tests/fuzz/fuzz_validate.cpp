// SPDX-License-Identifier: Apache-2.0
// The argument checks of attention. A correct call is built from the input's first bytes and then
// damaged by the rest: lengths, table entries, shapes, strides, dtypes, addresses. What the checks
// refuse must be refused by InvalidArgument and nothing else; of what they accept, every row that
// the plan sends a kernel to must be a row of the tensors.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attention/tile.h"
#include "quire/attention.h"
#include "quire/error.h"

namespace quire {
namespace {

constexpr int64_t kExtremes[] = {0,
                                 -1,
                                 1,
                                 2,
                                 7,
                                 512,
                                 std::numeric_limits<int32_t>::max(),
                                 std::numeric_limits<int32_t>::min(),
                                 int64_t{1} << 32,
                                 int64_t{1} << 62,
                                 std::numeric_limits<int64_t>::max(),
                                 std::numeric_limits<int64_t>::min()};
constexpr DType kDTypes[] = {
    DType::kFloat32, DType::kFloat16, DType::kBFloat16,   DType::kInt32,      DType::kInt64,
    DType::kUInt8,   DType::kInt8,    DType::kFloat8E4M3, DType::kFloat8E5M2,
};

// A tensor with memory of its own.
struct Owned {
  std::vector<uint8_t> bytes;
  TensorView view;

  Owned(DType dtype, const std::vector<int64_t>& shape) {
    view.dtype = dtype;
    view.ndim = static_cast<int>(shape.size());
    int64_t stride = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
      view.shape[i] = shape[i];
      view.strides[i] = stride;
      stride *= shape[i];
    }
    bytes.resize(static_cast<size_t>(stride) * size_of(dtype) + 8);  // never null
    view.data = bytes.data();
  }
  explicit Owned(float number) : Owned(DType::kFloat32, {1}) {
    std::memcpy(bytes.data(), &number, sizeof(number));
  }
};

void require(bool holds) {
  if (!holds) std::abort();
}

int64_t rows_of(const TensorView& tensor) { return tensor.shape[tensor.ndim - 3]; }

// What a kernel derives addresses from, against the extents of the tensors.
void check_reach(const AttentionDesc& desc, const AttentionPlan& plan, const AttentionTensors& t) {
  for (const WorkItem& item : plan.items) {
    require(item.sequence >= 0 && item.sequence < static_cast<int64_t>(plan.sequences.size()));
    const Sequence& s = plan.sequences[item.sequence];
    require(item.kv_head >= 0 && item.kv_head < t.k.shape[t.k.ndim - 2]);
    require(0 <= item.q_begin && item.q_begin < item.q_end && item.q_end <= s.q_len);
    require(0 <= item.kv_begin && item.kv_begin <= item.kv_end && item.kv_end <= s.seq_len);
    require(s.q_begin >= 0 && int64_t{s.q_begin} + s.q_len <= rows_of(t.q));
    require(int64_t{s.q_begin} + s.q_len <= rows_of(t.out));
    if (t.lse) require(int64_t{s.q_begin} + s.q_len <= t.lse.shape[t.lse.ndim - 1]);
    if (t.mask) require(int64_t{s.q_begin} + s.q_len <= t.mask.shape[t.mask.ndim - 2]);
    if (plan.dense)
      require(item.sequence < t.q.shape[0] && item.sequence < t.k.shape[0] &&
              item.sequence < t.v.shape[0] && item.sequence < t.out.shape[0]);
    if (desc.block_size == 0) {
      require(s.kv_row >= 0 && int64_t{s.kv_row} + s.seq_len <= rows_of(t.k));
      require(int64_t{s.kv_row} + s.seq_len <= rows_of(t.v));
    } else if (s.seq_len > 0) {
      const int64_t last = s.kv_row + (s.seq_len - 1) / desc.block_size;
      require(s.kv_row >= 0 && last < static_cast<int64_t>(plan.block_ids.size()));
      for (int64_t i = s.kv_row + first_visible_block(desc, s); i <= last; ++i) {
        const int32_t id = plan.block_ids[i];
        require(id >= 0 && id < t.k.shape[0] && id < t.v.shape[0]);
      }
    }
  }
  for (const TensorView* scale : {&t.scales.k, &t.scales.v}) {
    const KvScale read = kernel_scale(*scale);
    require(!read.is_per_token ||
            (scale->shape[0] == t.k.shape[0] && scale->shape[1] == desc.block_size &&
             scale->shape[2] == desc.num_kv_heads));
    require(read.values || read.value > 0);
  }
  for (const TensorView* tensor : {&t.q, &t.k, &t.v, &t.out})
    require(tensor->is_empty() || (tensor->data && tensor->device == Device{}));
}

class Call {
 public:
  explicit Call(FuzzedDataProvider& input) : in_(input) {
    describe();
    make_batch();
    const int64_t heads = desc_.num_heads, kv_heads = desc_.num_kv_heads;
    const int64_t dim_v = desc_.value_dim();
    const auto add = [&](DType dtype, std::vector<int64_t> shape) {
      if (dense_) shape.insert(shape.begin(), batch_.batch_size);
      tensors_.push_back(Owned(dtype, shape));
    };
    const auto add_keys = [&](int64_t rows, int64_t dim) {
      if (desc_.block_size > 0)
        tensors_.push_back(Owned(desc_.kv_dtype, {kBlocks, desc_.block_size, kv_heads, dim}));
      else
        add(desc_.dtype, {rows, kv_heads, dim});
    };
    const int64_t total_q = dense_ ? batch_.dense_q : cu_q_.back();
    const int64_t total_k = dense_ ? batch_.dense_k : cu_k_.back();
    add(desc_.dtype, {total_q, heads, desc_.head_dim});
    add_keys(total_k, desc_.head_dim);
    add_keys(total_k, dim_v);
    add(output_dtype(desc_.dtype), {total_q, heads, dim_v});
    add(DType::kFloat32, {heads, total_q});
    tensors_.push_back(Owned(DType::kFloat32, {heads}));
    tensors_.push_back(Owned(DType::kFloat32, {heads}));
    add(DType::kUInt8, {total_q, 9});
    for (int i = 0; i < 2; ++i) tensors_.push_back(make_scale());
    given_ = in_.ConsumeIntegral<uint8_t>();
  }

  void damage() {
    for (int n = in_.ConsumeIntegralInRange(0, 3); n > 0; --n) {
      switch (in_.ConsumeIntegralInRange(0, 3)) {
        case 0:
          damage_desc();
          break;
        case 1:
          damage_batch();
          break;
        default:
          damage_tensor(tensors_[in_.ConsumeIntegralInRange<size_t>(0, tensors_.size() - 1)]);
      }
    }
  }

  void check() const {
    try {
      validate(desc_);
      const AttentionPlan plan = quire::plan(desc_, batch_, {3, 20});
      const AttentionTensors tensors = given();
      validate(desc_, plan, tensors);
      if (tensors.q.device == Device{}) check_reach(desc_, plan, tensors);
    } catch (const InvalidArgument& error) {
      require(std::string(error.what()).find("expected") != std::string::npos);
    }
  }

 private:
  int number(int low, int high) { return in_.ConsumeIntegralInRange(low, high); }
  int64_t extreme() {
    const int64_t x = in_.PickValueInArray(kExtremes);
    return in_.ConsumeBool() ? x : in_.ConsumeIntegralInRange<int64_t>(-40, 40);
  }
  int32_t extreme32() {
    return static_cast<int32_t>(std::clamp<int64_t>(extreme(), std::numeric_limits<int32_t>::min(),
                                                    std::numeric_limits<int32_t>::max()));
  }

  void describe() {
    desc_.num_kv_heads = number(1, 3);
    desc_.num_heads = desc_.num_kv_heads * number(1, 4);
    desc_.head_dim = number(1, 40);
    desc_.head_dim_v = number(0, 40);
    desc_.dtype = desc_.kv_dtype = kDTypes[number(0, 2)];
    desc_.block_size = number(0, 2) ? number(1, 20) : 0;
    desc_.causal = in_.ConsumeBool();
    desc_.window_left = number(-1, 9);
    desc_.window_right = number(-1, 9);
    desc_.softcap = static_cast<float>(number(0, 2));
    if (desc_.block_size > 0 && in_.ConsumeBool()) desc_.kv_dtype = kDTypes[number(6, 8)];
    if (desc_.kv_dtype == DType::kFloat8E4M3 && in_.ConsumeBool()) desc_.dtype = desc_.kv_dtype;
    dense_ = desc_.block_size == 0 && in_.ConsumeBool();
  }

  Owned make_scale() {
    const int64_t kv_heads = desc_.num_kv_heads;
    switch (number(0, 2)) {
      case 0:
        return Owned(1.0f);
      case 1:
        return Owned(DType::kFloat32, {kv_heads});
      default:
        return Owned(DType::kFloat32, {kBlocks, std::max(1, desc_.block_size), kv_heads});
    }
  }

  void make_batch() {
    batch_.batch_size = number(0, 4);
    cu_q_ = cu_k_ = {0};
    for (int b = 0; b < batch_.batch_size; ++b) {
      cu_q_.push_back(cu_q_.back() + number(0, 30));
      seq_lens_.push_back(number(0, 70));
      cu_k_.push_back(cu_k_.back() + seq_lens_.back());
    }
    if (dense_) {
      batch_.dense_q = number(0, 30);
      batch_.dense_k = number(0, 70);
      return;
    }
    batch_.cu_seqlens_q = cu_q_.data();
    if (desc_.block_size == 0) {
      batch_.cu_seqlens_k = cu_k_.data();
      return;
    }
    batch_.seq_lens = seq_lens_.data();
    batch_.max_blocks = 70 / desc_.block_size + 1;
    batch_.block_table_stride = batch_.max_blocks;
    for (int i = 0; i < batch_.batch_size * batch_.max_blocks; ++i)
      table_.push_back(i % kBlocks);  // costs no input, which is left for the damage
    batch_.block_table = table_.data();
  }

  void damage_desc() {
    int* const fields[] = {&desc_.num_heads,    &desc_.num_kv_heads, &desc_.head_dim,
                           &desc_.head_dim_v,   &desc_.block_size,   &desc_.window_left,
                           &desc_.window_right, &batch_.dense_q,     &batch_.dense_k};
    float* const floats[] = {&desc_.scale, &desc_.softcap};
    switch (number(0, 3)) {
      case 0:
        desc_.dtype = in_.PickValueInArray(kDTypes);
        break;
      case 1:
        desc_.kv_dtype = in_.PickValueInArray(kDTypes);
        break;
      case 2:
        *in_.PickValueInArray(floats) = in_.ConsumeFloatingPoint<float>();
        break;
      default:
        *in_.PickValueInArray(fields) = extreme32();
    }
    batch_.dense_q = std::min(batch_.dense_q, 1 << 20);  // a plan lists its rows
  }

  // Entries, null pointers and counts; never a count beyond the memory behind a pointer.
  void damage_batch() {
    std::vector<int32_t>* const lists[] = {&cu_q_, &cu_k_, &seq_lens_, &table_};
    std::vector<int32_t>& list = *in_.PickValueInArray(lists);
    switch (number(0, 9)) {
      case 0:
        batch_.seq_lens = nullptr;
        break;
      case 1:
        (in_.ConsumeBool() ? batch_.cu_seqlens_q : batch_.cu_seqlens_k) = nullptr;
        break;
      case 2:
        batch_.block_table = nullptr;
        break;
      case 3:
        batch_.batch_size = std::min(batch_.batch_size, extreme32());
        break;
      default:
        if (list.empty()) return;
        list[in_.ConsumeIntegralInRange<size_t>(0, std::min<size_t>(list.size(), 8) - 1)] =
            extreme32();
        for (int32_t& row : cu_q_) row = std::min(row, 1 << 20);
    }
  }

  void damage_tensor(Owned& tensor) {
    TensorView& view = tensor.view;
    const int dim = number(0, std::clamp(view.ndim - 1, 0, TensorView::kMaxDims - 1));
    switch (number(0, 7)) {
      case 0:
        view.data = nullptr;
        break;
      case 1:
        view.data = tensor.bytes.data() + number(0, 3);
        break;
      case 2:
        view.dtype = in_.PickValueInArray(kDTypes);
        break;
      case 3:
        view.ndim = number(-1, TensorView::kMaxDims + 1);
        break;
      case 4:
        view.read_only = true;
        break;
      case 5:
        view.device = {DeviceType::kCUDA, number(0, 1)};
        break;
      case 6:
        view.shape[dim] = in_.ConsumeBool() ? extreme() : view.shape[dim] + number(-2, 2);
        break;
      default:
        view.strides[dim] = extreme();
    }
  }

  AttentionTensors given() const {
    AttentionTensors t;
    t.q = tensors_[0].view;
    t.k = tensors_[1].view;
    t.v = tensors_[2].view;
    t.out = tensors_[3].view;
    if (given_ & 1) t.lse = tensors_[4].view;
    if (given_ & 2) t.alibi_slopes = tensors_[5].view;
    if (given_ & 4) t.sinks = tensors_[6].view;
    if (given_ & 8) t.mask = tensors_[7].view;
    t.mask_is_tree = given_ & 16;
    if (given_ & 32) t.scales.k = tensors_[8].view;
    if (given_ & 64) t.scales.v = tensors_[9].view;
    return t;
  }

  static constexpr int kBlocks = 6;
  FuzzedDataProvider& in_;
  AttentionDesc desc_;
  AttentionBatch batch_;
  bool dense_ = false;
  std::vector<int32_t> cu_q_, cu_k_, seq_lens_, table_;
  std::vector<Owned> tensors_;  // q, k, v, out, lse, alibi_slopes, sinks, mask, scales
  int given_ = 0;
};

}  // namespace
}  // namespace quire

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider input(data, size);
  quire::Call call(input);
  call.damage();
  call.check();
  return 0;
}
