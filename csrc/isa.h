// Instructions that a CPU with AVX-512 may have besides: whether this one does, and may use them.
#pragma once

#if defined(__AVX512F__)
#include <cpuid.h>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <strings.h>

#define FASTGPT_AVX512_BF16 __attribute__((target("avx512bf16")))

// AMX needs a compiler that knows it (GCC 11, Clang 12), and Linux to ask for its registers.
#if defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#include <sys/syscall.h>
#include <unistd.h>
#define FASTGPT_AMX __attribute__((target("avx512bf16,amx-tile,amx-bf16")))
#endif

namespace fastgpt {

// Leaf 7 of CPUID: a bit of EDX, and one of EAX in its subleaf 1.
inline bool cpuid_7_edx(int bit) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> bit & 1);
}
inline bool cpuid_7_1_eax(int bit) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> bit & 1);
}

// ONEDNN_MAX_CPU_ISA holds PyTorch's products of bf16 to an instruction set; ours go with them.
inline const char* onednn_limit() {
  const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
  return limit ? limit : "ALL";
}

inline bool has_avx512_bf16() {
  static const bool has = [] {
    for (const char* narrower : {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})
      if (strcasecmp(onednn_limit(), narrower) == 0) return false;
    return cpuid_7_1_eax(5);
  }();
  return has;
}

// Linux hands out the registers of tiles on request only (since 5.16), once for all threads of the process.
inline bool has_amx() {
#if defined(FASTGPT_AMX)
  static const bool has = [] {
    const char* limit = onednn_limit();
    if (strcasecmp(limit, "ALL") != 0 && strcasecmp(limit, "DEFAULT") != 0 && !strcasestr(limit, "AMX")) return false;
    constexpr int kBf16 = 22, kTile = 24, kRequestPermission = 0x1023, kTileData = 18;  // see Linux's asm/prctl.h
    return has_avx512_bf16() && cpuid_7_edx(kBf16) && cpuid_7_edx(kTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace fastgpt
#endif
