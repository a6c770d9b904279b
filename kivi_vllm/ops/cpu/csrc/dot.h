// The integer half of reading a page: numbers to 16-bit fixed point, their product with a second
// factor split into a high and a low int8 part, and the dot product of such parts with codes.
//
// A row here is one query row. It becomes two rows of int8, high and low: x = 256 * high + low, and
// one exact int32 dot product serves each. 16 bits together keep the error of an output near 1e-3 where one
// int8 alone leaves up to 1e-1.
//
// How codes lie in vectors: codes.h.

// Query rows that share one reading of the codes.
#if defined(KIVI_AMX)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kParts = 2 * kRows;

// The parts of all rows of a group lie together: [number / 64][row, part][64]. Packing instructions
// work inside 128-bit lanes, which leaves groups of four numbers together but in another order.
#if defined(__AVX512F__)
constexpr int kChunk = 16, kLanes = 4;  // groups of four in a vector of bytes, 128-bit lanes
#elif defined(__AVX2__)
constexpr int kChunk = 8, kLanes = 2;
#else
constexpr int kChunk = 1, kLanes = 1;
#endif
constexpr int kSpan = 64 * kParts;  // bytes of 64 numbers
// Where the parts of group of four `q` of the first row and part begin.
static INLINE constexpr int quad_offset(int q) {
  const int in = q % 16;
  return q / 16 * kSpan +
         4 * (kLanes == 1 ? in : in / kChunk * kChunk + in % kLanes * 4 + in % kChunk / kLanes);
}

// out[i] = round(x[i] * factor), n a multiple of 32, saturating; in the order of the ISA's packs.
template <class LOAD>
static INLINE void to_fixed(LOAD at, int n, float factor, int16_t *out) {
#if defined(__AVX512F__)
  const __m512 f = _mm512_set1_ps(factor);
  for (int i = 0; i < n; i += 32) {
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)at(i), f));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)at(i + 16), f));
    _mm512_storeu_si512(out + i, _mm512_packs_epi32(a, b));
  }
#elif defined(__AVX2__)
  const __m256 f = _mm256_set1_ps(factor);
  for (int i = 0; i < n; i += 16) {
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps((__m256)at(i), f));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps((__m256)at(i + 8), f));
    _mm256_storeu_si256((__m256i *)(out + i), _mm256_packs_epi32(a, b));
  }
#else
  for (int i = 0; i < n; i += W) {
    const vf y = at(i) * factor;
    for (int j = 0; j < W; j++) {
      const float r = (y[j] + 12582912.0f) - 12582912.0f;
      const float low = r > -32768.0f ? r : -32768.0f;  // NaN too
      out[i + j] = (int16_t)(low < 32767.0f ? low : 32767.0f);
    }
  }
#endif
}

// Store the high and low parts of 16-bit numbers, which must lie in [-32640, 32639].
#if defined(__AVX512F__)
static INLINE void store_parts(__m512i x, __m512i y, int8_t *high) {
  const __m512i mask = _mm512_set1_epi16(255), half = _mm512_set1_epi16(128);
  _mm512_storeu_si512(high + 64,
                      _mm512_packus_epi16(_mm512_and_si512(x, mask), _mm512_and_si512(y, mask)));
  _mm512_storeu_si512(high, _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(x, half), 8),
                                               _mm512_srai_epi16(_mm512_add_epi16(y, half), 8)));
}
#elif defined(__AVX2__)
static INLINE void store_parts(__m256i x, __m256i y, int8_t *high) {
  const __m256i mask = _mm256_set1_epi16(255), half = _mm256_set1_epi16(128);
  _mm256_storeu_si256((__m256i *)(high + 64),
                      _mm256_packus_epi16(_mm256_and_si256(x, mask), _mm256_and_si256(y, mask)));
  _mm256_storeu_si256((__m256i *)high,
                      _mm256_packs_epi16(_mm256_srai_epi16(_mm256_add_epi16(x, half), 8),
                                         _mm256_srai_epi16(_mm256_add_epi16(y, half), 8)));
}
#else
static INLINE void store_parts(int x, int8_t *high) {
  high[0] = (int8_t)((x + 128) >> 8);
  high[64] = (int8_t)(x & 255);
}
#endif

// The parts of round(a[i] * b[k][i] / 2^15) of a row, for N factors b[k], which are `n` numbers
// apart as their parts are APART bytes; n a multiple of 32.
template <int N = 1, int APART = 0>
static INLINE void multiply_split(const int16_t *a, const int16_t *b, int n, int8_t *high) {
#if defined(__AVX512F__)
  for (int i = 0; i < n; i += 64, high += kSpan) {
    const bool two = i + 32 < n;
    const __m512i u = _mm512_loadu_si512(a + i);
    const __m512i v = two ? _mm512_loadu_si512(a + i + 32) : _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int k = 0; k < N; k++) {
      const int16_t *c = b + k * n + i;
      const __m512i x = _mm512_mulhrs_epi16(u, _mm512_loadu_si512(c));
      const __m512i y = two ? _mm512_mulhrs_epi16(v, _mm512_loadu_si512(c + 32)) : v;
      store_parts(x, y, high + k * APART);
    }
  }
