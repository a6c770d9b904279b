// Estimates of pages for ops/select.py: how large scores of a page's groups of keys may be, by their
// ranges alone, and what a page weighs by them.
//
// With zero and scale of a group's channel and q' = (q + kRadius |q|) top / 2, an estimate is
// sum_c q[c] zero[c] + sum_c q'[c] scale[c]: two dot products of what a page begins with.

constexpr float kRadius = 0.5f;  // RADIUS

struct SelectScratch {
  alignas(64) uint8_t zeros[kKGroups * kMaxHead], scales[kKGroups * kMaxHead];
  alignas(64) int8_t parts[2][kMaxHead / 64 * kSpan + 64];  // of q and of q', times steps
  alignas(64) int16_t fixed[kMaxHead];
  alignas(64) float widened[kRows][kMaxHead];  // q'
  float sums[2][kKGroups * kRows];
};

template <class CODES>
struct TwoLevelEstimates {
  using Layout = TwoLevelLayout;
  static int bytes(const Layout &at) { return at.k_codes; }  // of a page that are read

  static void prepare(const uint8_t *page, const Layout &at, SelectScratch &s) {
    unpack_ranges<0>(page + at.k_range, at.k_groups, at.head_size, s.scales);
    unpack_ranges<4>(page + at.k_range, at.k_groups, at.head_size, s.zeros);
  }

  template <int R>
  static void widen(const float *, int, SelectScratch &) {}

  // s.sums[0][g][r], of R rows of queries.
  template <int R>
  static void estimate(const uint8_t *page, const float *q, const Layout &at, SelectScratch &s) {
    // Both sums have one unit, of which the largest product takes all of the 16 bits.
    constexpr float kZero = CODES::zero_step, kScale = 0.5f * CODES::top;
    constexpr float kMost = max_of(kZero, kScale * (1 + kRadius));
    const int d = at.head_size;
    const uint16_t *step = (const uint16_t *)(page + at.k_step);
    float low[R], top[R], unit[R];
    dot_halves<R, 1>((const uint16_t *)(page + at.k_low), q, d, d, low);
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
      const float factor = top[r] > 0 ? kTop / (kMost * top[r]) : 0.0f;
      unit[r] = kMost * top[r] * (1.0f / kTop);
      const auto stepped = [&](int i) __attribute__((always_inline)) {
        return load(q + r * d + i) * load_half(step + i);
      };
      __builtin_memset(s.fixed + d, 0, sizeof(int16_t) * (padded(d) - d));
      to_fixed(stepped, d, factor * kZero, s.fixed);
      split(s.fixed, padded(d), s.parts[0] + 128 * r);
      to_fixed([&](int i) __attribute__((always_inline)) {
        const vf y = stepped(i);
        return y + kRadius * vmax(y, -y);
      }, d, factor * kScale, s.fixed);
      split(s.fixed, padded(d), s.parts[1] + 128 * r);
      for (int g = 0; g < at.k_groups; g++) s.sums[0][g * kRows + r] = low[r];
    }
    for_groups<kRangeGroups<R>>(at.k_groups, [&](int g, auto count) __attribute__((always_inline)) {
      add_ranges_of<R, count.value, 2>({s.zeros + g * padded(d), s.scales + g * padded(d)},
                                       {s.parts[0], s.parts[1]}, d, unit, s.sums[0] + g * kRows);
    });
  }
};

template <class CODES>
struct PaperEstimates {
  using Layout = PaperLayout;
  static int bytes(const Layout &at) { return at.k_codes; }
  static void prepare(const uint8_t *, const Layout &, SelectScratch &) {}

  template <int R>
  static void widen(const float *q, int d, SelectScratch &s) {
    for (int r = 0; r < R; r++)
      for (int i = 0; i < d; i += W) {
        const vf x = load(q + r * d + i);
        store(s.widened[r] + i, 0.5f * CODES::top * (x + kRadius * vmax(x, -x)));
      }
  }

