// AMX's tiles in AVX-512, to test the kernels that use them on a CPU without AMX: FASTGPT_EMULATE_AMX=1 builds with
// them (make amx). They replace the compiler's intrinsics. Tiles are full, 16 rows of 64 bytes, as Tiles in amx.h sets
// them.
#pragma once

#include <cstring>
#include <immintrin.h>

namespace fastgpt {
namespace amx {
namespace emulated {

struct Tile {
  alignas(64) char rows[16][64];
};
inline thread_local Tile tiles[8];

inline void load(int tile, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(tiles[tile].rows[i], static_cast<const char*>(from) + i * stride, 64);
}
inline void store(int tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles[tile].rows[i], 64);
}
inline void zero(int tile) { std::memset(&tiles[tile], 0, sizeof(Tile)); }
// What a tile holds before it is loaded, and after the thread has let go of it, is not to be relied on.
inline void spoil(const void* = nullptr) { std::memset(tiles, 0xff, sizeof(tiles)); }

// Row i of `sums` += word k of row i of `a` times row k of `b`, for all k. A word is a pair of bf16. The order of the
// additions is that of TDPBF16PS in Intel's manual: first and second elements of the pairs have sums of their own, from
// zero, and what they come to is added.
inline void multiply(int sums, int a, int b) {
  const auto first_of = [](__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); };
  const auto second_of = [](__m512i words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  };
  for (int i = 0; i < 16; ++i) {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int k = 0; k < 16; ++k) {
      int32_t word;
      std::memcpy(&word, tiles[a].rows[i] + 4 * k, sizeof(word));
      const __m512i left = _mm512_set1_epi32(word), right = _mm512_load_si512(tiles[b].rows[k]);
      first = _mm512_fmadd_ps(first_of(left), first_of(right), first);
      second = _mm512_fmadd_ps(second_of(left), second_of(right), second);
    }
    char* row = tiles[sums].rows[i];
    _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), _mm512_add_ps(first, second)));
  }
}

}  // namespace emulated
}  // namespace amx
}  // namespace fastgpt

// The compiler's names are functions or macros; as macros these go before either.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig fastgpt::amx::emulated::spoil
#define _tile_release fastgpt::amx::emulated::spoil
#define _tile_loadd fastgpt::amx::emulated::load
#define _tile_stream_loadd fastgpt::amx::emulated::load
#define _tile_stored fastgpt::amx::emulated::store
#define _tile_zero fastgpt::amx::emulated::zero
#define _tile_dpbf16ps fastgpt::amx::emulated::multiply
