// A page of recipe "best".
//
// Keys: scales and zeros are whole numbers u and z of a channel's step, so with x[c] = q[c] step[c]
//
//     score(token) = sum_c (x[c] u[c]) code[c] + r sum_c x[c] z[c] + sum_c q[c] low[c]:
//
// u multiplies the query once for a group's tokens, and z is one more integer dot product a group.
// Values: with the probabilities times the tokens' scales, y[t] = p[t] scale[t],
//
//     out[c] = sum_t y[t] code[t] + (mean[c] - top / 2) sum_t y[t].

// Byte offsets of a page's fields, as in format.py.
struct TwoLevelLayout {
  int head_size, k_groups;
  int k_low, k_step, k_range, k_codes, v_mean, v_scale, v_codes, end;
  explicit TwoLevelLayout(const KiviCall &c) {
    const int d = (int)c.head_size;
    head_size = d;
    k_groups = kBlock / (int)c.group_size;
    k_low = 0;
    k_step = k_low + 2 * d;
    k_range = k_step + 2 * d;
    k_codes = k_range + k_groups * d;
    v_mean = k_codes + code_bytes(c.k_bits, d);
    v_scale = v_mean + 2 * d;
    v_codes = v_scale + 2 * kBlock;
    end = v_codes + code_bytes(c.v_bits, d);
  }
};

// fixed[g][i] = scale of group g in steps, times 2^11, in the order of to_fixed; n a multiple of 32.
static INLINE void unpack_scales(const uint8_t *range, int groups, int n, int16_t *fixed) {
  for (int g = 0; g < groups; g++, range += n, fixed += n) {
#if defined(__AVX512F__)
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int i = 0; i < n; i += 32) {
      const __m256i x = _mm256_permutevar8x32_epi32(
          _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(range + i)), _mm256_set1_epi8(15)),
          order);
      _mm512_storeu_si512(fixed + i, _mm512_slli_epi16(_mm512_cvtepu8_epi16(x), 11));
    }
#elif defined(__AVX2__)
    for (int i = 0; i < n; i += 16) {
      const __m128i x = _mm_shuffle_epi32(
          _mm_and_si128(_mm_loadu_si128((const __m128i *)(range + i)), _mm_set1_epi8(15)),
          _MM_SHUFFLE(3, 1, 2, 0));
      _mm256_storeu_si256((__m256i *)(fixed + i), _mm256_slli_epi16(_mm256_cvtepu8_epi16(x), 11));
    }
#else
    for (int i = 0; i < n; i++) fixed[i] = (int16_t)((range[i] & 15) << 11);
#endif
  }
}

// zeros[g][i] = zero of group g in steps, in the order of parts, where groups lie `padded` apart.
static INLINE int padded(int n) { return (n + 63) / 64 * 64; }
static INLINE void unpack_zeros(const uint8_t *range, int groups, int n, uint8_t *zeros) {
  for (int g = 0; g < groups; g++, range += n, zeros += padded(n)) {
#if defined(__AVX512F__)
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int i = 0; i < n; i += 64) {
      const __mmask16 there = i + 32 < n ? 0xffff : 0xff;
      const __m512i x = _mm512_maskz_loadu_epi32(there, range + i);
      _mm512_storeu_si512(zeros + i, _mm512_and_si512(_mm512_srli_epi16(_mm512_permutexvar_epi32(
                                                          order, x), 4), _mm512_set1_epi8(15)));
    }
#elif defined(__AVX2__)
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int i = 0; i < n; i += 32) {
      const __m256i x = _mm256_permutevar8x32_epi32(
          _mm256_loadu_si256((const __m256i *)(range + i)), order);
      _mm256_storeu_si256((__m256i *)(zeros + i),
                          _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)));
    }
#else
    for (int i = 0; i < n; i++) zeros[i] = range[i] >> 4;
#endif
  }
}

// sums[g][r] = dot of row r's parts and zeros[g], for G groups; times `unit[r]`, and with what is
// there.
template <int R, int G>
static INLINE void add_zeros_of(const uint8_t *zeros, const int8_t *parts, int n, const float *unit,
                                float *sums) {
  vf s[G * R];
#if defined(__AVX512F__)
  __m512i x[G * R][2];
#pragma GCC unroll 16
  for (int k = 0; k < G * R; k++) x[k][0] = x[k][1] = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 64, parts += kSpan)
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const __m512i z = _mm512_load_si512(zeros + g * padded(n) + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++)
          x[g * R + r][p] = _mm512_dpbusd_epi32(x[g * R + r][p], z,
                                                _mm512_load_si512(parts + 128 * r + 64 * p));
    }
