// SPDX-License-Identifier: Apache-2.0
// The CUDA backend is a library of its own, loaded at the first use of a GPU: without it, or
// without a driver, everything else works.
#include <dlfcn.h>
#include <unistd.h>

#include <string>

#include "quire/backend.h"

namespace quire {
namespace {

constexpr const char* kLibrary = "libquire_cuda.so";

struct Loaded {
  Backend* backend = nullptr;
  std::string state = "built without CUDA";
};

// "/usr/lib/" of the library or program that holds this code; "" if the loader does not say.
std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || !info.dli_fname) return "";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);  // npos + 1: none
}

Loaded load() {
  Loaded loaded;
  const std::string folder = own_folder();
  if (folder.empty()) return loaded;
  const std::string path = folder + kLibrary;
  if (access(path.c_str(), R_OK) != 0) return loaded;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    loaded.state = std::string(kLibrary) + " does not load: " + dlerror();
    return loaded;
  }
  using Entry = Backend* (*)(std::string*);
  if (const auto entry = reinterpret_cast<Entry>(dlsym(library, "quire_cuda_backend")))
    loaded.backend = entry(&loaded.state);
  return loaded;
}

const Loaded& loaded() {
  static const Loaded result = load();
  return result;
}

}  // namespace

Backend* cuda_backend() { return loaded().backend; }

std::string cuda_state() { return loaded().state; }

}  // namespace quire
