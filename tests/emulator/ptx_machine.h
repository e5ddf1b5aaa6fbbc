// SPDX-License-Identifier: Apache-2.0
// Runs a PtxProgram as a CUDA thread of the emulator: what nvcc made of a kernel, not what the
// host compiler did. Only the opcodes that nvcc uses for the kernels are known; another one is an
// error before anything runs.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "emulator/instructions.h"
#include "emulator/ptx_program.h"
#include "prim/types.h"

namespace quire::emulator {

using device::BFloat16;
using device::Float16;

// One thread. Registers hold their value zero-extended to 64 bits.
struct PtxMachine {
  const char* parameter;
  std::vector<uint64_t> registers;
  size_t next = 0;
  bool is_done = false;

  Site site(const PtxInstruction& i) const { return {"ptx", i.line}; }

  uint64_t get(const PtxOperand& operand) const {
    switch (operand.kind) {
      case PtxOperand::Kind::kRegister:
        return registers[operand.index];
      case PtxOperand::Kind::kImmediate:
        return static_cast<uint64_t>(operand.value);
      case PtxOperand::Kind::kParameter:
        return reinterpret_cast<uint64_t>(parameter);
      default:
        return special(operand.name);
    }
  }
  uint64_t address(const PtxOperand& operand) const {
    if (operand.kind == PtxOperand::Kind::kImmediate) return get(operand);
    return get(operand) + static_cast<uint64_t>(operand.value);
  }
  uint64_t special(const std::string& name) const {
    const Block& block = Block::current();
    if (name == "%tid.x") return block.thread();
    if (name == "%ctaid.x") return block.index();
    return block.grid_size();  // %nctaid.x
  }

  uint64_t u(const PtxInstruction& i, int operand) const {
    return truncate(get(i.operands[operand]), i.type);
  }
  int64_t s(const PtxInstruction& i, int operand) const {
    return extend(get(i.operands[operand]), i.type);
  }
  float f(const PtxInstruction& i, int operand) const {
    return std::bit_cast<float>(static_cast<uint32_t>(get(i.operands[operand])));
  }

  void set(const PtxOperand& operand, uint64_t value) { registers[operand.index] = value; }
  void set_int(const PtxInstruction& i, uint64_t value) {
    set(i.operands[0], truncate(value, i.type));
  }
  void set_float(const PtxInstruction& i, float value) {
    set(i.operands[0], std::bit_cast<uint32_t>(value));
  }

  static uint64_t truncate(uint64_t value, PtxType type) {
    if (type == PtxType::kPred) return value & 1;
    const int bits = 8 * ptx_bytes(type);
    return bits == 64 ? value : value & ((uint64_t{1} << bits) - 1);
  }
  static bool is_signed(PtxType type) {
    return type == PtxType::kS16 || type == PtxType::kS32 || type == PtxType::kS64;
  }
  static int64_t extend(uint64_t value, PtxType type) {
    const int unused = 64 - 8 * ptx_bytes(type);
    if (!is_signed(type)) return static_cast<int64_t>(truncate(value, type));
    return static_cast<int64_t>(value << unused) >> unused;
  }
};

PtxHandler ptx_handler(const PtxInstruction& instruction);  // ptx_opcodes.h

// A program ready to run.
class PtxKernel {
 public:
  PtxKernel(const std::string& source, const std::string& entry) : program_(source, entry) {
    for (PtxInstruction& instruction : program_.instructions()) {
      instruction.handler = ptx_handler(instruction);
      if (instruction.handler) continue;
      std::string opcode;
      for (const std::string& part : instruction.opcode) opcode += "." + part;
      throw std::runtime_error("ptx line " + std::to_string(instruction.line) +
                               ": opcode not known: " + opcode.substr(1));
    }
  }

  // The body of one thread; `parameter`: the kernel's only argument.
  void run(const void* parameter) const {
    PtxMachine machine{static_cast<const char*>(parameter),
                       std::vector<uint64_t>(program_.num_registers())};
    const std::vector<PtxInstruction>& instructions = program_.instructions();
    while (!machine.is_done) {
      const PtxInstruction& instruction = instructions[machine.next++];
      const int predicate = instruction.predicate;
      if (predicate >= 0 && (machine.registers[predicate] != 0) == instruction.if_false) continue;
      instruction.handler(machine, instruction);
    }
  }

 private:
  PtxProgram program_;
};

}  // namespace quire::emulator
