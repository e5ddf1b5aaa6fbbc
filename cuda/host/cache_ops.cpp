// SPDX-License-Identifier: Apache-2.0
#include "host/cache_ops.h"

#include <cstring>
#include <initializer_list>

#include "host/select.h"
#include "kernels/launch.h"
#include "quire/error.h"

namespace quire::cuda {
namespace {

using device::AppendArgs;
using device::CacheView;
using device::CopyBlocksArgs;
using device::MergeStatesArgs;
using device::View;

const Kernel& kernel_of(Family family, ElementType dtype, ElementType kv_dtype) {
  for (const Kernel& kernel : kKernels)
    if (kernel.family == family && kernel.dtype == dtype && kernel.kv_dtype == kv_dtype)
      return kernel;
  throw Unsupported("cuda: float32 is not implemented here; expected float16 or bfloat16");
}

const Kernel& kernel_of(Family family, ElementType dtype) {
  return kernel_of(family, dtype, dtype);
}

// Kernels move 16-bit elements; where nothing is computed, a wider one is several of them.
int words_of(const TensorView& tensor) { return static_cast<int>(size_of(tensor.dtype) / 2); }

int32_t dim_of(const TensorView& tensor) {
  return static_cast<int32_t>(tensor.shape[tensor.ndim - 1]) * words_of(tensor);
}

// A tensor [.., heads, dim] with `outer` and `row` as its outer dimensions, -1 where it has none.
CacheView view_of(const TensorView& tensor, int outer, int row) {
  const int words = words_of(tensor);
  const auto stride = [&](int i) { return i < 0 ? 0 : tensor.strides[i] * words; };
  return {tensor.as<uint16_t>(), stride(outer), stride(row), stride(tensor.ndim - 2)};
}

CacheView view_of_cache(const TensorView& cache) { return view_of(cache, 0, 1); }
CacheView view_of_tokens(const TensorView& tokens) { return view_of(tokens, 0, -1); }

// A cache [blocks, block_size, heads, dim] in bytes.
View<uint8_t> bytes_of(const TensorView& cache) {
  const auto size = static_cast<int64_t>(size_of(cache.dtype));
  return {cache.as<uint8_t>(), cache.strides[0] * size, cache.strides[1] * size,
          cache.strides[2] * size};
}

int32_t row_bytes(const TensorView& cache) {
  return static_cast<int32_t>(cache.shape[3] * static_cast<int64_t>(size_of(cache.dtype)));
}

// Whether rows begin at multiples of `alignment` bytes.
template <class Bits>
bool is_aligned(std::initializer_list<View<Bits>> views, int64_t alignment = device::kPieceBytes) {
  for (const View<Bits>& view : views) {
    if (reinterpret_cast<uintptr_t>(view.data) % alignment != 0) return false;
    for (const int64_t stride : {view.stride_outer, view.stride_row, view.stride_head})
      if (stride * static_cast<int64_t>(sizeof(Bits)) % alignment != 0) return false;
  }
  return true;
}

// Index arrays of one call, sent from the host through a slab that is given back when the call
// ends. Those that are on the device are used where they lie.
class Indices {
 public:
  Indices(Gpu& gpu, const char* function, std::initializer_list<const TensorView*> arrays,
          Handle stream)
      : gpu_(gpu), stream_(stream) {
    size_t bytes = 0;
    for (const TensorView* array : arrays)
      if (is_on_host(*array)) bytes += padded_bytes(*array);
    if (bytes == 0) return;
    QUIRE_CHECK_ARG(gpu.capture_of(stream) == 0, function,
                    ": expected index arrays on the device while a CUDA graph is captured, got "
                    "some on the host, whose values the graph would keep");
    slab_ = gpu.acquire(bytes, bytes);
    size_t end = 0;
    for (const TensorView* array : arrays) {
      if (!is_on_host(*array)) continue;
      pack(*array, static_cast<std::byte*>(slab_->host) + end);
      end += padded_bytes(*array);
    }
    check(gpu.driver(), gpu.driver().copy_to_device(slab_->device, slab_->host, bytes, stream),
          "cuMemcpyHtoDAsync", "indices");
  }
  ~Indices() {
    if (slab_) gpu_.release(slab_, stream_);
  }
  Indices(const Indices&) = delete;

  // The next of the arrays, in the order in which they were given.
  template <class T>
  const T* take(const TensorView& array) {
    if (!is_on_host(array)) return array.as<const T>();
    const DeviceAddress address = slab_ ? slab_->device + taken_ : 0;
    taken_ += padded_bytes(array);
    return reinterpret_cast<const T*>(address);
  }

