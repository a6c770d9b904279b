// Estimates of pages by their keys, for ops/select.py: the scores that attention computes of a page,
// but over those channels only in which the query and the newest page's steps say most of them.
//
// Codes of four channels, a quad, lie in vectors of their own, so those of other quads are not read.
// What else a page says of its keys is copied for the chosen channels, as a page of so many.

struct KeysScratch {
  int quads[kMaxHead / 8], count;     // the chosen ones, ascending
  uint64_t chosen[kMaxHead / 256];    // a bit for each quad
  alignas(64) float power[kMaxHead];  // of channels, then of quads
  alignas(64) float q[kRows * kMaxHead / 2];
  alignas(64) uint8_t head[(4 + kKGroups) * kMaxHead / 2 + 64];  // low, steps and ranges
  PageScratch page;
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

// The `channels` / 4 quads that have most of it; of those that have the same, the first.
static void choose_quads(int d, int channels, KeysScratch &s) {
  float *x = s.power;
  const int n = d / 4;
  for (int i = 0; i < n; i++) {
    const float sum = (x[4 * i] + x[4 * i + 1]) + (x[4 * i + 2] + x[4 * i + 3]);
    x[i] = sum - sum == 0 ? sum : 0.0f;
  }
  s.count = 0;
  for (uint64_t &word : s.chosen) word = 0;
  for (int i = 0; i < n; i++) {
    int better = 0;
    for (int j = 0; j < n; j++) better += (x[j] > x[i]) | ((x[j] == x[i]) & (j < i));
    if (4 * better >= channels) continue;
    s.chosen[i / 64] |= (uint64_t)1 << i % 64;
    s.quads[s.count++] = i;
  }
}

// Copy the chosen quads of d numbers of SIZE bytes, one after the other; returns their end. Up to 64
// bytes after it may be overwritten.
template <int SIZE>
static INLINE uint8_t *take_quads(const uint8_t *x, int d, const KeysScratch &s, uint8_t *out) {
#if defined(__AVX512F__)
  constexpr int each = 16 / SIZE;  // quads of a vector
  for (int i = 0; i < d / 4; i += each, x += 64) {
    const unsigned bits = (unsigned)(s.chosen[i / 64] >> i % 64) & ((1u << each) - 1);
    const __m512i y = _mm512_loadu_si512(x);
    _mm512_storeu_si512(out, SIZE == 1 ? _mm512_maskz_compress_epi32((__mmask16)bits, y)
                                       : _mm512_maskz_compress_epi64((__mmask8)bits, y));
    out += 4 * SIZE * __builtin_popcount(bits);
  }
  return out;
#else
  (void)d;
  for (int k = 0; k < s.count; k++, out += 4 * SIZE)
    __builtin_memcpy(out, x + 4 * SIZE * s.quads[k], 4 * SIZE);
  return out;
#endif
}

// A tile of keys, of which only the chosen quads are read.
template <class CODES>
struct ChosenKeys {
  typename CODES::Keys keys;
  const KeysScratch &s;

  template <class RUN>
  struct ChosenRun {
    RUN run;
    const int *list;
    int64_t vectors;  // 64 for each place in the list
    int first, quads;
    INLINE void read(int64_t at, vc (&slot)[2]) const {
      const int64_t place = vectors + at;
      run.read((int64_t)list[place >> 6] * 64 + (place & 63), slot);
    }
  };

