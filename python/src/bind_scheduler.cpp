// SPDX-License-Identifier: Apache-2.0
// Scheduler and its batches.
#include "quire/scheduler.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "kv_cache.h"
#include "named.h"
#include "quire/error.h"

namespace quire::python {
namespace {

struct PyScheduler {
  nb::object manager_object;  // keeps the manager alive; outlives the scheduler below
  PyManager* manager;
  Scheduler scheduler;
  StepView request_ids, num_new_tokens, token_ids, sampling, swap_out, swap_in;

  PyScheduler(nb::handle_t<PyManager> object, const SchedulerConfig& config)
      : manager_object(nb::borrow(object)),
        manager(nb::inst_ptr<PyManager>(object)),
        scheduler(manager->manager, config) {}
};

struct PyScheduledBatch : PyStepBatch {
  nb::object scheduler_object;
  PyScheduler* scheduler;

  template <class F>
  auto read_scheduled(F f) const {
    return read([&](const StepBatch&) { return f(scheduler->scheduler.batch()); });
  }
};

std::optional<PyScheduledBatch> schedule(nb::handle_t<PyScheduler> self) {
  PyScheduler& scheduler = *nb::inst_ptr<PyScheduler>(self);
  const nb::ft_object_guard guard(scheduler.manager_object);  // see PyStepBatch
  const ScheduledBatch* batch = scheduler.scheduler.schedule();
  if (!batch) return std::nullopt;
  return PyScheduledBatch{{scheduler.manager_object, scheduler.manager, batch->step->ticket()},
                          nb::borrow(self),
                          &scheduler};
}

nb::list commit(PyScheduler& self, nb::handle sampled) {
  const Int32Arg tokens(sampled, "commit: sampled");
  const nb::ft_object_guard guard(self.manager_object);
  nb::list finished;
  for (int32_t id : self.scheduler.commit({tokens.data(), tokens.size()})) finished.append(id);
  return finished;
}

// A property that shows a whole array of the batch.
template <auto Array, auto View>
nb::object scheduled_array(const PyScheduledBatch& batch) {
  return batch.read_scheduled([&](const ScheduledBatch& scheduled) {
    const auto& array = scheduled.*Array;
    return (batch.scheduler->*View).get(array, array.size());
  });
}

// A property that shows pairs of blocks, [n, 2].
template <auto Array, auto View>
nb::object scheduled_pairs(const PyScheduledBatch& batch) {
  return batch.read_scheduled([&](const ScheduledBatch& scheduled) {
    const auto& array = scheduled.*Array;
    return (batch.scheduler->*View).get(array, array.size() / 2, 2, 2);
  });
}

void bind_scheduled_batch(nb::module_& m) {
  nb::class_<PyScheduledBatch, PyStepBatch>(
      m, "ScheduledBatch",
      "One step of a Scheduler: what to compute, and all arrays of StepBatch, a row a request.\n\n"
      "Example::\n\n    hidden = model(batch.token_ids, batch.positions, ...)\n"
      "    last_rows = batch.cu_seqlens_q[1:][batch.sampling] - 1")
      .def_prop_ro(
          "request_ids", &scheduled_array<&ScheduledBatch::request_ids, &PyScheduler::request_ids>,
          nb::for_getter(nb::sig("def request_ids(self) -> numpy.typing.NDArray[numpy.int32]")),
          "The request of each row, int32 [batch].")
      .def_prop_ro(
          "num_new_tokens",
          &scheduled_array<&ScheduledBatch::num_new_tokens, &PyScheduler::num_new_tokens>,
          nb::for_getter(nb::sig("def num_new_tokens(self) -> numpy.typing.NDArray[numpy.int32]")),
          "Tokens to compute of each row, int32 [batch].")
      .def_prop_ro(
          "token_ids", &scheduled_array<&ScheduledBatch::token_ids, &PyScheduler::token_ids>,
          nb::for_getter(nb::sig("def token_ids(self) -> numpy.typing.NDArray[numpy.int32]")),
          "The tokens to compute, row after row, int32 [total new tokens].")
      .def_prop_ro(
          "sampling", &scheduled_array<&ScheduledBatch::sampling, &PyScheduler::sampling>,
          nb::for_getter(nb::sig("def sampling(self) -> numpy.typing.NDArray[numpy.int32]")),
          "The rows that compute their last known token and so sample the next, int32 [m].")
      .def_prop_ro(
          "swap_out", &scheduled_pairs<&ScheduledBatch::swap_out, &PyScheduler::swap_out>,
          nb::for_getter(nb::sig("def swap_out(self) -> numpy.typing.NDArray[numpy.int32]")),
          "Blocks of preempted requests to copy to host memory before the step, int32 [n, 2]:\n"
          "(block, host block).\n\n"
          "These come first, then swap_in, then copies; KVTiers.swap() makes both.")
      .def_prop_ro(
          "swap_in", &scheduled_pairs<&ScheduledBatch::swap_in, &PyScheduler::swap_in>,
          nb::for_getter(nb::sig("def swap_in(self) -> numpy.typing.NDArray[numpy.int32]")),
          "Blocks of requests that come back to copy before the step, int32 [n, 2]:\n"
          "(host block, block).")
      .def_prop_ro(
          "num_preempted",
          [](const PyScheduledBatch& b) {
            return b.read_scheduled([](const ScheduledBatch& s) { return s.num_preempted; });
          },
          "Requests that lost their blocks since the batch before.");
}

void bind_state(nb::class_<PyScheduler>& scheduler) {
  scheduler
      .def_prop_ro(
          "num_running", [](const PyScheduler& self) { return self.scheduler.num_running(); },
          "Requests that hold blocks.")
      .def_prop_ro(
          "num_waiting", [](const PyScheduler& self) { return self.scheduler.num_waiting(); },
          "Requests in the queue, preempted ones too.")
      .def_prop_ro(
          "num_preemptions",
          [](const PyScheduler& self) { return self.scheduler.num_preemptions(); },
          "How often a request lost its blocks so far.")
      .def_prop_ro(
          "has_work", [](const PyScheduler& self) { return self.scheduler.has_work(); },
          "Whether a request is running or waiting.")
      .def(
          "explain", [](const PyScheduler& self) { return self.scheduler.explain(); },
          "What the latest schedule() decided, and why no further request was admitted.\n\n"
          "A line each: who was preempted, admitted, computed in chunks, and what the next one\n"
          "waits for.\n\n"
          "Example::\n\n    print(scheduler.explain())")
      .def(
          "validate", [](const PyScheduler& self) { self.scheduler.validate(); },
          "Checks the queues and the manager; raises RuntimeError for a broken invariant.\n\n"
          "Example::\n\n    scheduler.validate()");
}

void bind_preemption_costs(nb::module_& m) {
  nb::class_<PreemptionCosts>(
      m, "PreemptionCosts",
      "What a Scheduler weighs when it takes a request's blocks: to compute its tokens again, or\n"
      "to move its blocks to host memory and back.\n\n"
      "seconds_per_token of prefill without attention, seconds_per_token_pair of attention (a\n"
      "query and a key), bytes_per_second between device and host one way (0: never move),\n"
      "seconds_per_swap once each way, bytes_per_block of all layers.\n\n"
      "Example::\n\n"
      "    costs = quire.PreemptionCosts(seconds_per_token=1e-4, bytes_per_second=5e10,\n"
      "                                  bytes_per_block=cache.block_bytes)")
      .def(named("__init__",
                 [](PreemptionCosts* self, double seconds_per_token, double seconds_per_token_pair,
                    double bytes_per_second, double seconds_per_swap, int64_t bytes_per_block) {
                   new (self) PreemptionCosts{seconds_per_token, seconds_per_token_pair,
                                              bytes_per_second, seconds_per_swap, bytes_per_block};
                 }),
           nb::kw_only(), nb::arg("seconds_per_token") = 0.0,
           nb::arg("seconds_per_token_pair") = 0.0, nb::arg("bytes_per_second") = 0.0,
           nb::arg("seconds_per_swap") = 0.0, nb::arg("bytes_per_block") = 0,
           nb::sig("def __init__(self, *, seconds_per_token: float = 0.0, seconds_per_token_pair: "
                   "float = 0.0, bytes_per_second: float = 0.0, seconds_per_swap: float = 0.0, "
                   "bytes_per_block: int = 0) -> None"))
      .def_ro("seconds_per_token", &PreemptionCosts::seconds_per_token)
      .def_ro("seconds_per_token_pair", &PreemptionCosts::seconds_per_token_pair)
      .def_ro("bytes_per_second", &PreemptionCosts::bytes_per_second)
      .def_ro("seconds_per_swap", &PreemptionCosts::seconds_per_swap)
      .def_ro("bytes_per_block", &PreemptionCosts::bytes_per_block);
}

}  // namespace

void bind_scheduler(nb::module_& m) {
  bind_scheduled_batch(m);
  bind_preemption_costs(m);
  nb::class_<PyScheduler> scheduler(
      m, "Scheduler",
      "Continuous batching over a KVCacheManager.\n\n"
      "At most max_tokens_per_step tokens and max_seqs requests a step; long prompts are computed\n"
      "in chunks. Admission leaves the share `watermark` of the blocks free. When blocks run out,\n"
      "the last request (of the lowest priority, the latest) waits again and is computed anew;\n"
      "it keeps its generated tokens. Of `prefix_window` waiting requests of equal rank the one\n"
      "with the longest cached prefix comes first; who was overtaken max_overtakes times is due\n"
      "whatever its rank. Equal calls lead to equal decisions: see explain().\n\n"
      "With `preemption` costs and a manager of num_host_blocks, a request\n"
      "whose blocks are cheaper moved than computed again waits in host memory: each batch says\n"
      "what to copy before its step, swap_out and swap_in (KVTiers.swap).\n\n"
      "Any number of threads may call every method: one schedules and commits, others add.\n\n"
      "Raises ValueError for counts below 1, a watermark outside [0, 1) or negative costs.\n\n"
      "Example::\n\n"
      "    scheduler = quire.Scheduler(manager)\n"
      "    scheduler.add(prompt, max_new_tokens=100)\n"
      "    while (batch := scheduler.schedule()) is not None:\n"
      "        scheduler.commit(model(batch))     # int32, a token for each of batch.sampling");
  scheduler
      .def(named("__init__",
                 [](PyScheduler* self, nb::handle_t<PyManager> manager, int32_t max_tokens_per_step,
                    int32_t max_seqs, double watermark, int32_t prefix_window,
                    int32_t max_overtakes, const std::optional<PreemptionCosts>& preemption) {
                   new (self) PyScheduler(manager,
                                          {max_tokens_per_step, max_seqs, watermark, prefix_window,
                                           max_overtakes, preemption.value_or(PreemptionCosts{})});
                 }),
           nb::arg("manager"), nb::kw_only(), nb::arg("max_tokens_per_step") = 2048,
           nb::arg("max_seqs") = 256, nb::arg("watermark") = 0.01, nb::arg("prefix_window") = 1,
           nb::arg("max_overtakes") = 256, nb::arg("preemption") = nb::none(),
           nb::sig("def __init__(self, manager: KVCacheManager, *, max_tokens_per_step: int = "
                   "2048, max_seqs: int = 256, watermark: float = 0.01, prefix_window: int = 1, "
                   "max_overtakes: int = 256, preemption: PreemptionCosts | None = None) -> None"))
      .def(
          named("add",
                [](PyScheduler& self, nb::handle token_ids, int32_t max_new_tokens, Salt salt,
                   int32_t priority, std::string_view tenant) {
                  const Int32Arg tokens(token_ids, "add: token_ids");
                  return self.scheduler.add({tokens.data(), tokens.size()}, max_new_tokens, salt,
                                            {priority, tenant});
                }),
          nb::arg("token_ids"), nb::arg("max_new_tokens"), nb::arg("salt") = nb::none(),
          nb::kw_only(), nb::arg("priority") = 0, nb::arg("tenant") = "",
          nb::sig("def add(self, token_ids: numpy.typing.ArrayLike, max_new_tokens: int, "
                  "salt: str | None = None, *, priority: int = 0, tenant: str = '') -> int"),
          "Queues a request of these prompt tokens, int32 [n]; returns its id: 0, 1, 2, ...\n\n"
          "Higher priorities come first; of one priority the tenant whose requests had the fewest\n"
          "tokens computed and sampled (these count twice more), then whoever came first.\n\n"
          "Raises ValueError if prompt and max_new_tokens can never fit the pool.\n\n"
          "Example::\n\n    request_id = scheduler.add(prompt, max_new_tokens=100)")
      .def("schedule", &schedule,
           "Plans the next step.\n\n"
           "None when there is nothing to do or, if has_work still holds, when blocks first have\n"
           "to come back through KVCacheManager.retire(). Raises ValueError if the batch before\n"
           "was not committed.\n\n"
           "Example::\n\n    batch = scheduler.schedule()")
      .def(named("commit", &commit), nb::arg("sampled"),
           nb::sig("def commit(self, sampled: numpy.typing.ArrayLike) -> list[int]"),
           "The step has run; `sampled` int32 [m] are its new tokens in the order of "
           "batch.sampling.\n\n"
           "Returns the ids of requests that have reached max_new_tokens. Raises ValueError for\n"
           "a wrong length.\n\n"
           "Example::\n\n    finished = scheduler.commit(sampled)")
      .def(named("finish", [](PyScheduler& self, int32_t id) { self.scheduler.finish(id); }),
           nb::arg("request_id"), nb::sig("def finish(self, request_id: int) -> None"),
           "Ends a request early, in any state; no effect on one that has ended.\n\n"
           "Raises ValueError for an id that add() never returned.\n\n"
           "Example::\n\n    scheduler.finish(request_id)");
  bind_state(scheduler);
}

}  // namespace quire::python
