// SPDX-License-Identifier: Apache-2.0
#include "host/select.h"

#include <algorithm>
#include <limits>
#include <set>

#include "host/arch.h"
#include "quire/error.h"

namespace quire::cuda {
namespace {

// A sequence is worth the wide tile from so many of them on. One is enough where the kernel was
// written for the architecture.
constexpr int kWideTiles = 4;

// Why kernels for values that are columns of the keys can't take a description; `least`: the head
// dims up to there have kernels of their own.
std::string reason_against_latent(const AttentionDesc& desc, int latent_dim, int least) {
  if (desc.head_dim <= least)
    return concat("head_dim ", desc.head_dim, ": for more than ", least,
                  " where v is the first columns of k");
  const int dim_v = desc.value_dim();
  if (dim_v >= desc.head_dim || dim_v > latent_dim)
    return concat("head_dim_v ", dim_v, ": v is the first columns of k, fewer than head_dim ",
                  desc.head_dim, " and at most ", latent_dim);
  return "";
}

// Why kernels for queries of codes can't take a description.
std::string reason_against_codes(const AttentionDesc& desc, int head_dim, const std::string& isa) {
  const int wanted = std::max(desc.head_dim, desc.head_dim_v);
  const KernelSet set = kernels_for(element_type(desc.dtype), element_type(desc.kv_dtype), head_dim,
                                    desc.value_dim(), isa);
  if (head_dim < wanted) return concat("head_dim ", wanted, ": at most ", head_dim);
  if (!set.is_complete())
    return concat("dtype: none of head dim ", head_dim, " for ", isa, " takes queries of ",
                  name_of(desc.dtype));
  return "";
}

std::string reason_against(const AttentionDesc& desc, int head_dim, const std::string& isa,
                           const std::string& archs) {
  const int wanted = std::max(desc.head_dim, desc.head_dim_v);
  if (serving_arch(archs, isa).empty())
    return concat(isa, ": the kernels are compiled for ", list_of(archs));
  if (desc.dtype == DType::kFloat8E4M3) return reason_against_codes(desc, head_dim, isa);
  if (desc.dtype != DType::kFloat16 && desc.dtype != DType::kBFloat16)
    return concat("dtype: ", name_of(desc.dtype), " is not implemented: float16 or bfloat16");
  if (desc.kv_dtype != desc.dtype && desc.kv_dtype != DType::kFloat8E4M3)
    return concat("kv_dtype: ", name_of(desc.kv_dtype), " KV under ", name_of(desc.dtype),
                  " is not implemented");
  if (desc.kv_dtype != desc.dtype && desc.block_size == 0)
    return concat("kv_dtype: ", name_of(desc.kv_dtype), " KV is implemented for paged caches only");
  if (head_dim < wanted) return concat("head_dim ", wanted, ": at most ", head_dim);
  const KernelSet set = kernels_for(element_type(desc.dtype), element_type(desc.kv_dtype), head_dim,
                                    desc.value_dim(), isa);
  if (!set.is_complete())
    return concat("needs more shared memory than the ", shared_bytes_per_block(isa),
                  " bytes a block of ", isa);
  const int latent_dim = set.kernels[kDecode][0]->latent_dim;
  return latent_dim == 0 ? ""
                         : reason_against_latent(desc, latent_dim, max_head_dim(desc.kv_dtype));
}

}  // namespace

bool KernelSet::is_complete() const {
  for (const Phase phase : {kNarrow, kDecode})
    for (const Kernel* kernel : kernels[phase])
      if (!kernel) return false;
  return true;
}

int KernelSet::max_rows() const { return kernels[has_wide() ? kWide : kNarrow][0]->rows; }

int64_t KernelSet::wide_rows() const {
  if (!has_wide()) return std::numeric_limits<int64_t>::max();
  const Kernel& wide = *kernels[kWide][0];
  return int64_t{wide.arch ? 1 : kWideTiles} * wide.rows;
}

int64_t KernelSet::decode_rows() const {
  const Kernel& decode = *kernels[kDecode][0];
  if (&decode == kernels[kNarrow][0]) return 0;
  return decode.latent_dim > 0 ? decode.rows : kDecodeRows;
}

int64_t KernelSet::global_bytes() const {
  int64_t most = 0;
  for (const Kernel* kernel : kernels[kWide])
    if (kernel) most = std::max<int64_t>(most, kernel->global_bytes);
  return most;
}

Phase KernelSet::phase_of(int64_t rows) const {
  return rows <= decode_rows() ? kDecode : rows >= wide_rows() ? kWide : kNarrow;
}

int max_head_dim(DType kv_dtype) {
  int most = 0;
  for (const Kernel& kernel : kKernels)
    if (kernel.family == Family::kDecode && kernel.kv_dtype == element_type(kv_dtype) &&
        kernel.latent_dim == 0)
      most = std::max(most, kernel.head_dim);
  return most;
}

int KernelSet::row_tiles(Phase phase, int rows) const {
  const int tile = kernels[phase][0]->rows;
  return is_latent() ? (rows + tile - 1) / tile : 1;
}

std::vector<int> head_dims(ElementType kv_dtype) {
  std::set<int> dims;
  for (const Kernel& kernel : kKernels)
    if (kernel.family == Family::kDecode && kernel.kv_dtype == kv_dtype)
      dims.insert(kernel.head_dim);
  return {dims.begin(), dims.end()};
}

KernelSet kernels_for(ElementType dtype, ElementType kv_dtype, int head_dim, int head_dim_v,
                      const std::string& isa) {
  KernelSet set;
  set.head_dim = head_dim;
  for (const Kernel& kernel : kKernels) {
    const bool is_prefill = kernel.family == Family::kPrefill;
    if (!is_prefill && kernel.family != Family::kDecode) continue;
    if (kernel.dtype != dtype || kernel.kv_dtype != kv_dtype || kernel.head_dim != head_dim ||
        kernel.head_dim_v < head_dim_v)
      continue;
    if (kernel.shared_bytes > shared_bytes_per_block(isa)) continue;
    if (kernel.arch && serving_arch(kernel.arch, isa).empty()) continue;
    const int mode = static_cast<int>(kernel.mode);
    if (dtype == ElementType::kFloat8E4M3) {  // one for every sequence
      set.kernels[kNarrow][mode] = set.kernels[kDecode][mode] = &kernel;
      continue;
    }
    const Kernel*& first = set.kernels[is_prefill ? kNarrow : kDecode][mode];
    if (!first) {
      first = &kernel;
    } else if (is_prefill && kernel.rows > first->rows) {
      const Kernel*& wide = set.kernels[kWide][mode];
      if (!wide || (kernel.arch && !wide->arch)) wide = &kernel;
    }
  }
  if (!set.kernels[kWide][0] || !set.kernels[kWide][1])
    set.kernels[kWide][0] = set.kernels[kWide][1] = nullptr;
  return set;
}

KernelSet select(const AttentionDesc& desc, const std::string& isa) {
  const ElementType kv_dtype = element_type(desc.kv_dtype);
  for (const int head_dim : head_dims(kv_dtype)) {
    if (head_dim < std::max(desc.head_dim, desc.head_dim_v)) continue;
    const KernelSet set =
        kernels_for(element_type(desc.dtype), kv_dtype, head_dim, desc.value_dim(), isa);
    if (set.is_complete()) return set;
  }
  throw Unsupported("cuda: no kernels for this; see explain()");
}

std::vector<Candidate> candidates(const AttentionDesc& desc, const std::string& isa,
                                  const std::string& archs) {
  std::vector<Candidate> result;
  // Where there is nothing for the cache's type, the reason is given by head dim all the same.
  const bool is_e4m3 = desc.kv_dtype == DType::kFloat8E4M3;
  const ElementType kv_dtype = is_e4m3 ? ElementType::kFloat8E4M3 : ElementType::kFloat16;
  for (const int head_dim : head_dims(kv_dtype)) {
    const std::string reason = reason_against(desc, head_dim, isa, archs);
    std::string name = concat("cuda.d", head_dim);
    if (reason.empty()) {
      const KernelSet set = kernels_for(element_type(desc.dtype), element_type(desc.kv_dtype),
                                        head_dim, desc.value_dim(), isa);
      name = concat("cuda.sm_", serving_arch(archs, isa), ".d", head_dim, " (");
      const Phase first = set.decode_rows() > 0 ? kDecode : kNarrow;
      for (const Phase phase : {kDecode, kNarrow, kWide})
        if (const Kernel* kernel = set.kernels[phase][0];
            kernel && (phase == first || phase != kDecode))
          name += concat(phase == first ? "" : ", ", kernel->name);
      name += set.is_latent() ? "; v = k[..., :head_dim_v], the same memory)" : ")";
    }
    result.push_back({name, reason});
  }
  return result;
}

}  // namespace quire::cuda
