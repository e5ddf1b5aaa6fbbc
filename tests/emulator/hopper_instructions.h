// SPDX-License-Identifier: Apache-2.0
// What the host does for a primitive of cuda/prim/sm90.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

#include "emulator/block.h"
#include "emulator/numbers.h"
#include "emulator/tensor_map.h"

namespace quire::emulator {

// --- mbarriers and the order of proxies
// ------------------------------------------------------------

inline void init_mbarrier(uint32_t address, uint32_t count, Site site) {
  Block::current().at("mbarrier.init", site);
  Block::current().init_mbarrier(address, count);
}

inline void arrive(uint32_t address, uint32_t bytes, Site site) {
  Block::current().at("mbarrier.arrive", site);
  Block::current().arrive(address, bytes);
}

inline void wait_mbarrier(uint32_t address, uint32_t parity, Site site) {
  Block::current().at("mbarrier.try_wait", site);
  Block::current().wait_mbarrier(address, parity & 1);
}

// --- Bulk copies
// -----------------------------------------------------------------------------------

// Where swizzling over 128 bytes puts the byte at `address`.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Brings the box at (c0, c1, c2, c3) to shared memory; what is outside of the tensor becomes zero.
inline void copy_box(uint32_t destination, const void* map, uint32_t mbarrier, const int (&c)[4],
                     Site site) {
  Block& block = Block::current();
  block.at("cp.async.bulk.tensor", site);
  TensorMapCode code;
  std::memcpy(&code, map, sizeof code);
  if (!code.is_valid() || reinterpret_cast<uintptr_t>(map) % 64 != 0)
    block.fail("no tensor map there");
  if (code.box[0] * 2 != 128 || code.box[2] != 1 || code.box[3] != 1)
    block.fail("expected a box of rows of 128 bytes");
  struct Row {
    const uint8_t* source;
    uint32_t valid;  // bytes
  };
  const auto is_inside = [&code](int dim, int64_t at) {
    return at >= 0 && at < static_cast<int64_t>(code.dims[dim]);
  };
  std::vector<Row> rows(code.box[1]);
  for (uint32_t r = 0; r < code.box[1]; ++r) {
    const int64_t row = int64_t{c[1]} + r;
    int64_t columns = 0;
    if (is_inside(0, c[0]) && is_inside(1, row) && is_inside(2, c[2]) && is_inside(3, c[3]))
      columns = std::min<int64_t>(64, static_cast<int64_t>(code.dims[0]) - c[0]);
    rows[r] = {code.base + 2 * int64_t{c[0]} + row * static_cast<int64_t>(code.strides[0]) +
                   c[2] * static_cast<int64_t>(code.strides[1]) +
                   c[3] * static_cast<int64_t>(code.strides[2]),
               static_cast<uint32_t>(2 * columns)};
    if (columns > 0) block.check_global(rows[r].source, rows[r].valid, 16);
  }
  uint8_t* shared = block.shared();
  block.copy_bulk(destination, 128 * code.box[1], mbarrier, [shared, destination, rows] {
    for (uint32_t r = 0; r < rows.size(); ++r) {
      uint8_t row[128] = {};
      if (rows[r].valid > 0) std::memcpy(row, rows[r].source, rows[r].valid);
      for (uint32_t piece = 0; piece < 128; piece += 16)
        std::memcpy(shared + swizzled(destination + 128 * r + piece), row + piece, 16);
    }
  });
}

// --- Registers of warpgroups
// -----------------------------------------------------------------------

// `more`: by the instruction that takes registers; else by the one that gives them back.
inline void set_registers(int count, bool more, Site site) {
  Block& block = Block::current();
  if (count % 8 != 0 || count < 24 || count > 256)
    block.fail("registers: expected 24, 32, ... 256");
  block.group_collective("setmaxnreg", site, count, [&](int*(&)[kGroupThreads], Warpgroup& group) {
    const int before = group.registers > 0 ? group.registers
                                           : HopperState::registers_at_launch(block.num_threads());
    if (more ? count < before : count > before)
      block.fail(more ? "setmaxnreg.inc to fewer registers than there are"
                      : "setmaxnreg.dec to more registers than there are");
    group.registers = count;
    block.check_registers();
  });
}

// --- Products
// --------------------------------------------------------------------------------------

// A matrix in shared memory: swizzled over 128 bytes. Fields as the PTX manual gives them.
struct MatrixDescriptor {
  uint64_t bits;

