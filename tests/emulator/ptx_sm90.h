// SPDX-License-Identifier: Apache-2.0
// The opcodes that the kernels of compute capability 9.0a have besides those of ptx_opcodes.h.
#pragma once

#include "emulator/hopper_instructions.h"
#include "emulator/ptx_machine.h"

namespace quire::emulator::ptx {

inline void mbarrier(PtxMachine& m, const PtxInstruction& i) {
  const auto at = [&](int operand) {
    return static_cast<uint32_t>(m.address(i.operands[operand]));
  };
  const auto value = [&](int operand) { return static_cast<uint32_t>(m.get(i.operands[operand])); };
  if (i.has("init")) return init_mbarrier(at(0), value(1), m.site(i));
  if (i.has("arrive")) return arrive(at(1), i.has("expect_tx") ? value(2) : 0, m.site(i));
  wait_mbarrier(at(1), value(2), m.site(i));  // try_wait
  m.set(i.operands[0], 1);
}

// cp.async.bulk.tensor [destination], [map, {coordinates}], [mbarrier]
inline void copy_bulk(PtxMachine& m, const PtxInstruction& i) {
  const std::vector<PtxOperand>& source = i.operands[1].elements;
  int coordinates[4];
  for (int c = 0; c < 4; ++c)
    coordinates[c] = static_cast<int>(m.get(source[1].elements[static_cast<size_t>(c)]));
  copy_box(static_cast<uint32_t>(m.address(i.operands[0])),
           reinterpret_cast<const void*>(m.get(source[0])),
           static_cast<uint32_t>(m.address(i.operands[2])), coordinates, m.site(i));
}

inline void setmaxnreg(PtxMachine& m, const PtxInstruction& i) {
  set_registers(static_cast<int>(m.get(i.operands[0])), i.has("inc"), m.site(i));
}

// {sums}, left, right, accumulates, 1, 1, then which operands lie transposed. nvcc may move sums
// between registers before the wait, as ptxas undoes that: here they are there at once.
inline void multiply_groups(PtxMachine& m, const PtxInstruction& i) {
  const std::vector<PtxOperand>& to = i.operands[0].elements;
  const PtxOperand& left = i.operands[1];
  const bool from_registers = left.kind == PtxOperand::Kind::kVector;
  ProductArgument argument{};
  float sums[128];
  argument.sums = sums;
  for (size_t e = 0; e < to.size(); ++e)
    sums[e] = std::bit_cast<float>(static_cast<uint32_t>(m.get(to[e])));
  for (size_t r = 0; r < 4 && from_registers; ++r)
    argument.a[r] = static_cast<uint32_t>(m.get(left.elements[r]));
  if (!from_registers) argument.a_descriptor = m.get(left);
  argument.b_descriptor = m.get(i.operands[2]);
  argument.accumulate = m.get(i.operands[3]) != 0;
  const bool is_e4m3 = i.has("e4m3");  // which has no operand that lies transposed
  const ProductShape shape{static_cast<int>(to.size()) * 2, i.has("bf16"), from_registers,
                           !is_e4m3 && m.get(i.operands.back()) != 0, is_e4m3};
  multiply(argument, shape, true, m.site(i));
  for (size_t e = 0; e < to.size(); ++e) m.set(to[e], std::bit_cast<uint32_t>(sums[e]));
}

inline void wgmma(PtxMachine& m, const PtxInstruction& i) {
  if (i.has("mma_async")) return multiply_groups(m, i);
  if (i.has("fence")) return fence_products(m.site(i));
  if (i.has("commit_group")) return commit_products(m.site(i));
  wait_products(static_cast<int>(m.get(i.operands[0])), m.site(i));
}

inline PtxHandler sm90_handler(const std::string& opcode) {
  return opcode == "mbarrier"     ? mbarrier
         : opcode == "setmaxnreg" ? setmaxnreg
         : opcode == "wgmma"      ? wgmma
                                  : nullptr;
}

}  // namespace quire::emulator::ptx
