// SPDX-License-Identifier: Apache-2.0
// The C interface of Scheduler.
#include "quire/scheduler.h"

#include "c_api/handles.h"

struct QuireScheduler {
  quire::Scheduler scheduler;
};

using namespace quire::c;

namespace {

static_assert(sizeof(QuireBlockPair) == 2 * sizeof(int32_t));

const QuireBlockPair* pairs_of(const quire::StepArray<int32_t>& numbers) {
  return reinterpret_cast<const QuireBlockPair*>(numbers.data());
}

}  // namespace

QuireStatus quire_scheduler_new(QuireKVCacheManager* manager, const QuireSchedulerConfig* config,
                                QuireScheduler** scheduler) {
  return guard([&] {
    auto& self = deref("quire_scheduler_new: manager", manager).manager;
    QuireScheduler*& out = deref("quire_scheduler_new: scheduler", scheduler);
    const auto given = read_struct<QuireSchedulerConfig>("quire_scheduler_new: config", config,
                                                         QUIRE_SCHEDULER_CONFIG_INIT);
    const quire::SchedulerConfig wanted{
        given.max_tokens_per_step,
        given.max_seqs,
        given.watermark,
        given.prefix_window,
        given.max_overtakes,
        {given.seconds_per_token, given.seconds_per_token_pair, given.bytes_per_second,
         given.seconds_per_swap, given.bytes_per_block}};
    out = new QuireScheduler{quire::Scheduler(self, wanted)};
  });
}

void quire_scheduler_delete(QuireScheduler* scheduler) { delete scheduler; }

QuireStatus quire_scheduler_add(QuireScheduler* scheduler, const QuireRequest* request,
                                int32_t* request_id) {
  return guard([&] {
    auto& self = deref("quire_scheduler_add: scheduler", scheduler).scheduler;
    int32_t& out = deref("quire_scheduler_add: request_id", request_id);
    const auto given =
        read_struct<QuireRequest>("quire_scheduler_add: request", request, QUIRE_REQUEST_INIT);
    quire::Salt salt;
    if (given.salt) salt.emplace(given.salt, given.salt_size);
    quire::RequestOptions options;
    options.priority = given.priority;
    if (given.tenant) options.tenant = {given.tenant, given.tenant_size};
    out = self.add(as_span("quire_scheduler_add: token_ids", given.token_ids, given.num_tokens),
                   given.max_new_tokens, salt, options);
  });
}

QuireStatus quire_scheduler_schedule(QuireScheduler* scheduler, QuireScheduledBatch* batch,
                                     QuireStepBatch* step) {
  return guard([&] {
    auto& self = deref("quire_scheduler_schedule: scheduler", scheduler).scheduler;
    check_struct_size("quire_scheduler_schedule: batch", batch);
    check_struct_size("quire_scheduler_schedule: step", step);
    QuireScheduledBatch result = QUIRE_SCHEDULED_BATCH_INIT;
    QuireStepBatch arrays = QUIRE_STEP_BATCH_INIT;
    const auto lock = self.manager().lock();
    if (const quire::ScheduledBatch* planned = self.schedule()) {
      result.request_ids = planned->request_ids.data();
      result.num_new_tokens = planned->num_new_tokens.data();
      result.token_ids = planned->token_ids.data();
      result.sampling = planned->sampling.data();
      result.num_rows = static_cast<int64_t>(planned->request_ids.size());
      result.num_token_ids = static_cast<int64_t>(planned->token_ids.size());
      result.num_sampling = static_cast<int64_t>(planned->sampling.size());
      result.num_preempted = planned->num_preempted;
      result.swap_out = pairs_of(planned->swap_out);
      result.swap_in = pairs_of(planned->swap_in);
      result.num_swap_out = static_cast<int64_t>(planned->swap_out.size() / 2);
      result.num_swap_in = static_cast<int64_t>(planned->swap_in.size() / 2);
      arrays = as_c(*planned->step);
    }
    write_struct(result, batch);
    write_struct(arrays, step);
  });
}

QuireStatus quire_scheduler_commit(QuireScheduler* scheduler, const int32_t* sampled,
                                   size_t num_sampled, const int32_t** finished,
                                   size_t* num_finished) {
  return guard([&] {
    auto& self = deref("quire_scheduler_commit: scheduler", scheduler).scheduler;
    const int32_t*& out = deref("quire_scheduler_commit: finished", finished);
    size_t& size = deref("quire_scheduler_commit: num_finished", num_finished);
    const auto ended =
        self.commit(as_span("quire_scheduler_commit: sampled", sampled, num_sampled));
    out = ended.data();
    size = ended.size();
  });
}

QuireStatus quire_scheduler_finish(QuireScheduler* scheduler, int32_t request_id) {
  return guard(
      [&] { deref("quire_scheduler_finish: scheduler", scheduler).scheduler.finish(request_id); });
}

QuireStatus quire_scheduler_info(const QuireScheduler* scheduler, QuireSchedulerInfo* info) {
  return guard([&] {
    const auto& self = deref("quire_scheduler_info: scheduler", scheduler).scheduler;
    check_struct_size("quire_scheduler_info: info", info);
    const auto lock = self.manager().lock();
    write_struct<QuireSchedulerInfo>({sizeof(QuireSchedulerInfo), self.num_running(),
                                      self.num_waiting(), self.num_preemptions()},
                                     info);
  });
}

QuireStatus quire_scheduler_explain(const QuireScheduler* scheduler, char* buffer, size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_scheduler_explain: scheduler", scheduler).scheduler;
    write_string("quire_scheduler_explain: size", self.explain(), buffer, size);
  });
}

QuireStatus quire_scheduler_validate(const QuireScheduler* scheduler) {
  return guard(
      [&] { deref("quire_scheduler_validate: scheduler", scheduler).scheduler.validate(); });
}
