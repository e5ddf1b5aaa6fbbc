// SPDX-License-Identifier: Apache-2.0
// How many threads are worth having: what the operating system lets this process use.
#pragma once

#include <string>

namespace quire::cpu {

// At least 1: the CPUs of the affinity mask, and no more than the quota of the control group,
// rounded down, as threads beyond it are only put to sleep in turn.
int available_cpus();

// The least quota, in CPUs, of a process's control group and those above it; infinity without one.
// `membership` is the text of /proc/self/cgroup, `root` where control groups are mounted. Both
// versions: cpu.max, and cpu.cfs_quota_us with cpu.cfs_period_us.
double cgroup_quota(const std::string& membership, const std::string& root);

}  // namespace quire::cpu
