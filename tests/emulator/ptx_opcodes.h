// SPDX-License-Identifier: Apache-2.0
// The opcodes of PTX that nvcc uses for the kernels, each as one short function.
#pragma once

#include <map>

#include "emulator/ptx_machine.h"
#include "emulator/ptx_sm90.h"

namespace quire::emulator {
namespace ptx {

using M = PtxMachine;
using I = PtxInstruction;

// --- Memory --------------------------------------------------------------------------------------

template <int kBytes>
struct Raw {
  uint8_t bytes[kBytes];
};

enum class Space { kParameter, kGlobal, kShared };

inline Space space_of(const I& i) {
  return i.has("param") ? Space::kParameter : i.has("shared") ? Space::kShared : Space::kGlobal;
}

template <int kBytes>
void move(bool is_store, Space space, uint64_t address, uint8_t* buffer, Site site) {
  auto* raw = reinterpret_cast<Raw<kBytes>*>(buffer);
  auto* pointer = reinterpret_cast<Raw<kBytes>*>(address);
  const auto shared = static_cast<uint32_t>(address);
  if (space == Space::kParameter)
    *raw = *pointer;
  else if (space == Space::kGlobal)
    is_store ? store_global(pointer, *raw, site) : void(*raw = load_global(pointer, site));
  else
    is_store ? store_shared(shared, *raw, site)
             : void(*raw = load_shared<Raw<kBytes>>(shared, site));
}

// A load or a store of one register or of a vector of them.
inline void access(M& m, const I& i, bool is_store, const PtxOperand& at, const PtxOperand& value) {
  const bool is_vector = value.kind == PtxOperand::Kind::kVector;
  const int count = is_vector ? static_cast<int>(value.elements.size()) : 1;
  const int bytes = ptx_bytes(i.type);
  const auto element = [&](int e) -> const PtxOperand& {
    return is_vector ? value.elements[e] : value;
  };
  alignas(16) uint8_t buffer[16] = {};
  for (int e = 0; e < count && is_store; ++e) {
    const uint64_t bits = m.get(element(e));
    std::memcpy(buffer + e * bytes, &bits, bytes);
  }
  const uint64_t address = m.address(at);
  switch (bytes * count) {
    case 1:
      move<1>(is_store, space_of(i), address, buffer, m.site(i));
      break;
    case 2:
      move<2>(is_store, space_of(i), address, buffer, m.site(i));
      break;
    case 4:
      move<4>(is_store, space_of(i), address, buffer, m.site(i));
      break;
    case 8:
      move<8>(is_store, space_of(i), address, buffer, m.site(i));
      break;
    default:
      move<16>(is_store, space_of(i), address, buffer, m.site(i));
      break;
  }
  for (int e = 0; e < count && !is_store; ++e) {
    uint64_t bits = 0;
    std::memcpy(&bits, buffer + e * bytes, bytes);
    const bool is_signed = i.type == PtxType::kS16 || i.type == PtxType::kS32;
    const int unused = is_signed ? 64 - 8 * bytes : 0;  // a wider register gets the sign
    m.set(element(e), static_cast<uint64_t>(static_cast<int64_t>(bits << unused) >> unused));
  }
}

inline void load(M& m, const I& i) { access(m, i, false, i.operands[1], i.operands[0]); }
inline void store(M& m, const I& i) { access(m, i, true, i.operands[0], i.operands[1]); }

inline void atom(M& m, const I& i) {
  auto* counter = reinterpret_cast<uint32_t*>(m.address(i.operands[1]));
  m.set(i.operands[0], atomic_increment(counter, static_cast<uint32_t>(m.get(i.operands[2])),
                                        i.has("acq_rel"), m.site(i)));
}

inline void cp(M& m, const I& i) {
  if (i.has("bulk")) return copy_bulk(m, i);
  Block& block = Block::current();
  if (i.has("commit_group")) return block.commit_copies();
  if (i.has("wait_group")) return block.wait_copies(m.get(i.operands[0]));
  const auto bytes = static_cast<uint32_t>(m.get(i.operands[2]));
  const auto valid = i.operands.size() > 3 ? static_cast<uint32_t>(m.get(i.operands[3])) : bytes;
  copy_async(static_cast<uint32_t>(m.address(i.operands[0])),
             reinterpret_cast<const void*>(m.address(i.operands[1])), bytes, valid, m.site(i));
}

// --- Moves and conversions -----------------------------------------------------------------------

inline void mov(M& m, const I& i) {
  if (i.operands[1].kind == PtxOperand::Kind::kVector) {  // two halves, the low one first
    const auto& halves = i.operands[1].elements;
    const int bits = 4 * ptx_bytes(i.type);
    return m.set(i.operands[0], m.get(halves[0]) | m.get(halves[1]) << bits);
  }
  if (i.operands[0].kind == PtxOperand::Kind::kVector) {
    const auto& halves = i.operands[0].elements;
    const int bits = 4 * ptx_bytes(i.type);
    const uint64_t value = m.u(i, 1);
    m.set(halves[0], value & ((uint64_t{1} << bits) - 1));
    return m.set(halves[1], value >> bits);
  }
  m.set(i.operands[0], i.type == PtxType::kF32 ? m.get(i.operands[1]) & 0xFFFFFFFF : m.u(i, 1));
}

inline void cvt(M& m, const I& i) {
  if (i.has("satfinite")) {
    const uint32_t high = narrow_e4m3(m.f(i, 1));
    return m.set(i.operands[0], high << 8 | narrow_e4m3(m.f(i, 2)));
  }
  if (i.has("e4m3x2")) {
    const auto codes = static_cast<uint16_t>(m.get(i.operands[1]));
    const uint32_t low = widen_e4m3(static_cast<uint8_t>(codes));
    return m.set(i.operands[0], low | uint32_t{widen_e4m3(codes >> 8)} << 16);
  }
  if (i.has("f16x2") || i.has("bf16x2")) {
    const bool is_bfloat16 = i.has("bf16x2");
    const auto bits = [&](int operand) {
      const float value = m.f(i, operand);
      return uint32_t{is_bfloat16 ? narrow_bfloat16(value) : narrow_float16(value)};
    };
    return m.set(i.operands[0], bits(2) | bits(1) << 16);
  }
  if (i.has("f16"))
    return m.set_float(i, widen_float16(static_cast<uint16_t>(m.get(i.operands[1]))));
  if (i.first_type == PtxType::kF32) return m.set_float(i, static_cast<float>(m.s(i, 1)));
  m.set(i.operands[0], M::truncate(static_cast<uint64_t>(m.s(i, 1)), i.first_type));
}

// Four of the eight bytes of two registers, by the low three bits of each nibble of the selector.
inline void prmt(M& m, const I& i) {
  const uint64_t bytes = m.u(i, 1) | m.u(i, 2) << 32, selector = m.get(i.operands[3]);
  uint64_t result = 0;
  for (int n = 0; n < 4; ++n) result |= (bytes >> (selector >> 4 * n & 7) * 8 & 255) << 8 * n;
  m.set(i.operands[0], result);
}

inline void cvta(M& m, const I& i) { m.set(i.operands[0], m.get(i.operands[1])); }

// --- Arithmetic ----------------------------------------------------------------------------------

inline bool is_float(const I& i) { return i.type == PtxType::kF32; }

inline void add(M& m, const I& i) {
  is_float(i) ? m.set_float(i, m.f(i, 1) + m.f(i, 2)) : m.set_int(i, m.u(i, 1) + m.u(i, 2));
}
inline void sub(M& m, const I& i) {
  is_float(i) ? m.set_float(i, m.f(i, 1) - m.f(i, 2)) : m.set_int(i, m.u(i, 1) - m.u(i, 2));
}
inline void mul(M& m, const I& i) {
  if (i.has("f16x2")) {
    const auto half = [&](int shift) {
      const auto of = [&](int operand) {
        return widen_float16(static_cast<uint16_t>(m.get(i.operands[operand]) >> shift));
      };
      return uint64_t{narrow_float16(of(1) * of(2))} << shift;
    };
    return m.set(i.operands[0], half(0) | half(16));
  }
  if (is_float(i)) return m.set_float(i, m.f(i, 1) * m.f(i, 2));
  const auto product = static_cast<__int128>(m.s(i, 1)) * m.s(i, 2);
  if (i.has("wide")) return m.set(i.operands[0], static_cast<uint64_t>(product));
  m.set_int(i, static_cast<uint64_t>(i.has("hi") ? product >> 8 * ptx_bytes(i.type) : product));
}
inline void mad(M& m, const I& i) {
  const auto product = static_cast<uint64_t>(m.s(i, 1)) * static_cast<uint64_t>(m.s(i, 2));
  if (i.has("wide")) return m.set(i.operands[0], product + m.get(i.operands[3]));
  m.set_int(i, product + m.u(i, 3));
}
inline void fma(M& m, const I& i) { m.set_float(i, std::fma(m.f(i, 1), m.f(i, 2), m.f(i, 3))); }
// f of the two operands as the type takes them: 64 bits without a sign do not fit a signed number.
template <class F>
void set_from_ints(M& m, const I& i, F f) {
  m.set_int(i, M::is_signed(i.type) ? static_cast<uint64_t>(f(m.s(i, 1), m.s(i, 2)))
                                    : f(m.u(i, 1), m.u(i, 2)));
}
inline void div(M& m, const I& i) {
  if (is_float(i)) return m.set_float(i, m.f(i, 1) / m.f(i, 2));
  if (m.u(i, 2) == 0) Block::current().fail("division by zero");
  set_from_ints(m, i, [](auto a, auto b) { return a / b; });
}
inline void rem(M& m, const I& i) {
  if (m.u(i, 2) == 0) Block::current().fail("division by zero");
  set_from_ints(m, i, [](auto a, auto b) { return a % b; });
}
inline void min(M& m, const I& i) {
  if (is_float(i)) return m.set_float(i, std::fmin(m.f(i, 1), m.f(i, 2)));
  set_from_ints(m, i, [](auto a, auto b) { return std::min(a, b); });
}
inline void max(M& m, const I& i) {
  if (is_float(i)) return m.set_float(i, std::fmax(m.f(i, 1), m.f(i, 2)));
  set_from_ints(m, i, [](auto a, auto b) { return std::max(a, b); });
}
inline void neg(M& m, const I& i) {
  is_float(i) ? m.set_float(i, -m.f(i, 1)) : m.set_int(i, -m.u(i, 1));
}
inline void abs(M& m, const I& i) {
  is_float(i) ? m.set_float(i, std::fabs(m.f(i, 1)))
              : m.set_int(i, static_cast<uint64_t>(std::abs(m.s(i, 1))));
}
inline void ex2(M& m, const I& i) { m.set_float(i, std::exp2(m.f(i, 1))); }
inline void lg2(M& m, const I& i) { m.set_float(i, std::log2(m.f(i, 1))); }
inline void rcp(M& m, const I& i) { m.set_float(i, 1.0f / m.f(i, 1)); }

inline void bit_and(M& m, const I& i) { m.set_int(i, m.u(i, 1) & m.u(i, 2)); }
inline void bit_or(M& m, const I& i) { m.set_int(i, m.u(i, 1) | m.u(i, 2)); }
inline void bit_xor(M& m, const I& i) { m.set_int(i, m.u(i, 1) ^ m.u(i, 2)); }
inline void bit_not(M& m, const I& i) { m.set_int(i, ~m.u(i, 1)); }

// The shift counts are 32 bits wide; those beyond the width shift everything out.
inline void shl(M& m, const I& i) {
  const auto count = static_cast<uint32_t>(m.get(i.operands[2]));
  m.set_int(i, count >= 8u * ptx_bytes(i.type) ? 0 : m.u(i, 1) << count);
}
inline void shr(M& m, const I& i) {
  const auto count = static_cast<uint32_t>(m.get(i.operands[2]));
  if (M::is_signed(i.type))
    return m.set_int(i, static_cast<uint64_t>(m.s(i, 1) >> std::min(count, 63u)));
  m.set_int(i, count >= 64 ? 0 : m.u(i, 1) >> count);
}
// The low bits of the first operand into the second: from where on, and how many.
inline void bfi(M& m, const I& i) {
  const uint64_t from = m.get(i.operands[3]), count = m.get(i.operands[4]);
  const uint64_t ones = count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  m.set_int(i, (m.u(i, 2) & ~(ones << from)) | (m.u(i, 1) & ones) << from);
}

// --- Comparison and control ----------------------------------------------------------------------

template <class T>
bool compare(const std::string& how, T a, T b) {
  if (how == "eq") return a == b;
  if (how == "ne") return a < b || a > b;  // of floats: ordered
  if (how == "lt") return a < b;
  if (how == "le") return a <= b;
  if (how == "gt") return a > b;
  return a >= b;  // ge
}

inline void setp(M& m, const I& i) {
  const std::string& how = i.opcode[1];
  bool result;
  if (!is_float(i)) {
    result = M::is_signed(i.type) ? compare(how, m.s(i, 1), m.s(i, 2))
                                  : compare(how, m.u(i, 1), m.u(i, 2));
  } else {
    const float a = m.f(i, 1), b = m.f(i, 2);
    const bool is_unordered = how.size() == 3;  // ltu, neu, ...
    result = (is_unordered && (std::isnan(a) || std::isnan(b))) || compare(how.substr(0, 2), a, b);
  }
  m.set(i.operands[0], result);
}

inline void selp(M& m, const I& i) {
  const PtxOperand& chosen = i.operands[m.get(i.operands[3]) ? 1 : 2];
  m.set(i.operands[0], m.get(chosen) & (ptx_bytes(i.type) == 8 ? ~uint64_t{0} : 0xFFFFFFFF));
}

inline void bra(M& m, const I& i) { m.next = i.target; }
inline void ret(M& m, const I&) { m.is_done = true; }

// --- Warps and blocks ----------------------------------------------------------------------------

inline void bar(M& m, const I& i) {
  // nvcc may write one barrier of the source in several places, so the line does not count.
  if (i.has("warp")) return Block::current().sync_warp(m.site(i));
  if (i.operands.size() > 1)
    return Block::current().sync_named(static_cast<int>(m.get(i.operands[0])),
                                       static_cast<int>(m.get(i.operands[1])), !i.has("arrive"),
                                       m.site(i));
  Block::current().sync_block({"ptx", 0});
}

inline void fence(M&, const I& i) {
  if (i.has("proxy")) return Block::current().fence_proxy();
  if (i.has("mbarrier_init")) return Block::current().fence_mbarriers();
  Block::current().fence_global();
}

inline void shfl(M& m, const I& i) {
  m.set(i.operands[0], shuffle(static_cast<uint32_t>(m.get(i.operands[1])),
                               static_cast<int>(m.get(i.operands[2])), i.has("bfly"), m.site(i)));
}

inline void load_matrices(M& m, const I& i) {
  const std::vector<PtxOperand>& to = i.operands[0].elements;
  uint32_t values[4];
  ldmatrix(values, static_cast<int>(to.size()), i.has("trans"),
           static_cast<uint32_t>(m.address(i.operands[1])), m.site(i));
  for (size_t j = 0; j < to.size(); ++j) m.set(to[j], values[j]);
}

inline void multiply_matrices(M& m, const I& i) {
  const auto word = [&](int operand, int element) {
    return static_cast<uint32_t>(m.get(i.operands[operand].elements[element]));
  };
  float c[4];
  uint32_t a[4];
  for (int e = 0; e < 4; ++e) {
    a[e] = word(1, e);
    c[e] = std::bit_cast<float>(word(3, e));
  }
  i.has("bf16") ? mma<BFloat16>(c, a, word(2, 0), word(2, 1), m.site(i))
                : mma<Float16>(c, a, word(2, 0), word(2, 1), m.site(i));
  for (int e = 0; e < 4; ++e) m.set(i.operands[0].elements[e], std::bit_cast<uint32_t>(c[e]));
}

}  // namespace ptx

inline PtxHandler ptx_handler(const PtxInstruction& instruction) {
  static const std::map<std::string, PtxHandler> handlers = {
      {"abs", ptx::abs},     {"add", ptx::add},
      {"and", ptx::bit_and}, {"atom", ptx::atom},
      {"bar", ptx::bar},     {"bfi", ptx::bfi},
      {"bra", ptx::bra},     {"cp", ptx::cp},
      {"cvt", ptx::cvt},     {"cvta", ptx::cvta},
      {"div", ptx::div},     {"ex2", ptx::ex2},
      {"fence", ptx::fence}, {"fma", ptx::fma},
      {"ld", ptx::load},     {"ldmatrix", ptx::load_matrices},
      {"lg2", ptx::lg2},     {"mad", ptx::mad},
      {"max", ptx::max},     {"min", ptx::min},
      {"mov", ptx::mov},     {"mma", ptx::multiply_matrices},
      {"mul", ptx::mul},     {"neg", ptx::neg},
      {"not", ptx::bit_not}, {"or", ptx::bit_or},
      {"prmt", ptx::prmt},   {"rcp", ptx::rcp},
      {"rem", ptx::rem},     {"ret", ptx::ret},
      {"selp", ptx::selp},   {"setp", ptx::setp},
      {"shfl", ptx::shfl},   {"shl", ptx::shl},
      {"shr", ptx::shr},     {"st", ptx::store},
      {"sub", ptx::sub},     {"xor", ptx::bit_xor}};
  const auto found = handlers.find(instruction.opcode[0]);
  return found == handlers.end() ? ptx::sm90_handler(instruction.opcode[0]) : found->second;
}

}  // namespace quire::emulator
