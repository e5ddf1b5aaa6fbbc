// SPDX-License-Identifier: Apache-2.0
#include "cpu/available_cpus.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>

namespace quire::cpu {
namespace {

constexpr double kNoQuota = std::numeric_limits<double>::infinity();

// A group without a limit says "max" or -1, which leaves no quota; so does a file that is not
// there.
double quota_of(const std::string& folder) {
  double quota = -1, period = 0;
  if (!(std::ifstream(folder + "/cpu.max") >> quota >> period)) {
    quota = -1;
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : kNoQuota;
}

// Of the group at `path` below `mount` and of all above it. A container may see a path of its
// host's; then the groups that it does see are the ones that count.
double least_quota(const std::string& mount, std::string path) {
  double least = quota_of(mount);
  for (; !path.empty() && path != "/"; path.resize(path.rfind('/')))
    least = std::min(least, quota_of(mount + path));
  return least;
}

}  // namespace

double cgroup_quota(const std::string& membership, const std::string& root) {
  double least = kNoQuota;
  std::istringstream lines(membership);
  for (std::string line;
       std::getline(lines, line);) {  // "4:cpu,cpuacct:/path", version 2 "0::/path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos || second + 1 >= line.size() || line[second + 1] != '/')
      continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty())
      least = std::min({least, least_quota(root, path), least_quota(root + "/unified", path)});
    else if (("," + controllers + ",").find(",cpu,") != std::string::npos)
      least = std::min(
          {least, least_quota(root + "/" + controllers, path), least_quota(root + "/cpu", path)});
  }
  return least;
}

int available_cpus() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
  std::ostringstream membership;
  membership << std::ifstream("/proc/self/cgroup").rdbuf();
  const double quota = cgroup_quota(membership.str(), "/sys/fs/cgroup");
  if (quota < count) count = static_cast<int>(quota);
  return std::max(count, 1);
}

}  // namespace quire::cpu
