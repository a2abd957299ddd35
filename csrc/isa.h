// Whether this process can use AMX's bf16 tiles.
#pragma once

// AMX needs a compiler with its intrinsics (GCC 11, Clang 12), and Linux, which grants the tile registers. Every CPU
// with AMX has AVX512_BF16, so only the library for AVX512_BF16 contains this code.
#if defined(__AVX512BF16__) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#include <cpuid.h>
#include <cstdlib>
#include <cstring>
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>
#define FASTGPT_AMX __attribute__((target("amx-tile,amx-bf16")))
#ifdef FASTGPT_EMULATE_AMX
#include "amx_emulated.h"
#endif
#endif

namespace fastgpt {

// Whether the CPU has AMX's bf16 tiles and Linux grants them. Since 5.16 Linux grants the tile registers only on
// request, once for all threads of the process. ONEDNN_MAX_CPU_ISA limits the instruction set of PyTorch's bf16
// products; fastgpt obeys it too.
inline bool has_amx() {
#if defined(FASTGPT_AMX) && defined(FASTGPT_EMULATE_AMX)
  return true;
#elif defined(FASTGPT_AMX)
  static const bool has = [] {
    const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
    if (limit && strcasecmp(limit, "ALL") != 0 && strcasecmp(limit, "DEFAULT") != 0 && !strcasestr(limit, "AMX"))
      return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of EDX in CPUID's leaf 7
    unsigned a, b, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // see Linux's asm/prctl.h
    return (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace fastgpt
