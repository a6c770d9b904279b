// Products with the chosen channels of keys, for select_keys.h: of eight bits, several rows of queries
// at a time.

constexpr int kEven = (kRows + 1) / 2 * 2;

constexpr int kLines = 4 * kChannels;  // that `next` fetches of a page, at most

struct KeysScratch {
  Chosen chosen;
  int lines[2][kLines], first, all;  // see plan_fetching
  alignas(64) float power[kMaxHead];  // of channels, then of quads
  alignas(64) float q[kRows][kChannels];
  Taken taken[2];                                         // of a page, and of the next one
  alignas(64) int16_t stepped[kRows][kChannels];          // y
  alignas(64) int8_t parts[kKGroups][kEven * kChannels];  // y u, see product_at
  alignas(64) int8_t whole[kEven * kChannels];            // y
  alignas(64) int32_t zeros[2][kRows][kKGroups];          // for both slots
  float top[kRows], lows[kRows];                          // the largest |y|; the sum with low
};

// Where the products of quad k of the first row begin, as pack_rows leaves them for R rows.
template <int R>
static INLINE constexpr int product_at(int k) {
  constexpr int each = W / 2, block = 4 * W * ((R + 1) / 2);  // quads of a vector of words
  return k / each * block + k % each / 2 * 16 + k % 2 * 4;
}
static INLINE constexpr int product_of_row(int r) { return r / 2 * 4 * W + r % 2 * 8; }

// Products of two rows that have eight bits, as bytes: eight of the one, eight of the other.
static INLINE void pack_rows(words a, words b, int8_t *out) {
#if defined(__AVX512F__)
  _mm512_store_si512(out, _mm512_packs_epi16(a, b));
#elif defined(__AVX2__)
  _mm256_store_si256((__m256i *)out, _mm256_packs_epi16(a, b));
#else
  for (int i = 0; i < 8; i++) {
    out[i] = (int8_t)min_of<int>(a[i], 127);
    out[8 + i] = (int8_t)min_of<int>(b[i], 127);
  }
#endif
}

#if defined(__AVX2__)
// sum + codes * part, of groups of four: in 16 bits without VNNI, each pair a sum of its own.
static INLINE __m256i dp8(__m256i sum, __m256i codes, const int8_t *part) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*(const int32_t *)part));
  return sum;
#else
  int four;
  __builtin_memcpy(&four, part, 4);
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four)));
  asm("" : "+x"(sum));  // or GCC keeps all products, to add them up in another order
  return sum;
#endif
}
// The sums of up to eight such, each of a product of 120 * 2 * 15 at most.
static INLINE __m256i dp8_sums(__m256i x) {
#if defined(__AVX512VNNI__)
  return x;
#else
  return _mm256_madd_epi16(x, _mm256_set1_epi16(1));
#endif
}
#endif

// zeros[slot][r][g] = products of y with the zeros of groups, in the units of products with y u; for
// codes that are slot1 times as large, so much more.
template <class CODES, int R, int GROUPS>
static INLINE void dot_zeros(const Taken &taken, KeysScratch &s) {
  static_assert(kKGroups == 8);
  // Products with u lack twelve bits, and those with z eight.
#if defined(__AVX2__)
  __m256i sum[R] = {};
  for (int base = 0; base < s.chosen.count; base += 8) {
    // Groups side by side, by a transposition of their quads.
    __m256i v[8], t[8], x[R] = {};
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++)
      v[g] = _mm256_load_si256((const __m256i *)(taken.range[g % GROUPS] + 4 * base));
#pragma GCC unroll 4
    for (int g = 0; g < 8; g += 2) {
      t[g] = _mm256_unpacklo_epi32(v[g], v[g + 1]);
      t[g + 1] = _mm256_unpackhi_epi32(v[g], v[g + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const int g = i / 2 * 4 + i % 2;
      v[2 * i] = _mm256_unpacklo_epi64(t[g], t[g + 2]);
      v[2 * i + 1] = _mm256_unpackhi_epi64(t[g], t[g + 2]);
    }
    const int8_t *of = s.whole + product_at<R>(base);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
      const __m256i quad = k < 4 ? _mm256_permute2x128_si256(v[k], v[k + 4], 0x20)
                                 : _mm256_permute2x128_si256(v[k - 4], v[k], 0x31);
      const __m256i z = _mm256_and_si256(_mm256_srli_epi16(quad, 4), _mm256_set1_epi8(15));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) x[r] = dp8(x[r], z, of + product_at<R>(k) + product_of_row(r));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r] = _mm256_add_epi32(sum[r], dp8_sums(x[r]));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const __m256i x = _mm256_slli_epi32(sum[r], __builtin_ctz(CODES::zero_step));
    const __m256i zero = _mm256_srai_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(8)), 4);
    _mm256_store_si256((__m256i *)s.zeros[0][r], zero);
    _mm256_store_si256((__m256i *)s.zeros[1][r],
                       _mm256_slli_epi32(zero, __builtin_ctz(CODES::slot1)));
  }
