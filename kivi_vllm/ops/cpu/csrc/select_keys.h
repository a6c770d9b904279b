// Estimates of pages by their keys, for ops/select.py: the largest score that a page's keys have in
// those channels in which the query and the newest page's steps say most of it.
//
// With y[c] = q[c] step[c], and a group's scales u and zeros z in steps, a score is
//
//     sum_c (y[c] u[c]) code[c] + sum_c y[c] z[c] + sum_c q[c] low[c]
//
// as in two_level.h. Here y u, and y for z, have eight bits: it is for a choice, and the codes
// themselves are further from the keys than that. Codes of four channels, a quad, lie in vectors of
// their own, so those of other quads are not read.

constexpr int kAhead = 6;                // pages from one to that which is fetched meanwhile
constexpr int kAheadKeys = 3;            // the same where keys are read
constexpr float kWhole = 32767;          // what 16 bits hold
constexpr int kOut = -(1 << 28);         // less than any score

// What `next` fetches in each call for a page: [0] what is read, [1] of that alone what comes before
// the codes. There are more calls than lines, so some come twice; or fewer, and then some come before
// all calls.
static void plan_fetching(const KiviCall &c, KeysScratch &s) {
  const TwoLevelLayout at(c);
  int lines[kLines], n = 0;
  for (int i = 0; i < at.k_codes; i += 64) lines[n++] = i;
  const int head = n, quads = s.chosen.count, channels = 4 * quads, tiles = kBlock / 32;
  for (int u = 0; u < c.k_bits; u++)  // of tokens whose codes share vectors
    for (int k = 0; k < quads; k++)
      lines[n++] = at.k_codes + 16 * u * at.head_size + s.chosen.vectors[k];
  const int in_take = W == 16 ? 0 : quads;
  const int calls = in_take + channels / W + at.k_groups * channels / (2 * W) + tiles * quads;
  s.first = max_of(0, n - calls);
  s.all = s.first + calls;
  for (int i = 0; i < s.all; i++) {
    const int line = i < s.first ? i : s.first + (i - s.first) * (n - s.first) / calls;
    s.lines[0][i] = lines[line];
    s.lines[1][i] = lines[min_of(line, head - 1)];
  }
}

// y of what is taken.
template <int R>
static INLINE void begin_keys(const Taken &taken, Fetching &fetching, KeysScratch &s) {
  const int m = 4 * s.chosen.count;
  vf sum[R] = {};
  vi most[R] = {};  // of |y|, as bits: they order like numbers, and a NaN is the largest
  for (int i = 0; i < m; i += W) {
    fetching.next();
    const vf low = load_half(taken.low + i), step = load_half(taken.step + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vf q = load(s.q[r] + i);
      sum[r] += q * low;
      most[r] = larger(most[r], (vi)(q * step) & 0x7fffffff);
    }
  }
  int32_t bits[R];
  sum_each<R>(sum, s.lows);
  largest_each<R>(most, bits);
  __builtin_memcpy(s.top, bits, sizeof(bits));
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const float factor = s.top[r] > 0 ? kWhole / s.top[r] : 0.0f;
    for (int i = 0; i < m; i += 2 * W) {
      const vf a = load(s.q[r] + i) * load_half(taken.step + i);
      const vf b = load(s.q[r] + i + W) * load_half(taken.step + i + W);
      store_words(s.stepped[r] + i, to_words(a * factor, b * factor));
    }
  }
}

// Multiply it with the scales and the zeros of its groups.
template <class CODES, int R, int GROUPS>
static INLINE void fold_keys(const Taken &taken, Fetching &fetching, KeysScratch &s) {
  const int m = 4 * s.chosen.count;
  for (int i = 0; i < m; i += 2 * W) {
    words y[R];
    const auto pack = [&](words factor, int8_t *to) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r += 2)
        pack_rows(multiply(y[r], factor), multiply(y[min_of(r + 1, R - 1)], factor),
                  to + product_at<R>(i / 4) + product_of_row(r));
    };
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) y[r] = load_words(s.stepped[r] + i);
    pack(same_words(1 << 7), s.whole);
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; g++) {
      fetching.next();
      pack(shifted(low_nibbles(widen(taken.range[g] + i)), 3), s.parts[g]);
    }
  }
  dot_zeros<CODES, R, GROUPS>(taken, s);
}

