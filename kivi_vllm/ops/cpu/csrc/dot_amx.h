// Dot products by AMX tiles: 16 int8 rows times 16 vectors of codes.

#if defined(KIVI_EMULATE_AMX)  // in tests, for machines without them
#include "emulated_tiles.h"
#else  // by hand: GCC 12's intrinsics do not say that they read and write memory
#define tile_zero(t) asm volatile("tilezero %%tmm" #t ::)
#define tile_load_a(t, p) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"((int64_t)64) : "memory")
#define tile_load_b(t, p) tile_load_a(t, p)
#define tile_multiply(c, a, b) asm volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define tile_store(t, p) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((int64_t)64) : "memory")
static void begin() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
static void end() { asm volatile("tilerelease" ::: "memory"); }
#endif

// The codes of 64 numbers and both slots, one to a byte, in the order of the parts: quads
// [16 * span, 16 * span + 16) of the tile, with zeros where the run has none.
template <int AHEAD, class RUN>
static INLINE void unpack_codes(const RUN &run, int span, uint8_t (*out)[16][64], Stream &stream) {
#pragma GCC unroll 16
  for (int q = 0; q < 16; q++) {
    const int in_run = 16 * span + q - run.first;
    vc slot[2] = {};
    if (0 <= in_run && in_run < run.quads) {
      if (q % 4 == 0) stream.fetch<AHEAD>();
      run.read(in_run * 64, slot);
    }
    const int at = q % kLanes * 4 + q / kLanes;
    _mm512_store_si512(out[0][at], (__m512i)slot[0]);
    _mm512_store_si512(out[1][at], (__m512i)slot[1]);
  }
}

template <int R, int AHEAD, int APART, class RUNS>
static INLINE void dot(RUNS runs, const int8_t *parts, int32_t (*out)[32], Stream &stream) {
  alignas(64) uint8_t unpacked[2][16][64];
  alignas(64) int32_t sums[2][16][16];
  tile_zero(0);
  tile_zero(1);
  runs([&](auto run) __attribute__((always_inline)) {
    for (int span = run.first / 16; span * 16 < run.first + run.quads; span++) {
      unpack_codes<AHEAD>(run, span, unpacked, stream);
      tile_load_a(2, parts + span * kSpan);
      tile_load_b(3, unpacked[0]);
      tile_multiply(0, 2, 3);
      tile_load_b(4, unpacked[1]);
      if (APART) tile_load_a(2, parts + span * kSpan + APART);
      tile_multiply(1, 2, 4);
    }
  });
  tile_store(0, sums[0]);
  tile_store(1, sums[1]);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int s = 0; s < 2; s++)
      _mm512_storeu_si512(
          out[r] + 16 * s,
          _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(sums[s][2 * r]), 8),
                           _mm512_load_si512(sums[s][2 * r + 1])));
}