#elif defined(__AVX2__)
  for (int i = 0; i < n; i += 32) {
    const __m256i u = _mm256_loadu_si256((const __m256i *)(a + i));
    const __m256i v = _mm256_loadu_si256((const __m256i *)(a + i + 16));
#pragma GCC unroll 2
    for (int k = 0; k < N; k++) {
      const int16_t *c = b + k * n + i;
      const __m256i x = _mm256_mulhrs_epi16(u, _mm256_loadu_si256((const __m256i *)c));
      const __m256i y = _mm256_mulhrs_epi16(v, _mm256_loadu_si256((const __m256i *)(c + 16)));
      store_parts(x, y, high + i / 64 * kSpan + i % 64 + k * APART);
    }
  }
#else
  for (int k = 0; k < N; k++)
    for (int i = 0; i < n; i++)
      store_parts(((int)a[i] * b[k * n + i] + (1 << 14)) >> 15,
                  high + i / 64 * kSpan + i % 64 + k * APART);
#endif
}

// The parts of x, of which all lie in [-32640, 32639]; n a multiple of 64. (Where a page's values are all
// 0, x is -32768, and counts 0 times.)
static INLINE void split(const int16_t *x, int n, int8_t *high) {
#if defined(__AVX512F__)
  for (int i = 0; i < n; i += 64, high += kSpan)
    store_parts(_mm512_loadu_si512(x + i), _mm512_loadu_si512(x + i + 32), high);
#elif defined(__AVX2__)
  for (int i = 0; i < n; i += 32) {
    const int at = i / 64 * kSpan + i % 64;
    store_parts(_mm256_loadu_si256((const __m256i *)(x + i)),
                _mm256_loadu_si256((const __m256i *)(x + i + 16)), high + at);
  }
#else
  for (int i = 0; i < n; i++) store_parts(x[i], high + i / 64 * kSpan + i % 64);
#endif
}

// ------------------------------------------------------------- dot products
//
// dot<R, AHEAD, APART>: out[r][0..31] = sum over the numbers n of parts[r][n] * code[n][lane] for a
// tile, high and low joined. `runs` is the tile, a Codes::Keys or Values. (Codes of slot 1 are as
// Run::read gives them: multiplied.) The parts for slot 1 lie APART bytes after those for slot 0.

// The next page, fetched while this one is computed: AHEAD lines with every 4 vectors of codes, as
// many as make a page (kLines of its two sides). With one or two rows memory is what bounds, and more
// lines can be on their way to L2 than to L1; with more rows there is time to fetch them into L1.
// (Fetching fewer lines at a time, between the other steps too, was slower.)
struct Stream {
  const char *at;
  bool into_l1;
  TokensAhead &tokens;  // of which some are fetched with each tile
  template <int AHEAD>
  INLINE void fetch() {
    if (into_l1) {
#pragma GCC unroll 8
      for (int i = 0; i < AHEAD; i++) __builtin_prefetch(at + 64 * i, 0, 3);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < AHEAD; i++) __builtin_prefetch(at + 64 * i, 0, 2);
    }
    at += 64 * AHEAD;
  }
  template <int AHEAD>
  INLINE void fetch_tokens() {
    if (AHEAD > 0) tokens.fetch();
  }
};

#if defined(__AVX512VNNI__)

// sum + codes * part, the four bytes at `part` for every lane. By hand: GCC 12 spills around the
// intrinsic, and loads a broadcast of its own, where the memory operand costs no instruction.
static INLINE __m512i dp(__m512i sum, __m512i codes, const int8_t *part) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*(const int32_t *)part));
  return sum;
}

#endif

#if defined(KIVI_AMX)
#include "dot_amx.h"
#elif defined(__AVX512VNNI__)

// Sets of sums: with one or two rows, a single set would wait for its own additions.
template <int R>
constexpr int kSets = R <= 2 ? 2 : 1;

template <int R, int AHEAD, int APART, class RUN>
static INLINE void dot_run(const RUN &run, const int8_t *parts, __m512i (*sums)[2 * R][2],
                           Stream &stream) {
  for (int base = 0; base < run.quads; base += kChunk, parts += kSpan) {
    const int end = min_of(kChunk, run.quads - base) / kLanes;
    for (int i = 0; i < end; i++) {
      stream.fetch<AHEAD>();
      const int64_t at = (base + i * kLanes) * 64;
      const int8_t *p = parts + i * 4;
#pragma GCC unroll 4
      for (int k = 0; k < kLanes; k++) {
        vc slot[2];
        run.read(at + k * 64, slot);
        const __m512i c0 = (__m512i)slot[0], c1 = (__m512i)slot[1];
        __m512i(*set)[2] = sums[k % kSets<R>];
#pragma GCC unroll 8
        for (int r = 0; r < 2 * R; r++) {
          set[r][0] = dp(set[r][0], c0, p + r * 64 + k * 16);
          set[r][1] = dp(set[r][1], c1, p + r * 64 + k * 16 + APART);
        }
      }
    }
  }
}