  template <int R>
  static void estimate(const uint8_t *page, const float *q, const Layout &at, SelectScratch &s) {
    const int d = at.head_size;
    zero_sums<R>(page + at.k_zero, at.k_groups, q, d, d, s.sums[0]);
    zero_sums<R>(page + at.k_scale, at.k_groups, s.widened[0], kMaxHead, d, s.sums[1]);
    for (int g = 0; g < at.k_groups; g++)
      for (int r = 0; r < R; r++) s.sums[0][g * kRows + r] += s.sums[1][g * kRows + r];
  }
};

// Estimates of the rows q [n][head_size] for the unit's pages: out[row][group][page], `stride` pages
// apart.
template <class ESTIMATES>
static void estimate_rows(const KiviCall &c, const Unit &u, const float *q, int n, float *out,
                          int64_t stride, SelectScratch &s) {
  const typename ESTIMATES::Layout at(c);
  const int d = at.head_size, groups = at.k_groups, bytes = ESTIMATES::bytes(at);
  with_constant<kRows>(n, [&](auto rows) __attribute__((always_inline)) {
    constexpr int R = rows.value;
    ESTIMATES::template widen<R>(q, d, s);
    const uint8_t *page = page_of(c, *u.row, u.kv_head, u.block_lo);
    for (int64_t block = u.block_lo; block < u.block_hi; block++) {
      const uint8_t *next = page_of(c, *u.row, u.kv_head, min_of(block + 1, u.block_hi - 1));
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 3);
      ESTIMATES::prepare(page, at, s);
      ESTIMATES::template estimate<R>(page, q, at, s);
      for (int r = 0; r < R; r++)
        for (int g = 0; g < groups; g++)
          out[(r * groups + g) * stride + block] = s.sums[0][g * kRows + r];
      page = next;
    }
  });
}

static void estimate(const KiviCall &c, const Unit &u, const float *q, int rows, float *out,
                     int64_t stride, SelectScratch &s) {
  with_codes(c, [&](auto k, auto, auto two_level) __attribute__((always_inline)) {
    using CODES = decltype(k);
    for (int r0 = 0; r0 < rows;) {
      const int left = rows - r0, turns = (left + kRows - 1) / kRows;
      const int n = (left + turns - 1) / turns;
      const float *x = q + (int64_t)r0 * c.head_size;
      float *to = out + (int64_t)r0 * (kBlock / c.group_size) * stride;
      if constexpr (two_level.value)
        estimate_rows<TwoLevelEstimates<CODES>>(c, u, x, n, to, stride, s);
      else
        estimate_rows<PaperEstimates<CODES>>(c, u, x, n, to, stride, s);
      r0 += n;
    }
  });
}

// What n pages weigh, in `weights`, by the estimates x [rows][groups][stride] of all rows, which are
// in units of log2 and are lost. `stride`, of both, is a multiple of 16.
static void weigh(const KiviCall &c, float *x, int rows, int64_t n, int64_t stride,
                  float *weights) {
  const int groups = kBlock / (int)c.group_size;
  const float cap = (float)c.soft_cap * 1.4426950408889634f;
  const vf none = all(-__builtin_inff());
  for (int64_t i = 0; i < stride; i += W) store(weights + i, vf{});
  for (int r = 0; r < rows; r++, x += groups * stride) {
    vf most = none;
    for (int g = 0; g < groups; g++) {
      float *of = x + g * stride;
      for (int64_t i = n; i < stride; i++) of[i] = none[0];
      for (int64_t i = 0; i < stride; i += W) {
        vf y = load(of + i);
        const vi finite = y - y == vf{};
        if (cap > 0) y = cap * tanhv(y * (1.0f / cap));
        y = either(finite, y, none);
        most = vmax(most, y);
        store(of + i, y);
      }
    }
    const float top = largest(most), shift = top == none[0] ? 0.0f : top;
    vf total = {};
    for (int64_t i = 0; i < stride; i += W) {
      vf e = {};
      for (int g = 0; g < groups; g++) e += exp2v(load(x + g * stride + i) - shift);
      total += e;
      store(x + i, e);
    }
    const float share = 1.0f / sum_of(total);
    for (int64_t i = 0; i < stride; i += W) store(weights + i, load(weights + i) + load(x + i) * share);
  }
}