  template <class F>
  INLINE void operator()(F f) const {
    keys([&](auto run) __attribute__((always_inline)) {
      f(ChosenRun<decltype(run)>{run, s.quads, 0, 0, s.count});
    });
  }
};

// Fetch, into L2 (see Stream), what is read of a page: a quarter of it with each tile of another one.
template <class CODES>
static INLINE void fetch_keys(const uint8_t *page, const TwoLevelLayout &at, int tile,
                              const KeysScratch &s) {
  const int lines = at.k_codes / 64, quads = s.count / 4;
  for (int i = lines * tile / 4; i < lines * (tile + 1) / 4; i++)
    __builtin_prefetch(page + 64 * i, 0, 2);
  for (int k = quads * tile; k < quads * (tile + 1); k++)
    for (int unit = 0; unit < CODES::key_units; unit++)
      __builtin_prefetch(page + at.k_codes + (unit * at.head_size / 4 + s.quads[k]) * 64, 0, 2);
}

// log2 of the sum of powers of two of R rows' scores, of which the first `low` do not count, nor
// those that are not finite.
template <int R>
static INLINE void sum_powers(int low, float cap, float (*scores)[kBlock], float *out) {
  const vf none = all(-__builtin_inff());
  vf most[R], sum[R], shift[R];
  float top[R], total[R];
  for (int r = 0; low > 0 && r < R; r++) hide(low, kBlock, kBlock, scores[r]);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) most[r] = none, sum[r] = vf{};
  for (int i = 0; i < kBlock; i += W)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      vf y = load(scores[r] + i);
      const vi finite = y - y == vf{};
      if (cap > 0) y = cap * tanhv(y * (1.0f / cap));
      y = either(finite, y, none);
      most[r] = vmax(most[r], y);
      store(scores[r] + i, y);
    }
  largest_each<R>(most, top);
  for (int r = 0; r < R; r++) shift[r] = all(top[r] == none[0] ? 0.0f : top[r]);
  for (int i = 0; i < kBlock; i += W)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r] += exp2v<true>(load(scores[r] + i) - shift[r]);
  sum_each<R>(sum, total);
  for (int r = 0; r < R; r++) out[r] = top[r] + __builtin_log2f(total[r]);
}

// Estimates of the rows q [n][head_size], at most kRows, for the unit's pages, one a page; laid out
// as in select.h.
template <class CODES>
static void estimate_by_keys(const KiviCall &c, const Unit &u, const float *q, int n, float *out,
                             KeysScratch &s) {
  using Keys = TwoLevelKeys<CODES>;
  const TwoLevelLayout at(c);
  const int d = at.head_size, m = 4 * s.count;
  TwoLevelLayout view = at;  // of s.head
  view.head_size = m, view.k_low = 0, view.k_step = 2 * m, view.k_range = 4 * m;
  for (int r = 0; r < n; r++)
    for (int k = 0; k < s.count; k++)
      __builtin_memcpy(s.q + r * m + 4 * k, q + r * d + 4 * s.quads[k], 4 * sizeof(float));
  const Queries rows{n, n, u.start, s.q, nullptr, 0.0f, 0};
  const int64_t seen = max_of(first_visible(c, u.start), c.sink_tokens);
  const float cap = (float)c.soft_cap * 1.4426950408889634f;
  Stream none{nullptr, false};
  with_constant<kRows>(n, [&](auto count) __attribute__((always_inline)) {
    constexpr int R = count.value;
    for (int64_t block = u.block_lo; block < u.block_hi; block++) {
      const uint8_t *page = page_of(c, *u.row, u.kv_head, block);
      const uint8_t *next = page_of(c, *u.row, u.kv_head, min_of(block + 1, u.block_hi - 1));
      uint8_t *head = take_quads<2>(page + at.k_low, d, s, s.head);
      head = take_quads<2>(page + at.k_step, d, s, head);
      for (int g = 0; g < at.k_groups; g++)
        head = take_quads<1>(page + at.k_range + g * d, d, s, head);
      Keys::prepare(s.head, view, s.page);
      Keys::template scores_of<R, 0>(
          rows, 0, s.head, none, view, s.page, [&](int tile) __attribute__((always_inline)) {
            fetch_keys<CODES>(next, at, tile, s);
            return ChosenKeys<CODES>{typename CODES::Keys(page + at.k_codes, d, tile), s};
          });
      float *to = out + block * kRows;
      const int64_t low = max_of<int64_t>(0, seen - block * kBlock);
      sum_powers<R>((int)min_of<int64_t>(low, kBlock), cap, s.page.scores, to);
      for (int r = R; r < kRows; r++) to[r] = -__builtin_inff();
    }
  });
}
