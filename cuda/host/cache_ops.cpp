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

const Kernel& kernel_of(Family family, ElementType dtype) {
  for (const Kernel& kernel : kKernels)
    if (kernel.family == family && kernel.dtype == dtype) return kernel;
  throw Unsupported("cuda: float32 is not implemented here; expected float16 or bfloat16");
}

// Kernels move 16-bit elements; where nothing is computed, a wider one is several of them.
int words_of(const TensorView& tensor) {
  const size_t bytes = size_of(tensor.dtype);
  if (bytes % 2 != 0)
    throw Unsupported(concat("cuda: ", name_of(tensor.dtype), " is not implemented here"));
  return static_cast<int>(bytes / 2);
}

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

bool is_aligned(std::initializer_list<CacheView> views) {
  for (const CacheView& view : views)
    for (const int64_t bytes : {reinterpret_cast<int64_t>(view.data), 2 * view.stride_outer,
                                2 * view.stride_row, 2 * view.stride_head})
      if (bytes % 16 != 0) return false;
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

void launch_copy(Gpu& gpu, CopyBlocksArgs& args, Handle stream) {
  const Kernel& kernel = kernel_of(Family::kCopy, ElementType::kFloat32);
  const int64_t pieces = pieces_of(args.k.dim) + pieces_of(args.v.dim);
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
               Handle stream) {
  const ContextScope scope(gpu);
  const ElementType dtype = rope ? element_type(k.dtype) : ElementType::kFloat16;
  const Kernel& kernel = kernel_of(Family::kAppend, dtype);
  AppendArgs args{};
  args.k = {view_of_tokens(k), view_of_cache(k_cache), dim_of(k)};
  args.v = {view_of_tokens(v), view_of_cache(v_cache), dim_of(v)};
  args.num_slots = k_cache.shape[0] * k_cache.shape[1];
  args.num_tokens = static_cast<int32_t>(k.shape[0]);
  args.num_heads = static_cast<int32_t>(k.shape[1]);
  args.block_size = static_cast<int32_t>(k_cache.shape[1]);
  args.is_aligned = is_aligned({args.k.from, args.k.cache, args.v.from, args.v.cache});
  const TensorView none = TensorView(nullptr, DType::kInt32, {0});
  Indices indices(gpu, "append_kv", {&slot_mapping, rope ? &rope->positions : &none}, stream);
  args.slot_mapping = indices.take<int64_t>(slot_mapping);
  if (rope) set_rope(args, *rope, indices);
  launch_append(gpu, kernel, args, stream);
}

void apply_rope(Gpu& gpu, const TensorView& x, const Rope& rope, const TensorView& out,
                Handle stream) {
  const ContextScope scope(gpu);
  const Kernel& kernel = kernel_of(Family::kAppend, element_type(x.dtype));
  AppendArgs args{};
  args.k = {view_of_tokens(x), view_of_tokens(out), dim_of(x)};
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
  args.k = {view_of_cache(k_cache), view_of_cache(k_cache), dim_of(k_cache)};
  args.v = {view_of_cache(v_cache), view_of_cache(v_cache), dim_of(v_cache)};
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
  args.k = {view_of_cache(src), view_of_cache(dst), dim_of(src)};
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
