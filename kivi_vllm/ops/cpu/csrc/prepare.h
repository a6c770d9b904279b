// The state of a unit's query rows, and what a page's scales are made ready in.

constexpr int kKGroups = kBlock / 16;      // at most
constexpr int kVGroups = kMaxHead / 32;    // at most
constexpr float kTop = 32600.0f;           // of what is to be split in parts

// The online softmax of the rows of a unit.
struct State {
  float max[kMaxRows];  // of the scores so far, which are in units of log2
  float sum[kMaxRows];
  float *acc;           // [rows][head_size]

  // Make `top` the largest score of a row, unless a larger one has been seen.
  INLINE void see(int row, int d, float top) {
    if (top <= max[row]) return;
    const float keep = exp2s(max[row] - top);
    max[row] = top;
    sum[row] *= keep;
    float *x = acc + (int64_t)row * d;
    for (int i = 0; i < d; i += W) store(x + i, load(x + i) * keep);
  }
};

// The query rows of a unit.
struct Queries {
  int rows, heads;      // rows = tokens * heads
  int64_t start;        // position of the first token
  float *q;             // [rows][head_size], times scale * log2(e)
  const float *slopes;  // [heads] of this unit, or null
  float soft_cap;       // times log2(e); 0: none
  int64_t window;       // 0: none
  int64_t position(int row) const { return start + row / heads; }
};

// Work space of a page.
struct PageScratch {
  // Of a page's scales, for any number of rows: see paper.h and two_level.h.
  alignas(64) float v_norm[kBlock];
  alignas(64) uint8_t k_zeros[kKGroups * kMaxHead];
  int16_t stepped[kRows][kMaxHead];  // q times the steps of a channel
  int16_t k_fixed[kKGroups * kMaxHead], v_fixed[kVGroups * kBlock];
  float k_factor[kKGroups];
  // Of the rows.
  // Of q times a group's scales, then of p. (A line more, so that what is read of one half does not
  // seem to wait for what was written to the other.)
  alignas(64) int8_t parts[2][kMaxHead / 64 * kSpan + 64];
  alignas(64) float scores[kRows][kBlock], products[kRows][kBlock];  // products: with v_norm
  int16_t p_fixed[kRows][kBlock];
  float product_sum[kRows], product_unit[kRows], weight[kRows];  // see weigh_page
  float sums[kVGroups * kRows];
  int32_t dots[kRows][32];
  // Of the unit, where pages are paper's: see balance_queries.
  float balance[kMaxHead], unbalance[kMaxHead], q_unit[kMaxRows];
  alignas(64) int16_t q_fixed[kMaxNumbers];
};

// Do `f(g, Constant<n>())` for groups g to g + n - 1, at most MOST together, until all are done.
template <int MOST, class F>
static INLINE void for_groups(int groups, F f) {
  int g = 0;
  for (; g + MOST <= groups; g += MOST) f(g, Constant<MOST>());
  if constexpr (MOST > 2)
    for (; g + 2 <= groups; g += 2) f(g, Constant<2>());
  for (; g < groups; g++) f(g, Constant<1>());
}

// sums[g][r] = dot(x[r], halves[g]) for G groups of n; rows of x are `stride` apart.
template <int R, int G>
static INLINE void dot_halves(const uint16_t *halves, const float *x, int stride, int n,
                              float *sums) {
  vf s[G * R];
#pragma GCC unroll 32
  for (int k = 0; k < G * R; k++) s[k] = vf{};
  for (int i = 0; i < n; i += W) {
    vf y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) y[r] = load(x + r * stride + i);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const vf z = load_half(halves + g * n + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) s[g * R + r] += z * y[r];
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) sum_each<R>(s + g * R, sums + g * kRows);
}

// W dot products of a tile, from `i` on, times `unit`.
template <class CODES>
static INLINE vf scaled(const int32_t *dots, int i, float unit) {
  return load_ints(dots + i) * (i < 16 ? unit : unit * (1.0f / CODES::slot1));
}
