// SPDX-License-Identifier: Apache-2.0
// PtxProgram: one entry point of the PTX that nvcc writes, parsed into instructions. It knows the
// form of the language, not what an opcode means (ptx_machine.h does).
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace quire::emulator {

enum class PtxType : uint8_t { kNone, kPred, kU8, kU16, kS16, kU32, kS32, kU64, kS64, kF32 };

inline PtxType ptx_type(const std::string& name) {
  static const std::unordered_map<std::string, PtxType> types = {
      {"pred", PtxType::kPred}, {"u8", PtxType::kU8},   {"b8", PtxType::kU8},
      {"u16", PtxType::kU16},   {"b16", PtxType::kU16}, {"s16", PtxType::kS16},
      {"u32", PtxType::kU32},   {"b32", PtxType::kU32}, {"s32", PtxType::kS32},
      {"u64", PtxType::kU64},   {"b64", PtxType::kU64}, {"s64", PtxType::kS64},
      {"f32", PtxType::kF32}};
  const auto found = types.find(name);
  return found == types.end() ? PtxType::kNone : found->second;
}

inline int ptx_bytes(PtxType type) {
  switch (type) {
    case PtxType::kU8:
      return 1;
    case PtxType::kU16:
    case PtxType::kS16:
      return 2;
    case PtxType::kU64:
    case PtxType::kS64:
      return 8;
    default:
      return 4;
  }
}

struct PtxOperand {
  enum class Kind : uint8_t { kRegister, kImmediate, kParameter, kSpecial, kVector };
  Kind kind = Kind::kImmediate;
  int index = 0;                     // register
  int64_t value = 0;                 // immediate; offset of an address or into the parameter
  std::string name;                  // special register
  std::vector<PtxOperand> elements;  // vector
};

struct PtxMachine;
struct PtxInstruction;
using PtxHandler = void (*)(PtxMachine&, const PtxInstruction&);

struct PtxInstruction {
  int line = 0;
  int predicate = -1;  // register, or none
  bool if_false = false;
  std::vector<std::string> opcode;      // by dots: {"ld", "global", "v4", "f32"}
  PtxType type = PtxType::kNone;        // the last one in the opcode: of the source
  PtxType first_type = PtxType::kNone;  // of the destination, where the opcode has two
  std::vector<PtxOperand> operands;
  std::string label;
  size_t target = 0;  // of a branch
  PtxHandler handler = nullptr;

  bool has(const char* part) const {
    for (const std::string& p : opcode)
      if (p == part) return true;
    return false;
  }
};

class PtxProgram {
 public:
  // `source`: a whole PTX module. Throws std::runtime_error where it is not understood.
  PtxProgram(const std::string& source, const std::string& entry) {
    std::istringstream lines(source);
    std::string line;
    bool in_body = false, in_entry = false;
    int depth = 0;
    for (line_ = 1; std::getline(lines, line); ++line_) {
      line = trimmed(line.substr(0, line.find("//")));
      if (line.find(".entry " + entry + "(") != std::string::npos) in_entry = true;
      if (!in_entry || line.empty()) continue;
      if (!in_body) {
        in_body = line == "{";
        continue;
      }
      if (line == "}" && depth == 0) break;
      if (line == "{" || line == "}") {  // a block of inline PTX, with labels of its own
        depth += line == "{" ? 1 : -1;
        scope_ = depth > 0 ? "#" + std::to_string(line_) : "";
        continue;
      }
      parse_line(line);
    }
    if (instructions_.empty()) throw std::runtime_error("ptx: no entry " + entry);
    for (PtxInstruction& instruction : instructions_)
      if (!instruction.label.empty()) instruction.target = labels_.at(instruction.label);
  }

  std::vector<PtxInstruction>& instructions() { return instructions_; }
  const std::vector<PtxInstruction>& instructions() const { return instructions_; }
  int num_registers() const { return static_cast<int>(registers_.size()); }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("ptx line " + std::to_string(line_) + ": not understood: " + what);
  }

  static std::string trimmed(const std::string& text) {
    const size_t begin = text.find_first_not_of(" \t");
    if (begin == std::string::npos) return {};
    return text.substr(begin, text.find_last_not_of(" \t") - begin + 1);
  }

  // Splits at commas outside of braces and brackets.
  static std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts(1);
    int depth = 0;
    for (char c : text) {
      depth += (c == '{' || c == '[') - (c == '}' || c == ']');
      if (c == ',' && depth == 0)
        parts.emplace_back();
      else
        parts.back() += c;
    }
    for (std::string& part : parts) part = trimmed(part);
    if (parts.back().empty()) parts.pop_back();
    return parts;
  }

  // "{ .reg .b16 tmp; mov.b32 {tmp, %rs1}, %r1; }": a register of its own, and what uses it.
  void parse_block(const std::string& line) {
    std::istringstream statements(line.substr(1, line.rfind('}') - 1));
    std::string own;
    for (std::string statement; std::getline(statements, statement, ';');) {
      statement = trimmed(statement);
      if (statement.empty()) continue;
      if (statement.rfind(".reg", 0) == 0) {
        own = statement.substr(statement.rfind(' ') + 1);
        continue;
      }
      const size_t at = own.empty() ? std::string::npos : statement.find(own);
      if (at != std::string::npos) statement.insert(at, "%");
      parse_line(statement + ";");
    }
  }

  void parse_line(std::string line) {
    if (line.front() == '{') return parse_block(line);
    if (line.back() == ':') {
      labels_[line.substr(0, line.size() - 1) + scope_] = instructions_.size();
      return;
    }
    if (line[0] == '.') return;  // registers are made as they are met
    if (line.back() != ';') fail(line);
    line.pop_back();
    PtxInstruction instruction;
    instruction.line = line_;
    if (line[0] == '@') {
      instruction.if_false = line[1] == '!';
      const size_t begin = instruction.if_false ? 2 : 1, end = line.find_first_of(" \t");
      instruction.predicate = register_index(line.substr(begin, end - begin));
      line = trimmed(line.substr(end));
    }
    const size_t end = line.find_first_of(" \t");
    std::istringstream parts(line.substr(0, end));
    for (std::string part; std::getline(parts, part, '.');) {
      instruction.opcode.push_back(part);
      if (const PtxType type = ptx_type(part); type != PtxType::kNone) {
        if (instruction.first_type == PtxType::kNone) instruction.first_type = type;
        instruction.type = type;
      }
    }
    const std::string rest = end == std::string::npos ? "" : trimmed(line.substr(end));
    if (instruction.opcode[0] == "bra") {
      instruction.label = rest + scope_;
    } else {
      for (const std::string& operand : split(rest))
        instruction.operands.push_back(parse_operand(operand));
    }
    instructions_.push_back(std::move(instruction));
  }

  PtxOperand parse_operand(std::string text) {
    PtxOperand operand;
    if (text.front() == '{') {
      operand.kind = PtxOperand::Kind::kVector;
      for (const std::string& element : split(text.substr(1, text.size() - 2)))
        operand.elements.push_back(parse_operand(element));
      return operand;
    }
    if (text.front() == '[') {  // base, base+offset, or a tensor map and coordinates
      text = text.substr(1, text.size() - 2);
      if (text.find('{') != std::string::npos) return parse_operand("{" + text + "}");
      const size_t plus = text.find('+');
      operand = parse_operand(text.substr(0, plus));
      if (plus != std::string::npos) operand.value += std::stoll(text.substr(plus + 1));
      return operand;
    }
    text = text.substr(0, text.find('|'));  // the second result of shfl is not used
    if (text.find("_param_0") != std::string::npos) {
      operand.kind = PtxOperand::Kind::kParameter;
    } else if (text.find("shared_memory") != std::string::npos) {
      operand.value = 0;  // shared memory begins at 0
    } else if (text.find('.') != std::string::npos) {
      operand.kind = PtxOperand::Kind::kSpecial;
      operand.name = text;
    } else if (text == "_") {  // a result that is not wanted
      operand.value = 0;
    } else if (text.front() == '%') {
      operand.kind = PtxOperand::Kind::kRegister;
      operand.index = register_index(text);
    } else if (text.rfind("0f", 0) == 0) {
      operand.value = std::stoll(text.substr(2), nullptr, 16);
    } else if (text.front() == '-' || (text.front() >= '0' && text.front() <= '9')) {
      operand.value = std::stoll(text, nullptr, 0);
    } else {
      fail(text);
    }
    return operand;
  }

  int register_index(const std::string& name) {
    return registers_.try_emplace(name, static_cast<int>(registers_.size())).first->second;
  }

  int line_ = 0;
  std::string scope_;  // of the block of inline PTX that the line is in
  std::vector<PtxInstruction> instructions_;
  std::unordered_map<std::string, size_t> labels_;
  std::unordered_map<std::string, int> registers_;
};

}  // namespace quire::emulator
