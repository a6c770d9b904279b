// The channels of keys by which pages are chosen, for select_keys.h, and what a page says of them.
//
// Codes of four channels, a quad, lie in vectors of their own, so quads are what is chosen.

constexpr int kChannels = kMaxHead / 4;  // most that are chosen

// Which quads of a page's numbers of SIZE bytes are taken.
template <int SIZE>
struct Take {
#if defined(__AVX512F__)
  static constexpr int each = 16 / SIZE;  // quads of a vector
  static constexpr int most = kChannels / 4 / each, pairs = kMaxHead / 4 / (2 * each);
  alignas(64) uint8_t index[most][pairs][64];  // of the quads of two vectors
  uint16_t there[most][pairs];
#endif
};

struct Chosen {
  int quads[kChannels / 4], count;  // ascending; a multiple of eight
  int vectors[kChannels / 4];       // where their codes lie, in bytes from a tile's first
  Take<1> bytes;
  Take<2> halves;
};

// Add what the rows q [n][d] have of power in each channel, for keys of such steps.
static void add_power(const float *q, int n, int d, const uint16_t *step, float *power) {
  for (int i = 0; i < d; i += W) {
    const vf of = load_half(step + i);
    vf sum = load(power + i);
    for (int r = 0; r < n; r++) {
      const vf x = load(q + r * d + i) * of;
      sum += x * x;
    }
    store(power + i, sum);
  }
}

template <int SIZE>
static void plan_take(const int *quads, int count, Take<SIZE> &take) {
#if defined(__AVX512F__)
  using T = Take<SIZE>;
  __builtin_memset(take.there, 0, sizeof(take.there));
  for (int k = 0; k < count; k++) {
    const int pair = quads[k] / (2 * T::each), at = k % T::each;
    take.there[k / T::each][pair] |= (uint16_t)(1 << at);
    uint8_t *index = take.index[k / T::each][pair];
    if constexpr (SIZE == 1)
      ((int32_t *)index)[at] = quads[k] % (2 * T::each);
    else
      ((int64_t *)index)[at] = quads[k] % (2 * T::each);
  }
#else
  (void)quads, (void)count, (void)take;
#endif
}

// The quads that have most of the power, which is lost; of those that have the same, the first.
static void choose_quads(const KiviCall &c, float *x, Chosen &s) {
  const int n = (int)c.head_size / 4;
  for (int i = 0; i < n; i++) {
    const float sum = (x[4 * i] + x[4 * i + 1]) + (x[4 * i + 2] + x[4 * i + 3]);
    x[i] = sum - sum == 0 ? sum : 0.0f;
  }
  int32_t better[kMaxHead / 4];  // than each: how many
  for (int i = 0; i < n; i += W) {
    const vf own = load(x + i);
    vi sum = {}, at;
    for (int j = 0; j < W; j++) at[j] = i + j;
    for (int j = 0; j < n; j++) {
      const vf other = all(x[j]);
      sum -= (other > own) | ((other == own) & (at > j));
    }
    *(vi_mem *)(better + i) = sum;
  }
  s.count = 0;
  for (int i = 0; i < n; i++) {
    if (4 * better[i] >= c.estimate_channels) continue;
    s.vectors[s.count] = 64 * i;
    s.quads[s.count++] = i;
  }
  plan_take(s.quads, s.count, s.bytes);
  plan_take(s.quads, s.count, s.halves);
}

// Copy the chosen quads of N times d numbers of SIZE bytes to as many rows of kChannels. Before each
// quad `fetch` is called, but with AVX-512, which takes many at a time.
template <int SIZE, int N, class FETCH>
static INLINE void take_quads(const uint8_t *x, int d, const Chosen &s, const Take<SIZE> &take,
                              void *out, FETCH fetch) {
  uint8_t *to = (uint8_t *)out;
  constexpr int pitch = SIZE * kChannels;
#if defined(__AVX512F__)
  using T = Take<SIZE>;
  for (int o = 0; o * T::each < s.count; o++) {
    __m512i y[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) y[i] = _mm512_setzero_si512();
    for (int p = 0; p * 8 * T::each < d; p++) {
      const __m512i index = _mm512_load_si512(take.index[o][p]);
      const uint16_t there = take.there[o][p];
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) {
        const uint8_t *from = x + i * SIZE * d + 128 * p;
        const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
        y[i] = _mm512_or_si512(
            y[i], SIZE == 1 ? _mm512_maskz_permutex2var_epi32((__mmask16)there, a, index, b)
                            : _mm512_maskz_permutex2var_epi64((__mmask8)there, a, index, b));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) _mm512_store_si512(to + i * pitch + 64 * o, y[i]);
  }
  (void)fetch;
#else
  (void)take;
  for (int k = 0; k < s.count; k++) {
    fetch();
    const uint8_t *from = x + 4 * SIZE * (int64_t)s.quads[k];
    const int64_t apart = SIZE * d;
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
      __builtin_memcpy(to + i * pitch + 4 * SIZE * k, from + i * apart, 4 * SIZE);
  }
#endif
}

// What is fetched of a page into L2 (see Stream) while another one is computed: a line at a time, with
// as much arithmetic between two of them as there is. (Several lines together are waited for.)
struct Fetching {
  const uint8_t *page;
  const int *lines;  // where they lie in it
  INLINE void next() { __builtin_prefetch(page + *lines++, 0, 2); }
};

// What is taken of a page, for the chosen channels.
struct Taken {
  alignas(64) uint16_t low[kChannels], step[kChannels];
  alignas(64) uint8_t range[kKGroups][kChannels];
};

// Take it of a page.
template <int GROUPS>
static INLINE void take_page(const uint8_t *page, const TwoLevelLayout &at, const Chosen &s,
                             Taken &taken, Fetching &fetching) {
  take_quads<2, 2>(page + at.k_low, at.head_size, s, s.halves, taken.low, [] {});
  take_quads<1, GROUPS>(page + at.k_range, at.head_size, s, s.bytes, taken.range,
                        [&]() __attribute__((always_inline)) { fetching.next(); });
}