#else
  for (int r = 0; r < R; r++)
    for (int g = 0; g < GROUPS; g++) {
      int32_t sum = 0;
      for (int i = 0; i < 4 * s.chosen.count; i++)
        sum += (taken.range[g][i] >> 4) *
               s.whole[product_at<R>(i / 4) + product_of_row(r) + i % 4];
      s.zeros[0][r][g] = (sum * CODES::zero_step + 8) >> 4;
      s.zeros[1][r][g] = s.zeros[0][r][g] * CODES::slot1;
    }
#endif
}

// x[.][r][slot], which have W tokens each: the products of R rows with the chosen quads of a tile, with
// the zeros. Slot 0 has group `g`, slot 1 the group APART after it.
template <int R, int APART, class RUN>
static INLINE void dot_chosen(RUN run, const KeysScratch &s, int g, Fetching &fetching,
                              vi (*x)[R][2]) {
  const int8_t *parts = s.parts[g];
  constexpr int apart = APART * (int)sizeof(s.parts[0]);
  const auto zero = [&](int r, int i) __attribute__((always_inline)) {
    return vi{} + s.zeros[i][r][g + i * APART];
  };
#if defined(__AVX512VNNI__)
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) x[0][r][i] = zero(r, i);
  for (int base = 0; base < s.chosen.count; base += 8, parts += product_at<R>(8))
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
      vc slot[2];
      fetching.next();
      run.read(s.chosen.vectors[base + k], slot);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const int8_t *p = parts + product_at<R>(k) + product_of_row(r);
        x[0][r][0] = (vi)dp((__m512i)x[0][r][0], (__m512i)slot[0], p);
        x[0][r][1] = (vi)dp((__m512i)x[0][r][1], (__m512i)slot[1], p + apart);
      }
    }
#elif defined(__AVX2__)
  // One slot after the other: registers hold the sums of all tokens of one.
  for (int base = 0; base < s.chosen.count; base += 8, parts += product_at<R>(8))
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      __m256i sum[2][R] = {};
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) {
        vc slot[2][2];
        if (i == 0) fetching.next();
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) run.read(s.chosen.vectors[base + k] + 32 * h, slot[h]);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const int8_t *p = parts + product_at<R>(k) + product_of_row(r) + i * apart;
#pragma GCC unroll 2
          for (int h = 0; h < 2; h++) sum[h][r] = dp8(sum[h][r], (__m256i)slot[h][i], p);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
          x[h][r][i] = (base ? x[h][r][i] : zero(r, i)) + (vi)dp8_sums(sum[h][r]);
      asm volatile("" ::: "memory");  // or GCC keeps the codes of both slots
    }
#else
  for (int h = 0; h < 16 / W; h++)
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 2; i++) x[h][r][i] = zero(r, i);
  for (int k = 0; k < s.chosen.count; k++) {
    fetching.next();
    for (int i = 0; i < 64; i++) {
      vc slot[2];
      run.read(s.chosen.vectors[k] + i, slot);
      for (int r = 0; r < R; r++) {
        const int8_t *p = parts + product_at<R>(k) + product_of_row(r) + i % 4;
        vi(&sum)[2] = x[i / (4 * W)][r];
        sum[0][i / 4 % W] += slot[0] * p[0];
        sum[1][i / 4 % W] += slot[1] * p[apart];
      }
    }
  }
#endif
}