  uint32_t start() const { return static_cast<uint32_t>(bits & 0x3FFF) << 4; }
  uint32_t leading() const { return static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4; }
  uint32_t stride() const { return static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4; }
  bool is_understood() const {
    return bits >> 62 == 1 && (bits >> 49 & 7) == 0 && (start() & 0x380) == 0;
  }
  // Of an operand with `k` along the rows of 128 bytes: rows of it come in groups of eight.
  uint32_t at_k_major(int row, int k) const {
    return swizzled(start() + row / 8 * stride() + row % 8 * 128 + k * 2);
  }
  // Of an operand with `n` along them: 64 columns, then `leading` bytes on the next.
  uint32_t at_n_major(int n, int k) const {
    return swizzled(start() + n / 64 * leading() + k / 8 * stride() + k % 8 * 128 + n % 64 * 2);
  }
};

struct ProductArgument {
  float* sums;
  uint32_t a[4];
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

struct ProductShape {
  int columns;  // n
  bool is_bfloat16, a_in_registers, b_is_n_major;
  bool is_e4m3 = false;

  int depth() const { return is_e4m3 ? 32 : 16; }  // k
};

// What a warpgroup gave, kept until the product has happened.
struct Product {
  ProductShape shape;
  int first_thread;
  ProductArgument threads[kGroupThreads];
  bool is_read = false, has_saved = false;
  float left[64][32], right[32][256];
  float saved[kGroupThreads][128];  // sums before the product

  // Row and column of register i of thread t, in a 64 x n matrix of sums.
  static int row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + (i >> 1 & 1) * 8; }
  static int column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + (i & 1); }

  void read() {
    const float* table =
        shape.is_bfloat16 ? widening_table<Bfloat16Tag>() : widening_table<Float16Tag>();
    if (shape.is_e4m3) return read_codes();
    if (!shape.a_in_registers)
      read_matrix(table, {threads[0].a_descriptor}, false, 64,
                  [this](int i, int k, float x) { left[i][k] = x; });
    else if (!is_read)
      read_registers(table);
    read_matrix(table, {threads[0].b_descriptor}, shape.b_is_n_major, shape.columns,
                [this](int n, int k, float x) { right[k][n] = x; });
    is_read = true;
  }

  // The sums are NaN until they are there.
  void take_sums(bool save) {
    has_saved = save;
    for (int t = 0; t < kGroupThreads; ++t)
      for (int i = 0; i < shape.columns / 2; ++i) {
        if (save) saved[t][i] = threads[t].sums[i];
        threads[t].sums[i] = std::numeric_limits<float>::quiet_NaN();
      }
  }

  void deliver() {
    static thread_local float sums[64][256], before[64][256];
    std::memset(sums, 0, sizeof sums);
    for (int t = 0; t < kGroupThreads; ++t)
      for (int i = 0; i < shape.columns / 2; ++i) {
        const float saved_sum = has_saved ? saved[t][i] : threads[t].sums[i];
        before[row(t, i)][column(t, i)] = threads[t].accumulate ? saved_sum : 0.0f;
      }
    for (int i = 0; i < 64; ++i) {
      for (int k = 0; k < shape.depth(); ++k)
        for (int n = 0; n < shape.columns; ++n) sums[i][n] += left[i][k] * right[k][n];
      for (int n = 0; n < shape.columns; ++n) sums[i][n] = before[i][n] + sums[i][n];
      if (shape.is_e4m3) add_cut(i, before[i], sums[i]);
    }
    for (int t = 0; t < kGroupThreads; ++t)
      for (int i = 0; i < shape.columns / 2; ++i)
        threads[t].sums[i] = sums[row(t, i)][column(t, i)];
  }

 private:
  struct Float16Tag {
    static constexpr bool is_bfloat16 = false;
  };
  struct Bfloat16Tag {
    static constexpr bool is_bfloat16 = true;
  };

  // 16 bytes at a time, along k or along the other dimension.
  template <class Set>
  void read_matrix(const float* table, MatrixDescriptor matrix, bool is_n_major, int rows,
                   Set set) {
    Block& block = Block::current();
    const int row_step = is_n_major ? 8 : 1, k_step = is_n_major ? 1 : 8;
    for (int row = 0; row < rows; row += row_step)
      for (int k = 0; k < 16; k += k_step) {
        const uint32_t at = is_n_major ? matrix.at_n_major(row, k) : matrix.at_k_major(row, k);
        block.check_product(first_thread, at);
        if (is_read) continue;
        uint16_t piece[8];
        std::memcpy(piece, block.shared() + at, 16);
        for (int e = 0; e < 8; ++e)
          is_n_major ? set(row + e, k, table[piece[e]]) : set(row, k + e, table[piece[e]]);
      }
  }