 private:
  static bool is_on_host(const TensorView& array) { return array.device.type == DeviceType::kCPU; }
  static size_t padded_bytes(const TensorView& array) {
    return (static_cast<size_t>(array.num_elements()) * size_of(array.dtype) + 15) / 16 * 16;
  }
  // Rows of a one- or two-dimensional array, which may lie apart.
  static void pack(const TensorView& array, std::byte* to) {
    const size_t element = size_of(array.dtype);
    const size_t row = element * (array.ndim == 2 ? array.shape[1] : 1);
    for (int64_t i = 0; i < array.shape[0]; ++i)
      std::memcpy(to + i * row, array.as<std::byte>() + i * array.strides[0] * element, row);
  }

  Gpu& gpu_;
  Handle stream_;
  Slab* slab_ = nullptr;
  size_t taken_ = 0;
};

void launch_over(Gpu& gpu, const Kernel& kernel, int64_t units, void* args, Handle stream) {
  if (units > 0) gpu.launch(kernel, gpu.blocks_for(units, kernel.threads), args, stream);
}

int pieces_of(int dim) { return (dim + device::kPiece - 1) / device::kPiece; }

void set_rope(AppendArgs& args, const Rope& rope, Indices& indices) {
  args.cos_sin = rope.cos_sin.as<float>();
  args.cos_sin_stride = rope.cos_sin.strides[0];
  args.positions = indices.take<int32_t>(rope.positions);
  args.max_position = static_cast<int32_t>(rope.cos_sin.shape[0]);
  args.rotary_dim = static_cast<int32_t>(rope.cos_sin.shape[1]);
  args.is_interleaved = rope.interleaved;
}

void launch_append(Gpu& gpu, const Kernel& kernel, AppendArgs& args, Handle stream) {
  const int64_t pieces = pieces_of(args.rotary_dim / 2) + pieces_of(args.k.dim - args.rotary_dim) +
                         pieces_of(args.v.dim);
  launch_over(gpu, kernel, int64_t{args.num_tokens} * args.num_heads * pieces, &args, stream);
}

constexpr int kLanesOfRow = 16;  // of append_kv_e4m3

// As kernel_scale() of the core, which a library of its own takes no symbol from.
KvScale scale_of(const TensorView& scale) {
  if (!scale) return {nullptr, 0, 0, 0, 1.0f, false};
  if (scale.device.type == DeviceType::kCPU)
    return {nullptr, 0, 0, 0, *scale.as<const float>(), false};
  if (scale.ndim == 1) return {scale.as<const float>(), 0, 0, scale.strides[0], 1.0f, false};
  return {
      scale.as<const float>(), scale.strides[0], scale.strides[1], scale.strides[2], 1.0f, true};
}

void set_codes(AppendArgs& args, AppendArgs::Side& side, const TensorView& cache,
               const TensorView& scale) {
  side.codes = bytes_of(cache);
  side.scale = scale_of(scale);
  args.is_aligned = args.is_aligned && is_aligned({side.codes}, device::kPiece);
}

void launch_copy(Gpu& gpu, CopyBlocksArgs& args, Handle stream) {
  const Kernel& kernel = kernel_of(Family::kCopy, ElementType::kFloat32);
  const auto pieces_of_bytes = [](int bytes) { return pieces_of((bytes + 1) / 2); };
  const int64_t pieces = pieces_of_bytes(args.k.dim) + pieces_of_bytes(args.v.dim);
  launch_over(gpu, kernel, pieces * args.num_pairs * args.num_heads * args.block_size, &args,
              stream);
}

// Memory of the host that a kernel can reach: pinned, and thus at the same address for the device.
void check_reachable(const Gpu& gpu, const std::string& argument, const TensorView& tensor) {
  void* address = nullptr;
  if (tensor.device.type == DeviceType::kCUDA || tensor.num_elements() == 0) return;
  const bool is_pinned =
      gpu.driver().pointer_attribute(&address, kDevicePointer,
                                     reinterpret_cast<DeviceAddress>(tensor.data)) == kSuccess;
  QUIRE_CHECK_ARG(is_pinned && address == tensor.data, argument,
                  ": expected pinned (page-locked) memory, got host memory the GPU can't reach");
}

}  // namespace

void append_kv(Gpu& gpu, const TensorView& k, const TensorView& v, const TensorView& k_cache,
               const TensorView& v_cache, const TensorView& slot_mapping, const Rope* rope,
               const KvScales& scales, Handle stream) {
  const ContextScope scope(gpu);
  const bool quantises = k_cache.dtype == DType::kFloat8E4M3;
  // Where values are copied as they are, any kernel does.
  const ElementType dtype = rope || quantises ? element_type(k.dtype) : ElementType::kFloat16;
  const Kernel& kernel =
      kernel_of(Family::kAppend, dtype, quantises ? ElementType::kFloat8E4M3 : dtype);
  AppendArgs args{};
  args.k = {view_of_tokens(k), {}, dim_of(k), {}, {}};
  args.v = {view_of_tokens(v), {}, dim_of(v), {}, {}};
  args.num_slots = k_cache.shape[0] * k_cache.shape[1];
  args.num_tokens = static_cast<int32_t>(k.shape[0]);
  args.num_heads = static_cast<int32_t>(k.shape[1]);
  args.block_size = static_cast<int32_t>(k_cache.shape[1]);
  args.is_aligned = is_aligned({args.k.from, args.v.from});
  if (quantises) {
    set_codes(args, args.k, k_cache, scales.k);
    set_codes(args, args.v, v_cache, scales.v);
  } else {
    args.k.cache = view_of_cache(k_cache);
    args.v.cache = view_of_cache(v_cache);
    args.is_aligned = args.is_aligned && is_aligned({args.k.cache, args.v.cache});
  }
  const TensorView none = TensorView(nullptr, DType::kInt32, {0});
  Indices indices(gpu, "append_kv", {&slot_mapping, rope ? &rope->positions : &none}, stream);
  args.slot_mapping = indices.take<int64_t>(slot_mapping);
  if (rope) set_rope(args, *rope, indices);
  if (quantises)
    launch_over(gpu, kernel, int64_t{args.num_tokens} * args.num_heads * 2 * kLanesOfRow, &args,
                stream);
  else
    launch_append(gpu, kernel, args, stream);
}

void apply_rope(Gpu& gpu, const TensorView& x, const Rope& rope, const TensorView& out,
                Handle stream) {
  const ContextScope scope(gpu);
  const Kernel& kernel = kernel_of(Family::kAppend, element_type(x.dtype));
  AppendArgs args{};
  args.k = {view_of_tokens(x), view_of_tokens(out), dim_of(x), {}, {}};
  args.num_tokens = static_cast<int32_t>(x.shape[0]);
  args.num_slots = args.num_tokens;
  args.num_heads = static_cast<int32_t>(x.shape[1]);
  args.block_size = 1;
  args.is_aligned = is_aligned({args.k.from, args.k.cache});
  Indices indices(gpu, "apply_rope", {&rope.positions}, stream);
  set_rope(args, rope, indices);
  launch_append(gpu, kernel, args, stream);
}

void copy_blocks(Gpu& gpu, const TensorView& k_cache, const TensorView& v_cache,
                 const TensorView& src_dst, Handle stream) {
  const ContextScope scope(gpu);
  CopyBlocksArgs args{};
  args.k = {bytes_of(k_cache), bytes_of(k_cache), row_bytes(k_cache)};
  args.v = {bytes_of(v_cache), bytes_of(v_cache), row_bytes(v_cache)};
  args.num_pairs = static_cast<int32_t>(src_dst.shape[0]);
  args.num_heads = static_cast<int32_t>(k_cache.shape[2]);
  args.block_size = static_cast<int32_t>(k_cache.shape[1]);
  args.is_aligned = is_aligned({args.k.from, args.v.from});
  Indices indices(gpu, "copy_blocks", {&src_dst}, stream);
  args.pairs = indices.take<int32_t>(src_dst);
  launch_copy(gpu, args, stream);
}

void swap_blocks(Gpu& gpu, const TensorView& src, const TensorView& dst, const TensorView& src_dst,
                 Handle stream) {
  const ContextScope scope(gpu);
  check_reachable(gpu, "swap_blocks: src", src);
  check_reachable(gpu, "swap_blocks: dst", dst);
  CopyBlocksArgs args{};
  args.k = {bytes_of(src), bytes_of(dst), row_bytes(src)};
  args.num_pairs = static_cast<int32_t>(src_dst.shape[0]);
  args.num_heads = static_cast<int32_t>(src.shape[2]);
  args.block_size = static_cast<int32_t>(src.shape[1]);
  args.is_aligned = is_aligned({args.k.from, args.k.to});
  Indices indices(gpu, "swap_blocks", {&src_dst}, stream);
  args.pairs = indices.take<int32_t>(src_dst);
  launch_copy(gpu, args, stream);
}

void merge_states(Gpu& gpu, const TensorView& outs, const TensorView& lses, const TensorView& out,
                  const TensorView& lse, Handle stream) {
  const ContextScope scope(gpu);
  const Kernel& kernel = kernel_of(Family::kMerge, element_type(outs.dtype));
  MergeStatesArgs args{};
  args.outs = view_of(outs, 0, 1);
  args.lses = lses.as<float>();
  args.lses_stride_state = lses.strides[0];
  args.lses_stride_head = lses.strides[1];
  args.lses_stride_row = lses.strides[2];
  args.out = view_of(out, -1, 0);
  args.lse = lse.as<float>();
  args.lse_stride_head = lse.strides[0];
  args.lse_stride_row = lse.strides[1];
  args.num_states = static_cast<int32_t>(outs.shape[0]);
  args.num_rows = static_cast<int32_t>(outs.shape[1]);
  args.num_heads = static_cast<int32_t>(outs.shape[2]);
  args.dim = dim_of(outs);
  args.is_aligned = is_aligned({args.outs, args.out});
  launch_over(gpu, kernel, int64_t{args.num_rows} * args.num_heads * pieces_of(args.dim), &args,
              stream);
}

}  // namespace quire::cuda
