// Estimates of pages for ops/select.py: how large scores of a page's groups of keys may be, by their
// ranges alone, and what a page weighs by them.
//
// With zero and scale of a group's channel and q' = (q + kRadius |q|) top / 2, an estimate is
// sum_c q[c] zero[c] + sum_c q'[c] scale[c]: two dot products of what a page begins with. Of ranges of
// two levels they are taken in integers: a query has 16 bits, and so have a page's steps.
//
// Estimates lie as [row / kRows][group][page][row % kRows], those of rows that are not there -inf.

constexpr float kRadius = 0.5f;  // RADIUS

struct SelectScratch {
  // Of two levels: what zeros and scales are multiplied with, but for a page's steps, which are here too.
  alignas(64) int16_t of_zeros[kRows][kMaxHead], of_scales[kRows][kMaxHead];
  alignas(64) int16_t steps[kMaxHead];
  float unit[kRows];
  // Of paper pages: q'.
  alignas(64) float half[kRows][kMaxHead];
  float sums[2][kKGroups * kRows];
};

// What is read of a page to come, fetched into L2 (see Stream) while another one is computed.
struct Lines {
  const uint8_t *at, *end;
  template <int N = 1>
  INLINE void fetch() {
#pragma GCC unroll 2
    for (int i = 0; i < N; i++, at += 64)
      if (at < end) __builtin_prefetch(at, 0, 2);
  }
};

// The largest of d numbers of fp16 that are not negative; NaN if one is.
static INLINE float largest_half(const uint16_t *x, int d) {
  vh most = {};
  for (int i = 0; i < d; i += W) {
    const vh y = *(const vh_mem *)(x + i);
    most = y > most ? y : most;  // they order like their bits
  }
  uint16_t bits = 0;
  for (int i = 0; i < W; i++) bits = max_of(bits, most[i]);
  uint16_t same[W];
  for (int i = 0; i < W; i++) same[i] = bits;
  return load_half(same)[0];
}

template <class CODES>
struct TwoLevelEstimates {
  using Layout = TwoLevelLayout;
  static constexpr float kHalf = 0.5f * CODES::top;
  static constexpr float kMost = max_of((float)CODES::zero_step, kHalf * (1 + kRadius));
  static constexpr int kLines = W == 16 ? 2 : 1;  // as many as there are, for all R
  static int bytes(const Layout &at) { return at.k_codes; }  // of a page that are read

  // With y = q step, a group's estimate is a dot product of zero_step y with its zeros, and one of
  // kHalf (y + kRadius |y|) with its scales: of these factors, what q is of them.
  template <int R>
  static void begin(const float *q, int d, SelectScratch &s) {
    for (int r = 0; r < R; r++) {
      vf most = {};
      for (int i = 0; i < d; i += W) {
        const vf x = load(q + r * d + i);
        most = vmax(most, vmax(x, -x));
      }
      const float top = largest(most), factor = top > 0 ? kWhole / (top * kMost) : 0.0f;
      s.unit[r] = top * kMost * (32768.0f / (kWhole * kWhole));
      for (int i = 0; i < d; i += 2 * W) {
        vf zeros[2], scales[2];
        for (int k = 0; k < 2; k++) {
          const vf x = load(q + r * d + i + k * W) * factor;
          zeros[k] = x * CODES::zero_step;
          scales[k] = (x + vmax(x, -x) * kRadius) * kHalf;
        }
        store_words(s.of_zeros[r] + i, to_words(zeros[0], zeros[1]));
        store_words(s.of_scales[r] + i, to_words(scales[0], scales[1]));
      }
    }
  }