template <int R, int AHEAD, int APART, class RUNS>
static INLINE void dot(RUNS runs, const int8_t *parts, int32_t (*out)[32], Stream &stream) {
  __m512i sums[kSets<R>][2 * R][2];
#pragma GCC unroll 2
  for (int k = 0; k < kSets<R>; k++)
#pragma GCC unroll 8
    for (int r = 0; r < 2 * R; r++) sums[k][r][0] = sums[k][r][1] = _mm512_setzero_si512();
  runs([&](auto run) __attribute__((always_inline)) {
    dot_run<R, AHEAD, APART>(run, parts + quad_offset(run.first), sums, stream);
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int s = 0; s < 2; s++) {
      __m512i high = sums[0][2 * r][s], low = sums[0][2 * r + 1][s];
      if (kSets<R> == 2) {
        high = _mm512_add_epi32(high, sums[1][2 * r][s]);
        low = _mm512_add_epi32(low, sums[1][2 * r + 1][s]);
      }
      _mm512_storeu_si512(out[r] + 16 * s, _mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    }
}

#elif defined(__AVX2__)

// So many groups of four are summed in 16 bits: a pair of products is at most 2 * 128 * 15.
constexpr int kShort = 8;
static_assert(kShort == kChunk);

// R query rows and one half of the lanes: sums[r][slot] += 256 * high + low.
template <int R, int AHEAD, int APART, class RUN>
static INLINE void dot_run(RUN run, const int8_t *parts, __m256i (*sums)[2], Stream &stream) {
  for (int base = 0; base < run.quads; base += kShort, run.vectors += kShort * 64) {
    const int8_t *p = parts + quad_offset(base);
    stream.fetch<AHEAD>();
    __m256i s[2 * R][2] = {};
#pragma GCC unroll 1
    for (int i = 0; i < kShort / kLanes; i++, p += 4)
#pragma GCC unroll 2
      for (int k = 0; k < kLanes; k++) {
        vc slot[2];
        run.read((i * kLanes + k) * 64, slot);
        const __m256i c0 = (__m256i)slot[0], c1 = (__m256i)slot[1];
#pragma GCC unroll 4
        for (int r = 0; r < 2 * R; r++) {
          const auto four = [&](int apart) __attribute__((always_inline)) {
            int x;
            __builtin_memcpy(&x, p + r * 64 + k * 16 + apart, 4);
            return _mm256_set1_epi32(x);
          };
          s[r][0] = _mm256_add_epi16(s[r][0], _mm256_maddubs_epi16(c0, four(0)));
          s[r][1] = _mm256_add_epi16(s[r][1], _mm256_maddubs_epi16(c1, four(APART)));
        }
      }
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++)
        sums[r][i] = _mm256_add_epi32(
            sums[r][i], _mm256_add_epi32(_mm256_madd_epi16(s[2 * r][i], _mm256_set1_epi16(256)),
                                         _mm256_madd_epi16(s[2 * r + 1][i], _mm256_set1_epi16(1))));
  }
}

template <int R, int AHEAD, int APART, class RUNS>
static INLINE void dot_rows(RUNS runs, const int8_t *parts, int32_t (*out)[32], Stream &stream) {
  for (int lanes = 0; lanes < 2; lanes++) {
    __m256i sums[R][2] = {};
    runs([&](auto run) __attribute__((always_inline)) {
      run.vectors += 32 * lanes;
      dot_run<R, AHEAD, APART>(run, parts + quad_offset(run.first), sums, stream);
    });
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 2; i++)
        _mm256_storeu_si256((__m256i *)(out[r] + 16 * i + 8 * lanes), sums[r][i]);
  }
}

// Two rows together: more sums than that do not fit the registers.
template <int R, int AHEAD, int APART, class RUNS>
static INLINE void dot(RUNS runs, const int8_t *parts, int32_t (*out)[32], Stream &stream) {
  if constexpr (R > 2) dot_rows<R - 2, 0, APART>(runs, parts + 256, out + 2, stream);
  dot_rows<R == 1 ? 1 : 2, AHEAD, APART>(runs, parts, out, stream);
}

#else

template <int R, int AHEAD, int APART, class RUNS>
static INLINE void dot(RUNS runs, const int8_t *parts, int32_t (*out)[32], Stream &) {
  for (int r = 0; r < R; r++) {
    int32_t sums[2][2][16] = {};  // [high, low][slot][lane]
    runs([&](auto run) __attribute__((always_inline)) {
      for (int q = 0; q < run.quads; q++)
        for (int p = 0; p < 2; p++) {
          const int8_t *four = parts + (2 * r + p) * 64 + quad_offset(run.first + q);
          for (int lane = 0; lane < 16; lane++)
            for (int j = 0; j < 4; j++) {
              vc slot[2];
              run.read((q * 16 + lane) * 4 + j, slot);
              sums[p][0][lane] += slot[0] * four[j];
              sums[p][1][lane] += slot[1] * four[j + APART];
            }
        }
    });
    for (int s = 0; s < 2; s++)
      for (int lane = 0; lane < 16; lane++)
        out[r][16 * s + lane] = sums[0][s][lane] * 256 + sums[1][s][lane];
  }
}

#endif