#pragma GCC unroll 16
  for (int k = 0; k < G * R; k++)
    s[k] = to_float((vi)_mm512_add_epi32(_mm512_slli_epi32(x[k][0], 8), x[k][1]));
#elif defined(__AVX2__)
  __m256i sum[G * R] = {};
  for (int first = 0; first < n; first += 256) {
    __m256i x[G * R][2] = {};  // 16 bits hold the products of eight spans: 8 * 2 * 128 * 15
    for (int i = first; i < min_of(n, first + 256); i += 32) {
      const int8_t *p = parts + i / 64 * kSpan + i % 64;
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const __m256i z = _mm256_load_si256((const __m256i *)(zeros + g * padded(n) + i));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
          for (int h = 0; h < 2; h++)
            x[g * R + r][h] = _mm256_add_epi16(
                x[g * R + r][h], _mm256_maddubs_epi16(z, _mm256_load_si256(
                                                             (const __m256i *)(p + 128 * r + 64 * h))));
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < G * R; k++)
      sum[k] = _mm256_add_epi32(
          sum[k], _mm256_add_epi32(_mm256_madd_epi16(x[k][0], _mm256_set1_epi16(256)),
                                   _mm256_madd_epi16(x[k][1], _mm256_set1_epi16(1))));
  }
  for (int k = 0; k < G * R; k++) s[k] = to_float((vi)sum[k]);
#else
  for (int g = 0; g < G; g++)
    for (int r = 0; r < R; r++) {
      int32_t sum = 0;
      for (int i = 0; i < n; i++) {
        const int8_t *p = parts + i / 64 * kSpan + i % 64 + 128 * r;
        sum += zeros[g * padded(n) + i] * (256 * p[0] + p[64]);
      }
      s[g * R + r] = vf{(float)sum};
    }
#endif
  float dots[G * R];
  sum_each<G * R>(s, dots);
  for (int g = 0; g < G; g++)
    for (int r = 0; r < R; r++) sums[g * kRows + r] += unit[r] * dots[g * R + r];
}

// Groups whose zeros are taken together: as many sums as there are registers for.
template <int R>
constexpr int kZeroGroups = max_of(1, min_of(4, (W == 16 ? 12 : 4) / R));

// Groups have 16 or 32 tokens.
template <class CODES>
struct TwoLevelKeys {
  static constexpr int kLines = CODES::bits + 1;  // the ranges, and what there is beside V's codes

  static void begin(const uint8_t *, const TwoLevelLayout &, const Queries &, PageScratch &) {}

  static void prepare(const uint8_t *page, const TwoLevelLayout &at, PageScratch &s) {
    unpack_scales(page + at.k_range, at.k_groups, at.head_size, s.k_fixed);
    unpack_zeros(page + at.k_range, at.k_groups, at.head_size, s.k_zeros);
  }

  // Scores of R rows, from row `r0` on.
  template <int R, int AHEAD>
  static void scores(const Queries &queries, int r0, const uint8_t *page, Stream &stream,
                     const TwoLevelLayout &at, PageScratch &s) {
    const auto tiles = [&](int tile) __attribute__((always_inline)) {
      return typename CODES::Keys(page + at.k_codes, at.head_size, tile);
    };
    scores_of<R, AHEAD>(queries, r0, page, stream, at, s, tiles);
  }