// Estimates of R rows for one page, of which the first `hidden` tokens do not count.
template <class CODES, int R, int GROUPS>
static INLINE void best_keys(const uint8_t *page, Fetching &fetching, const TwoLevelLayout &at,
                             int hidden, const KeysScratch &s, const float *top,
                             const float *low, float *out) {
  constexpr int kTiles = kBlock / 32, each = GROUPS / kTiles;  // groups of a tile
  vi most[2][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) most[0][r] = most[1][r] = vi{} + kOut;
#pragma GCC unroll 1
  for (int tile = 0; tile < kTiles; tile++) {
    const typename CODES::Keys keys(page + at.k_codes, at.head_size, tile);
    keys([&](auto run) __attribute__((always_inline)) {
      vi x[16 / W][R][2];
      dot_chosen<R, each - 1>(run, s, each * tile, fetching, x);
      for (int t = 0; t < min_of(hidden - 32 * tile, 32); t++)
        for (int r = 0; r < R; r++) x[t % 16 / W][r][t / 16][t % W] = kOut;
#pragma GCC unroll 4
      for (int h = 0; h < 16 / W; h++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
          for (int i = 0; i < 2; i++) most[i][r] = larger(most[i][r], x[h][r][i]);
    });
  }
  int32_t score[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) most[0][r] = larger(most[0][r] * CODES::slot1, most[1][r]);
  largest_each<R>(most[0], score);
  constexpr float kUnit = 4096.0f / (kWhole * CODES::slot1);
  for (int r = 0; r < R; r++)
    out[r] = hidden < kBlock ? top[r] * kUnit * (float)score[r] + low[r] : -__builtin_inff();
}

// Estimates of the rows q [n][head_size], at most kRows, for the unit's pages; laid out as in
// select.h.
template <class CODES, int GROUPS>
static void estimate_keys_of(const KiviCall &c, const Unit &u, const float *q, int n, float *out,
                             KeysScratch &s) {
  const TwoLevelLayout at(c);
  for (int r = 0; r < n; r++)
    for (int k = 0; k < s.chosen.count; k++)
      __builtin_memcpy(s.q[r] + 4 * k, q + r * at.head_size + 4 * s.chosen.quads[k], 4 * sizeof(float));
  const int64_t seen = max_of(first_visible(c, u.start), c.sink_tokens);
  const auto page_at = [&](int64_t block) {
    return page_of(c, *u.row, u.kv_head, min_of(block, u.block_hi - 1));
  };
  // After the last page come the first ones of the next kv head, of which it is not known what is
  // read but what comes before the codes.
  const int next = min_of(u.kv_head + 1, (int)c.num_kv_heads - 1);
  with_constant<kRows>(n, [&](auto rows) __attribute__((always_inline)) {
    constexpr int R = rows.value;
    for (int64_t block = u.block_lo; block < min_of(u.block_lo + kAheadKeys, u.block_hi); block++)
      for (Fetching all{page_at(block), s.lines[0]}; all.lines < s.lines[0] + s.all;) all.next();
    Fetching again{page_at(u.block_lo), s.lines[0]};
    take_page<GROUPS>(page_at(u.block_lo), at, s.chosen, s.taken[u.block_lo % 2], again);
    begin_keys<R>(s.taken[u.block_lo % 2], again, s);
    for (int64_t block = u.block_lo; block < u.block_hi; block++) {
      const int64_t later = block + kAheadKeys, over = later - u.block_hi;
      Fetching fetching =
          over < 0 ? Fetching{page_at(later), s.lines[0]}
                   : Fetching{page_of(c, *u.row, next, min_of(u.block_lo + over, u.block_hi - 1)),
                              s.lines[1]};
      // What is waited for in each step, the next one fills.
      Taken &taken = s.taken[block % 2], &coming = s.taken[(block + 1) % 2];
      for (int i = 0; i < s.first; i++) fetching.next();
      take_page<GROUPS>(page_at(block + 1), at, s.chosen, coming, fetching);
      fold_keys<CODES, R, GROUPS>(taken, fetching, s);
      float top[R], low[R];
      __builtin_memcpy(top, s.top, sizeof(top));
      __builtin_memcpy(low, s.lows, sizeof(low));
      begin_keys<R>(coming, fetching, s);
      const int64_t hidden = min_of<int64_t>(kBlock, max_of<int64_t>(0, seen - block * kBlock));
      float *to = out + block * kRows;
      best_keys<CODES, R, GROUPS>(page_at(block), fetching, at, (int)hidden, s, top, low, to);
      for (int r = R; r < kRows; r++) to[r] = -__builtin_inff();
    }
  });
}

template <class CODES>
static void estimate_by_keys(const KiviCall &c, const Unit &u, const float *q, int n, float *out,
                             KeysScratch &s) {
  if (c.group_size == 16)
    estimate_keys_of<CODES, kBlock / 16>(c, u, q, n, out, s);
  else
    estimate_keys_of<CODES, kBlock / 32>(c, u, q, n, out, s);
}