  // Of e4m3: both operands along k; the left one in registers.
  void read_codes() {
    Block& block = Block::current();
    const float* table = e4m3_table();
    const MatrixDescriptor matrix{threads[0].b_descriptor};
    for (int n = 0; n < shape.columns; ++n)
      for (int k = 0; k < 32; k += 16) {
        const uint32_t at = matrix.at_k_major(n, k / 2);
        block.check_product(first_thread, at);
        for (int e = 0; e < 16 && !is_read; ++e) right[k + e][n] = table[block.shared()[at + e]];
      }
    for (int t = 0; t < kGroupThreads && !is_read; ++t)
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 4; ++e)
          left[row(t, (r & 1) * 2)][t % 4 * 4 + (r >> 1) * 16 + e] =
              table[threads[t].a[r] >> 8 * e & 255];
    is_read = true;
  }

  // How sums of e4m3 are reported to come about: the 32 products and the sum so far are cut,
  // towards zero, to multiples of 2^-13 of the largest one's power of two, and then added.
  // `sums`: the exact ones, which stay where they are not finite.
  void add_cut(int i, const float* before, float* sums) const {
    float top[256], unit[256];
    int32_t cut[256];
    for (int n = 0; n < shape.columns; ++n) top[n] = std::fabs(before[n]);
    for (int k = 0; k < 32; ++k)
      for (int n = 0; n < shape.columns; ++n)
        top[n] = std::max(top[n], std::fabs(left[i][k] * right[k][n]));
    for (int n = 0; n < shape.columns; ++n) {
      unit[n] =
          top[n] > 0 && std::isfinite(sums[n]) ? std::ldexp(1.0f, 13 - std::ilogb(top[n])) : 0;
      cut[n] = static_cast<int32_t>(std::isfinite(before[n]) ? before[n] * unit[n] : 0);
    }
    for (int k = 0; k < 32; ++k)
      for (int n = 0; n < shape.columns; ++n) {
        const float term = left[i][k] * right[k][n] * unit[n];
        cut[n] += static_cast<int32_t>(term == term ? term : 0.0f);
      }
    for (int n = 0; n < shape.columns; ++n)
      if (unit[n] > 0) sums[n] = static_cast<float>(cut[n]) / unit[n];
  }

  void read_registers(const float* table) {
    for (int t = 0; t < kGroupThreads; ++t)
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e)
          left[row(t, (r & 1) * 2)][t % 4 * 2 + (r >> 1) * 8 + e] =
              table[threads[t].a[r] >> 16 * e & 0xFFFF];
  }
};

// `at_once`: whoever calls can't keep the sums in one place until the wait.
inline void multiply(ProductArgument argument, ProductShape shape, bool at_once, Site site) {
  Block& block = Block::current();
  const auto issue = [&](ProductArgument*(&threads)[kGroupThreads], Warpgroup& group) {
    auto product = std::make_shared<Product>();
    product->shape = shape;
    product->first_thread = block.thread() / kGroupThreads * kGroupThreads;
    for (int t = 0; t < kGroupThreads; ++t) product->threads[t] = *threads[t];
    for (const ProductArgument& thread : product->threads)
      if (thread.b_descriptor != argument.b_descriptor ||
          thread.a_descriptor != argument.a_descriptor)
        block.fail("threads of the warpgroup gave different descriptors");
    if (!MatrixDescriptor{argument.b_descriptor}.is_understood() ||
        (!shape.a_in_registers && !MatrixDescriptor{argument.a_descriptor}.is_understood()))
      block.fail("a descriptor that is not of a matrix swizzled over 128 bytes");
    if (!group.products.is_fenced) block.fail("no wgmma.fence since the latest wait");
    if (at_once) return product->read(), product->deliver();
    product->take_sums(!group.products.has_sums(product->threads[0].sums));
    group.products.issue({product->threads[0].sums, [product] { product->read(); },
                          [product] { product->deliver(); }},
                         block.happens_now());
  };
  block.group_collective("wgmma.mma_async", site, argument, issue);
}

inline void fence_products(Site site) {
  int nothing = 0;
  Block::current().group_collective("wgmma.fence", site, nothing, [](auto&, Warpgroup& group) {
    group.products.is_fenced = true;
  });
}

inline void commit_products(Site site) {
  int nothing = 0;
  Block::current().group_collective("wgmma.commit_group", site, nothing,
                                    [](auto&, Warpgroup& group) { group.products.commit(); });
}

inline void wait_products(int allowed, Site site) {
  int nothing = 0;
  Block::current().group_collective("wgmma.wait_group", site, nothing,
                                    [allowed](auto&, Warpgroup& group) {
                                      group.products.wait(static_cast<size_t>(allowed));
                                      group.products.is_fenced = false;
                                    });
}

}  // namespace quire::emulator
