// SPDX-License-Identifier: Apache-2.0
// What the host does for a primitive of cuda/prim: the meaning of one PTX instruction, with every
// check that the emulator can make.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/block.h"
#include "emulator/numbers.h"

namespace quire::emulator {

template <class T>
T load_shared(uint32_t address, Site site) {
  Block& block = Block::current();
  block.at("ld.shared", site);
  block.check_shared(block.thread(), address, sizeof(T), sizeof(T), false);
  T value;
  std::memcpy(&value, block.shared() + address, sizeof(T));
  return value;
}

template <class T>
void store_shared(uint32_t address, const T& value, Site site) {
  Block& block = Block::current();
  block.at("st.shared", site);
  block.check_shared(block.thread(), address, sizeof(T), sizeof(T), true);
  std::memcpy(block.shared() + address, &value, sizeof(T));
}

template <class T>
T load_global(const T* pointer, Site site) {
  Block& block = Block::current();
  block.at("ld.global", site);
  block.check_global(pointer, sizeof(T), sizeof(T));
  return *pointer;
}

template <class T>
void store_global(T* pointer, const T& value, Site site) {
  Block& block = Block::current();
  block.at("st.global", site);
  block.check_global(pointer, sizeof(T), sizeof(T));
  block.stored_global();
  *pointer = value;
}

// atom.inc: counts 0, 1, ..., last, 0. Returns the value before. `releases`: tells other blocks of
// what this one has stored.
inline uint32_t atomic_increment(uint32_t* pointer, uint32_t last, bool releases, Site site) {
  Block& block = Block::current();
  block.at("atom.inc", site);
  block.check_global(pointer, sizeof(*pointer), sizeof(*pointer));
  if (releases) block.announce();
  const uint32_t before = *pointer;
  *pointer = before >= last ? 0 : before + 1;
  return before;
}

inline void copy_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t valid,
                       Site site) {
  Block& block = Block::current();
  block.at("cp.async", site);
  if (valid > bytes) block.fail("more valid bytes than bytes");
  block.copy_async(destination, source, bytes, valid);
}

// 32 bits of every lane, read by the lane whose index differs in the bits of `lane_mask` (xor) or
// that is named (index).
inline uint32_t shuffle(uint32_t value, int operand, bool is_xor, Site site) {
  struct Argument {
    uint32_t value;
    int source;
  };
  Block& block = Block::current();
  const int lane = block.thread() % Block::kWarpSize;
  Argument argument{value, (is_xor ? lane ^ operand : operand) & 31};
  block.warp_collective(is_xor ? "shfl.bfly" : "shfl.idx", site, argument,
                        [](Argument*(&lanes)[32]) {
                          uint32_t values[32];
                          for (int i = 0; i < 32; ++i) values[i] = lanes[i]->value;
                          for (Argument* lane : lanes) lane->value = values[lane->source];
                        });
  return argument.value;
}

// Eight rows of 16 bytes a matrix; rows whose 16-byte columns lie in the same banks wait for each
// other.
inline int bank_conflicts(const uint32_t (&rows)[8]) {
  int passes = 0, users[8] = {};
  for (uint32_t address : rows) passes = std::max(passes, ++users[address / 16 % 8]);
  return passes - 1;
}

// ldmatrix: lane 8j + i names row i of matrix j; of each matrix, lane 4g + t gets elements 2t and
// 2t + 1 of row g, or with `transposed` of column g.
inline void ldmatrix(uint32_t* registers, int count, bool transposed, uint32_t row, Site site) {
  struct Argument {
    uint32_t* registers;
    uint32_t row;
  };
  Argument argument{registers, row};
  Block& block = Block::current();
  const auto run = [&block, count, transposed](Argument*(&lanes)[32]) {
    const int first_thread = block.thread() / 32 * 32;
    for (int j = 0; j < count; ++j) {
      uint16_t matrix[8][8];
      uint32_t rows[8];
      for (int i = 0; i < 8; ++i) {
        rows[i] = lanes[8 * j + i]->row;
        block.check_shared(first_thread + 8 * j + i, rows[i], 16, 16, false);
        std::memcpy(matrix[i], block.shared() + rows[i], 16);
      }
      block.report().ldmatrix += 1;
      block.report().ldmatrix_conflicts += bank_conflicts(rows);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t low = transposed ? matrix[t][g] : matrix[g][t];
        const uint32_t high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
        lanes[lane]->registers[j] = low | high << 16;
      }
    }
  };
  block.warp_collective(transposed ? "ldmatrix.trans" : "ldmatrix", site, argument, run);
}

// mma.m16n8k16: c += a b in float32; fragments as the PTX manual draws them.
struct MmaArgument {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class Type>
void run_mma(MmaArgument* (&lanes)[32]) {
  const float* table = widening_table<Type>();
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    const MmaArgument& m = *lanes[lane];
    for (int r = 0; r < 4; ++r) {
      const int row = g + (r & 1) * 8, column = t + (r >> 1) * 8;
      a[row][column] = table[m.a[r] & 0xFFFF];
      a[row][column + 1] = table[m.a[r] >> 16];
      c[g + (r >> 1) * 8][t + (r & 1)] = m.c[r];
    }
    for (int r = 0; r < 2; ++r) {
      b[t + r * 8][g] = table[m.b[r] & 0xFFFF];
      b[t + r * 8 + 1][g] = table[m.b[r] >> 16];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r)
      lanes[lane]->c[r] = c[lane / 4 + (r >> 1) * 8][lane % 4 * 2 + (r & 1)];
}

template <class Type>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  MmaArgument argument{c, a, {b0, b1}};
  Block::current().warp_collective("mma.m16n8k16", site, argument, run_mma<Type>);
}

}  // namespace quire::emulator
