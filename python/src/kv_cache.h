// SPDX-License-Identifier: Apache-2.0
// What the bindings of the manager and of the scheduler share: NumPy views of a step's arrays.
#pragma once

#include <nanobind/ndarray.h>

#include <memory>

#include "quire/kv_cache_manager.h"
#include "tensor.h"

namespace quire::python {

// The latest NumPy view of a StepArray. A step of the same shape at the same address gets the
// same object again, so that a decode loop makes no new ones.
class StepView {
 public:
  // A view [rows], or with columns >= 0 [rows, columns] of rows `stride` elements apart.
  template <class T>
  nb::object get(const StepArray<T>& array, size_t rows, int64_t columns = -1, int64_t stride = 1) {
    if (object_.is_valid() && array.data() == data_ && rows == rows_ && columns == columns_)
      return object_;
    using Owner = std::shared_ptr<T[]>;
    const nb::capsule owner(new Owner(array.owner()),
                            [](void* p) noexcept { delete static_cast<Owner*>(p); });
    const size_t shape[] = {rows, static_cast<size_t>(columns)};
    const int64_t strides[] = {stride, 1};
    object_ = nb::cast(
        nb::ndarray<nb::numpy, T>(array.data(), columns < 0 ? 1 : 2, shape, owner, strides));
    data_ = array.data();
    rows_ = rows;
    columns_ = columns;
    return object_;
  }

 private:
  nb::object object_;
  const void* data_ = nullptr;
  size_t rows_ = 0;
  int64_t columns_ = 0;
};

// The views of a StepBatch.
struct StepViews {
  StepView block_table, slot_mapping, seq_lens, cu_seqlens_q, positions, copies, changes;
};

// A manager and the views of its steps.
struct PyManager {
  KVCacheManager manager;
  std::vector<StepViews> views;  // one a layer group

  PyManager(int32_t num_blocks, int32_t block_size, bool prefix_caching, int32_t async_depth,
            const KVCacheOptions& options)
      : manager(num_blocks, block_size, prefix_caching, async_depth, options),
        views(manager.num_groups()) {}
  explicit PyManager(std::string_view snapshot)
      : manager(KVCacheManager::restore(snapshot)), views(manager.num_groups()) {}
};

// quire.Sequence. Freed by the manager, not by Python's reference count.
struct PySequence {
  nb::object owner;  // keeps the manager alive
  PyManager* manager;
  SequenceId id;
};

// quire.StepBatch: the arrays of one step, while no later step has overwritten them. Where there is
// no GIL, the owner's lock keeps steps and those who look at their arrays apart.
struct PyStepBatch {
  nb::object owner;
  PyManager* manager;
  int64_t ticket;
  int32_t group = 0;

  // f(the step); ValueError if it is not the latest.
  template <class F>
  auto read(F f) const {
    const nb::ft_object_guard guard(owner);
    return f(get());
  }
  StepViews& views() const { return manager->views[group]; }

 private:
  const StepBatch& get() const;
};

void bind_layer_groups(nb::module_& m);
void bind_scheduler(nb::module_& m);
void bind_step_batch(nb::module_& m);
void bind_kv_steps(nb::class_<PyManager>& manager);
void bind_kv_tiers(nb::module_& m, nb::class_<PyManager>& manager);

}  // namespace quire::python