  // The same with tiles of codes that lie elsewhere.
  template <int R, int AHEAD, class TILES>
  static INLINE void scores_of(const Queries &queries, int r0, const uint8_t *page, Stream &stream,
                               const TwoLevelLayout &at, PageScratch &s, TILES tiles) {
    const int d = at.head_size;
    const float *q = queries.q + (int64_t)r0 * d;
    const uint16_t *step = (const uint16_t *)(page + at.k_step);
    float unit[R], low[R], zeros[kKGroups * kRows], top[R];
    dot_halves<R, 1>((const uint16_t *)(page + at.k_low), q, d, d, low);
    // The query times the steps, of which the largest takes all of the 16 bits.
    vf most[R] = {};
    for (int i = 0; i < d; i += W) {
      const vf x = load_half(step + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vf y = load(q + r * d + i) * x;
        most[r] = vmax(most[r], vmax(y, -y));
      }
    }
    largest_each<R>(most, top);
    for (int r = 0; r < R; r++) {
      to_fixed([&](int i) __attribute__((always_inline)) {
        return load(q + r * d + i) * load_half(step + i);
      }, d, top[r] > 0 ? kTop / top[r] : 0.0f, s.stepped[r]);
      __builtin_memset(s.stepped[r] + d, 0, sizeof(int16_t) * (padded(d) - d));
      split(s.stepped[r], padded(d), s.parts[0] + 128 * r);
      unit[r] = top[r] * (1.0f / kTop) * CODES::zero_step;
      for (int g = 0; g < at.k_groups; g++) zeros[g * kRows + r] = low[r];
    }
    for_groups<kZeroGroups<R>>(at.k_groups, [&](int g, auto count) __attribute__((always_inline)) {
      add_zeros_of<R, count.value>(s.k_zeros + g * padded(d), s.parts[0], d, unit,
                                   zeros + g * kRows);
    });
    // Products with 2^11 u, of 2^15, leave out a factor of 16.
    for (int r = 0; r < R; r++) unit[r] = top[r] * (16.0f / kTop);
    const auto fold = [&](int g, auto groups) __attribute__((always_inline)) {
      for (int r = 0; r < R; r++)
        multiply_split<groups.value, sizeof(s.parts[0])>(s.stepped[r], s.k_fixed + g * d, d,
                                                         s.parts[0] + 128 * r);
    };
    for (int tile = 0; tile < kBlock / 32; tile++) {
      stream.fetch_tokens<AHEAD>();
      const auto codes = tiles(tile);
      int g = tile, second = tile;  // of its second 16 tokens
      if (at.k_groups == kBlock / 32) {
        fold(g, Constant<1>());
        dot<R, AHEAD, 0>(codes, s.parts[0], s.dots, stream);
      } else {
        g = 2 * tile, second = g + 1;
        fold(g, Constant<2>());
        dot<R, AHEAD, sizeof(s.parts[0])>(codes, s.parts[0], s.dots, stream);
      }
      for (int r = 0; r < R; r++)
        for (int i = 0; i < 32; i += W)
          store(s.scores[r] + 32 * tile + i,
                scaled<CODES>(s.dots[r], i, unit[r]) +
                    zeros[(i < 16 ? g : second) * kRows + r]);
    }
  }
};

template <class CODES>
struct TwoLevelValues {
  static constexpr int kLines = CODES::bits;
  static constexpr float kMostFixed = kTop;  // of a probability times a scale

  static void prepare(const uint8_t *page, const TwoLevelLayout &at, PageScratch &s) {
    const uint16_t *scale = (const uint16_t *)(page + at.v_scale);
    for (int i = 0; i < kBlock; i += W) store(s.v_norm + i, load_half(scale + i));
  }

  // Add the page's values to the sums of R rows, from row `r0` on.
  template <int R, int AHEAD>
  static void add(int r0, const uint8_t *page, Stream &stream, const TwoLevelLayout &at,
                  PageScratch &s, State &state) {
    const uint16_t *mean = (const uint16_t *)(page + at.v_mean);
    for (int r = 0; r < R; r++) split(s.p_fixed[r], kBlock, s.parts[0] + 128 * r);
    for (int tile = 0; tile < at.head_size / 32; tile++) {
      stream.fetch_tokens<AHEAD>();
      dot<R, AHEAD, 0>(typename CODES::Values(page + at.v_codes, tile), s.parts[0], s.dots, stream);
      vf m[32 / W];
      for (int i = 0; i < 32; i += W) m[i / W] = load_half(mean + 32 * tile + i) - 0.5f * CODES::top;
      for (int r = 0; r < R; r++) {
        const float scale = s.weight[r] * s.product_unit[r];
        const float sum = s.weight[r] * s.product_sum[r];
        float *acc = state.acc + (int64_t)(r0 + r) * at.head_size + 32 * tile;
        for (int i = 0; i < 32; i += W)
          store(acc + i, scaled<CODES>(s.dots[r], i, scale) + (load(acc + i) + m[i / W] * sum));
      }
    }
  }
};
