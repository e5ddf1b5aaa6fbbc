// SPDX-License-Identifier: Apache-2.0
#include "host/driver.h"

#include <dlfcn.h>

#include "quire/error.h"

namespace quire::cuda {
namespace {

std::string version_name(int version) {  // 12040 -> "12.4"
  return concat(version / 1000, ".", version % 1000 / 10);
}

std::string error_name(const Driver& driver, int result) {
  const char* name = nullptr;
  if (driver.error_name(result, &name) != kSuccess || !name) return concat("error ", result);
  return name;
}

}  // namespace

bool load_driver(Driver& driver, std::string& problem) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    problem = "no CUDA driver: libcuda.so.1 could not be loaded";
    return false;
  }
  const char* missing = nullptr;
#define QUIRE_FIND(member, symbol, ...)                                               \
  driver.member = reinterpret_cast<decltype(driver.member)>(dlsym(library, #symbol)); \
  if (!driver.member && !missing) missing = #symbol;
  QUIRE_DRIVER_FUNCTIONS(QUIRE_FIND)
#undef QUIRE_FIND
  if (!missing) return true;
  int version = 0;
  if (driver.driver_version) driver.driver_version(&version);
  problem = concat("CUDA driver too old: it is for CUDA ", version_name(version), " and lacks ",
                   missing, "; expected CUDA ", version_name(kOldestDriver), " or later");
  return false;
}

int start(const Driver& driver, std::string& problem) {
  int version = 0, count = 0;
  driver.driver_version(&version);
  if (version < kOldestDriver) {
    problem = concat("CUDA driver too old: it is for CUDA ", version_name(version),
                     "; expected CUDA ", version_name(kOldestDriver), " or later");
    return 0;
  }
  int result = driver.init(0);
  if (result == kSuccess) result = driver.device_count(&count);
  if (result == kNoDevice || (result == kSuccess && count == 0))
    problem = "no CUDA device";
  else if (result != kSuccess)
    problem = concat("the CUDA driver does not start: ", error_name(driver, result));
  return problem.empty() ? count : 0;
}

void fail(const Driver& driver, int result, const char* call, const char* detail) {
  throw CudaError(concat(call, "(", detail, "): ", error_name(driver, result)));
}

}  // namespace quire::cuda