  // out[g * pitch + r], of R rows of queries.
  template <int R>
  static void estimate(const uint8_t *page, const float *q, const Layout &at, SelectScratch &s,
                       float *out, int64_t pitch, Lines lines) {
    const int d = at.head_size;
    const uint16_t *low = (const uint16_t *)(page + at.k_low);
    const uint16_t *step = (const uint16_t *)(page + at.k_step);
    const float top = largest_half(step, d), factor = top > 0 ? kWhole / top : 0.0f;
    vf sum[R] = {};
    for (int i = 0; i < d; i += 2 * W) {
      lines.fetch<kLines>();
      store_words(s.steps + i, to_words(load_half(step + i) * factor,
                                        load_half(step + i + W) * factor));
#pragma GCC unroll 2
      for (int k = i; k < i + 2 * W; k += W) {
        const vf l = load_half(low + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum[r] += load(q + r * d + k) * l;
      }
    }
    alignas(16) float lows[R], unit[R];
    sum_each<R>(sum, lows);
    for (int r = 0; r < R; r++) unit[r] = s.unit[r] * top;
    constexpr int kTogether = max_of(1, min_of(4, (W == 16 ? 16 : 8) / R));  // as registers allow
    for_groups<kTogether>(at.k_groups, [&](int g0, auto count) __attribute__((always_inline)) {
      constexpr int G = count.value;
      const uint8_t *range = page + at.k_range + g0 * d;
      vi x[G * R];
#pragma GCC unroll 16
      for (int k = 0; k < G * R; k++) x[k] = vi{};
      for (int i = 0; i < d; i += 2 * W) {
        lines.fetch<kLines>();
        const words steps = load_words(s.steps + i);
        words a[R], b[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          a[r] = multiply(load_words(s.of_zeros[r] + i), steps);
          b[r] = multiply(load_words(s.of_scales[r] + i), steps);
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
          const words both = widen(range + g * d + i);
          const words zero = high_nibbles(both), scale = low_nibbles(both);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            x[g * R + r] = add_products(x[g * R + r], a[r], zero);
            x[g * R + r] = add_products(x[g * R + r], b[r], scale);
          }
        }
      }
      alignas(16) int32_t sums[G * R];
      sum_each<G * R>(x, sums);
      for (int g = 0; g < G; g++)
        for (int r = 0; r < R; r++)
          out[(g0 + g) * pitch + r] = lows[r] + unit[r] * (float)sums[g * R + r];
    });
  }
};

template <class CODES>
struct PaperEstimates {
  using Layout = PaperLayout;
  static int bytes(const Layout &at) { return at.k_codes; }

  template <int R>
  static void begin(const float *q, int d, SelectScratch &s) {
    for (int r = 0; r < R; r++)
      for (int i = 0; i < d; i += W) {
        const vf x = load(q + r * d + i);
        store(s.half[r] + i, 0.5f * CODES::top * (x + kRadius * vmax(x, -x)));
      }
  }

  template <int R>
  static void estimate(const uint8_t *page, const float *q, const Layout &at, SelectScratch &s,
                       float *out, int64_t pitch, Lines lines) {
    while (lines.at < lines.end) lines.fetch();
    const int d = at.head_size;
    zero_sums<R>(page + at.k_zero, at.k_groups, q, d, d, s.sums[0]);
    zero_sums<R>(page + at.k_scale, at.k_groups, s.half[0], kMaxHead, d, s.sums[1]);
    for (int g = 0; g < at.k_groups; g++)
      for (int r = 0; r < R; r++)
        out[g * pitch + r] = s.sums[0][g * kRows + r] + s.sums[1][g * kRows + r];
  }
};

// Estimates of the rows q [n][head_size], at most kRows, for the unit's pages, of `stride` in all.
template <class ESTIMATES>
static void estimate_rows(const KiviCall &c, const Unit &u, const float *q, int n, float *out,
                          int64_t stride, SelectScratch &s) {
  const typename ESTIMATES::Layout at(c);
  const int d = at.head_size, bytes = ESTIMATES::bytes(at);
  with_constant<kRows>(n, [&](auto rows) __attribute__((always_inline)) {
    constexpr int R = rows.value;
    ESTIMATES::template begin<R>(q, d, s);
    const auto page_at = [&](int64_t block) { return page_of(c, *u.row, u.kv_head, block); };
    // After the last page come the first ones of the next kv head.
    const int next = min_of(u.kv_head + 1, (int)c.num_kv_heads - 1);
    const auto lines_of = [&](int64_t block) {
      const int64_t beyond = min_of(u.block_lo + block - u.block_hi, u.block_hi - 1);
      const uint8_t *page =
          block < u.block_hi ? page_at(block) : page_of(c, *u.row, next, beyond);
      return Lines{page, page + bytes};
    };
    for (int64_t block = u.block_lo; block < u.block_hi; block++) {
      float *to = out + block * kRows;
      ESTIMATES::template estimate<R>(page_at(block), q, at, s, to, stride * kRows,
                                      lines_of(block + kAhead));
      if constexpr (R < kRows)
        for (int g = 0; g < at.k_groups; g++)
          for (int r = R; r < kRows; r++) to[g * stride * kRows + r] = -__builtin_inff();
    }
  });
}

