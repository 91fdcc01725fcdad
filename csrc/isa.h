// Which instruction set the kernels use: the best that the processor has, or the one that CISC_ISA names.
// Decided once, when first asked. Needs no torch header.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cisc {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // f16c is not known by name to every compiler
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

inline Isa chosen_isa() {
  const char* asked = std::getenv("CISC_ISA");
  const Isa best = best_isa();
  if (asked == nullptr || *asked == '\0') return best;
  std::string having;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::string(asked) == kIsaNames[i]) return static_cast<Isa>(i);
    having += (i == 0 ? "" : ", ") + std::string(kIsaNames[i]);
  }
  throw std::invalid_argument("CISC_ISA must be one of " + having + " on this processor, got '" + asked +
                              "'");
}

// The choice for this process; std::invalid_argument (ValueError in Python) for a wrong CISC_ISA.
inline Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

// One of a kernel's versions, by instruction set; on other processors than x86 only the first is there.
template <typename Kernel>
const Kernel& pick(const Kernel& portable, const Kernel& avx2, const Kernel& avx512,
                   const Kernel& avx512_bf16) {
  switch (isa()) {
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512_bf16;
    default:
      return portable;
  }
}

#if defined(__x86_64__)
#define CISC_PICK(portable, avx2, avx512, avx512_bf16) ::cisc::pick(portable, avx2, avx512, avx512_bf16)
#else
#define CISC_PICK(portable, avx2, avx512, avx512_bf16) (static_cast<void>(::cisc::isa()), portable)
#endif

}  // namespace cisc
