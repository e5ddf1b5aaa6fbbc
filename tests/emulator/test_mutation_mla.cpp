// SPDX-License-Identifier: Apache-2.0
// Likewise the decode kernel over latent caches, with items of two tiles of rows and of rows
// that see different keys.
#include "emulator/mutation.h"
#include "kernels/mla_decode.h"

namespace quire::emulator {
namespace {

std::string run_all(uint32_t seed) {
  using Decode = device::MlaTraits<device::Float16, 576, 32, 32, 2, device::Mode::kFast>;
  AttentionCase c;
  c.head_dim = 576, c.head_dim_v = 512;
  c.num_heads = 33, c.num_kv_heads = 1;
  c.is_latent = true;
  c.batch = {{1, 1}, {2, 45}, {1, 0}, {1, 530}};
  c.block_size = 7;
  const AttentionKernel decode = bind<Decode>(device::mla_decode<Decode>);
  const std::string error = run(decode, c, 32, seed);
  if (!error.empty()) return error;
  c.num_heads = 5;  // rows of a tile that see different keys
  c.batch = {{6, 40}};
  const std::string of_few = run(decode, c, 32, seed);
  if (!of_few.empty()) return of_few;
  // Pieces of two chunks, and one block that has the tiles of rows one after the other.
  using Narrow = device::MlaTraits<device::Float16, 576, 16, 16, 2, device::Mode::kFast>;
  c.num_heads = 20;
  c.batch.assign(4, {1, 1030});
  return run(bind<Narrow>(device::mla_decode<Narrow>), c, 16, seed, 2, 1);
}

}  // namespace
}  // namespace quire::emulator

int main() { return quire::emulator::run_seeds(quire::emulator::run_all); }