// `out` is that of block 0.
static void estimate(const KiviCall &c, const Unit &u, const float *q, int rows, float *out,
                     int64_t stride, SelectScratch &s, KeysScratch &keys) {
  with_codes(c, [&](auto k, auto, auto two_level) __attribute__((always_inline)) {
    using CODES = decltype(k);
    for (int r = 0; r < rows; r += kRows) {
      const int n = min_of(kRows, rows - r);
      const float *x = q + (int64_t)r * c.head_size;
      float *to = out + (int64_t)r * estimates_of_page(c) * stride;
      if constexpr (two_level.value)
        if (c.estimate_channels) {
          estimate_by_keys<CODES>(c, u, x, n, to, keys);
          continue;
        }
      if constexpr (two_level.value)
        estimate_rows<TwoLevelEstimates<CODES>>(c, u, x, n, to, stride, s);
      else
        estimate_rows<PaperEstimates<CODES>>(c, u, x, n, to, stride, s);
    }
  });
}

// Of lanes x whose numbers are a row's every kRows, the joined number of each row, in all its lanes.
template <class JOIN>
static INLINE vf of_rows(vf x, JOIN join) {
  for (int i = kRows; i < W; i++) x[i % kRows] = join(x[i % kRows], x[i]);
  for (int i = kRows; i < W; i++) x[i] = x[i % kRows];
  return x;
}

// What n pages weigh, in `weights`, by the estimates of all rows, which are in units of log2 and are
// lost. `stride`, of both, is a multiple of 16.
static void weigh(const KiviCall &c, float *x, int rows, int64_t n, int64_t stride,
                  float *weights) {
  static_assert(W % kRows == 0 || kRows % W == 0, "rows lie in the same lanes of all vectors");
  constexpr int kVectors = max_of(1, kRows / W);  // that have all rows
  const int groups = estimates_of_page(c);
  const float cap = (float)c.soft_cap * 1.4426950408889634f;
  const vf none = all(-__builtin_inff());
  const int64_t end = stride * kRows;
  for (int64_t i = 0; i < stride; i++) weights[i] = 0.0f;
  for (int r0 = 0; r0 < rows; r0 += kRows, x += groups * end)
    for (int v = 0; v < kVectors; v++) {
      vf most = none, total = {};
      for (int g = 0; g < groups; g++) {
        float *of = x + g * end;
        for (int64_t i = n * kRows; i < end; i++) of[i] = none[0];
        for (int64_t i = v * W; i < end; i += kVectors * W) {
          vf y = load(of + i);
          const vi finite = y - y == vf{};
          if (cap > 0) y = cap * tanhv(y * (1.0f / cap));
          y = either(finite, y, none);
          most = vmax(most, y);
          store(of + i, y);
        }
      }
      most = of_rows(most, [](float a, float b) { return a < b ? b : a; });
      const vf shift = either(most == none, vf{}, most);
      for (int64_t i = v * W; i < end; i += kVectors * W) {
        vf e = {};
        for (int g = 0; g < groups; g++) e += exp2v(load(x + g * end + i) - shift);
        total += e;
        store(x + i, e);
      }
      total = of_rows(total, [](float a, float b) { return a + b; });
      vf share = either(total == vf{}, vf{}, 1.0f / total);  // none of the head's is finite
      for (int i = 0; i < W; i++)
        if (r0 + (v * W + i) % kRows >= rows) share[i] = 0.0f;
      for (int64_t i = v * W; i < end; i += kVectors * W) {
        const vf y = load(x + i) * share;
        for (int j = 0; j < W; j++) weights[(i + j) / kRows] += y[j];
      }
    }
}
