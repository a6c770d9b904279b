// Attention over packed pages, without dequantizing them.
//
// Keys: score(token) = sum_c q[c] (scale[c] code[c] + zero[c]), so the scales of a group are
// multiplied into the query once for its tokens, the codes' part is an integer dot product, and
// the zeros give one number per group. Values: out[c] = sum_t p[t] (scale[t] code[t] + zero[t]),
// likewise with the probabilities in the query's place.
//
// A block's probabilities are relative to the block's own largest score, so that its 16 bits are
// used whatever the other blocks hold; the block's sum is then weighted into the row's state.

static INLINE void modify_scores(const Queries &q, int row, int64_t first, int n, float *scores) {
  if (q.soft_cap > 0)
    for (int i = 0; i < n; i += W)
      store(scores + i, q.soft_cap * tanhv(load(scores + i) * (1.0f / q.soft_cap)));
  if (q.slopes) {
    const float slope = q.slopes[row % q.heads] * 1.4426950408889634f;
    const int64_t t = q.position(row);
    for (int i = 0; i < n; i++) scores[i] += slope * (float)(first + i - t);
  }
}

// Hide scores outside of [low, high).
static INLINE void hide(int low, int high, int n, float *scores) {
  for (int i = 0; i < min_of(low, n); i++) scores[i] = -__builtin_inff();
  for (int i = max_of(high, 0); i < n; i++) scores[i] = -__builtin_inff();
}

struct PageScratch {
  Prepared prepared;
  alignas(64) int8_t parts[kMaxHead / 64 * kSpan];  // of q times a group's scales, then of p
  alignas(64) float scores[kRows][kBlock], products[kRows][kBlock];  // products: with V's scales
  float balance[kMaxHead], unbalance[kMaxHead];
  int16_t p_fixed[kRows][kBlock];
  float k_zero_sum[kKGroups * kRows], v_zero_sum[kVGroups * kRows];
  int32_t dots[kRows][32];
};

// sums[g][r] = dot(x[r], zeros[g]) for G groups; rows of x are `stride` apart.
template <int R, int G>
static INLINE void zero_sums_of(const uint16_t *zeros, const float *x, int stride, int n, float *sums) {
  vf s[G * R];
#pragma GCC unroll 32
  for (int k = 0; k < G * R; k++) s[k] = vf{};
  for (int i = 0; i < n; i += W) {
    vf y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) y[r] = load(x + r * stride + i);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const vf z = load_half(zeros + g * n + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) s[g * R + r] += z * y[r];
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) sum_each<R>(s + g * R, sums + g * kRows);
}

// As many groups together as there are registers for: one alone would wait for its own additions.
template <int R>
static INLINE void zero_sums(const uint8_t *zeros, int groups, const float *x, int stride, int n,
                             float *sums) {
  constexpr int kMost = W == 16 && R <= 4 ? 4 : 2;
  for_groups<kMost>(groups, [&](int g, auto count) __attribute__((always_inline)) {
    zero_sums_of<R, count.value>((const uint16_t *)zeros + g * n, x, stride, n, sums + g * kRows);
  });
}

// R rows, from row `r0` on, over the page of tokens [first, first + 128), of which those in
// [low, high) (relative to `first`) count. `stream` is the next page.
template <class K, class V, int R, int AHEAD>
static void attend_page(const Queries &queries, int r0, int64_t first, int low, int high, bool plain,
                        const uint8_t *page, Stream &stream, const Layout &at, PageScratch &s,
                        State &state) {
  const int d = at.head_size;
  const Prepared &p = s.prepared;
  const float *q = queries.q + (int64_t)r0 * d;

  // Scores.
  zero_sums<R>(page + at.k_zero, at.k_groups, q, d, d, s.k_zero_sum);
  for (int g = 0, tile = 0; g < at.k_groups; g++) {
    for (int r = 0; r < R; r++)
      multiply_split(queries.fixed + (int64_t)(r0 + r) * d, p.k_fixed + g * d, d, s.parts + 128 * r);
    for (int end = tile + at.group_tiles; tile < end; tile++) {
      dot<R, AHEAD>(typename K::Keys(page + at.k_codes, d, tile), s.parts, s.dots, stream);
      for (int r = 0; r < R; r++) {
        const float unit = queries.unit[r0 + r] * p.k_factor[g];
        const float zero = s.k_zero_sum[g * kRows + r];
        for (int i = 0; i < 32; i += W)
          store(s.scores[r] + 32 * tile + i,
                load_ints(s.dots[r] + i) * (i < 16 ? unit : unit * (1.0f / K::slot1)) + zero);
      }
    }
  }
  if (!plain)
    for (int r = 0; r < R; r++) {
      modify_scores(queries, r0 + r, first, kBlock, s.scores[r]);
      const int64_t t = queries.position(r0 + r);
      const int64_t seen = queries.window ? t + 1 - queries.window - first : 0;
      hide((int)max_of<int64_t>(low, min_of<int64_t>(seen, kBlock)), high, kBlock, s.scores[r]);
    }

  // Probabilities, relative to the block's largest. Of all rows together: each step of one alone
  // would wait for the one before.
  vf most[R], sum[R], shift[R];
  float top[R], top_product[R], total[R], weight[R], unit[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) most[r] = load(s.scores[r]);
#pragma GCC unroll 32
  for (int i = W; i < kBlock; i += W)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) most[r] = vmax(most[r], load(s.scores[r] + i));
  largest_each<R>(most, top);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    shift[r] = all(top[r] == -__builtin_inff() ? 0.0f : top[r]);
    most[r] = sum[r] = vf{};
  }
  for (int i = 0; i < kBlock; i += W) {
    const vf norm = load(p.v_norm + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vf e = exp2v<true>(load(s.scores[r] + i) - shift[r]), product = e * norm;
      sum[r] += e;
      most[r] = vmax(most[r], product);
      store(s.scores[r] + i, e);
      store(s.products[r] + i, product);
    }
  }
  largest_each<R>(most, top_product);
  sum_each<R>(sum, total);
  for (int r = 0; r < R; r++) {
    unit[r] = top_product[r] * (32768.0f / 32767.0f / kTop);
    to_fixed([&](int i) __attribute__((always_inline)) { return load(s.products[r] + i); }, kBlock,
             32767.0f / top_product[r], s.p_fixed[r]);
    // Weigh the block against what the row has seen.
    const int row = r0 + r;
    weight[r] = 0.0f;
    if (top[r] != -__builtin_inff()) {
      state.see(row, d, top[r]);
      weight[r] = exp2s(top[r] - state.max[row]);
      state.sum[row] += weight[r] * total[r];
    }
  }

  // Values.
  zero_sums<R>(page + at.v_zero, at.v_groups, s.scores[0], kBlock, kBlock, s.v_zero_sum);
  for (int g = 0, tile = 0; g < at.v_groups; g++) {
    for (int r = 0; r < R; r++)
      multiply_split(s.p_fixed[r], p.v_fixed + g * kBlock, kBlock, s.parts + 128 * r);
    for (int end = tile + at.group_tiles; tile < end; tile++) {
      dot<R, AHEAD>(typename V::Values(page + at.v_codes, tile), s.parts, s.dots, stream);
      for (int r = 0; r < R; r++) {
        const float scale = weight[r] * unit[r], zero = weight[r] * s.v_zero_sum[g * kRows + r];
        float *acc = state.acc + (int64_t)(r0 + r) * d + 32 * tile;
        for (int i = 0; i < 32; i += W)
          store(acc + i, load_ints(s.dots[r] + i) * (i < 16 ? scale : scale * (1.0f / V::slot1)) +
                             (load(acc + i) + zero));
      }
    }
  }
}

// codec.rotate's inverse of each row of x [rows][d]: sums of values over tokens become those of the
// values as they were.
static void rotate_back(float *x, int rows, int d) {
  const int n = d & -d, log_n = __builtin_ctz(n);
  const float factor = 1.0f / (float)(1 << (log_n - log_n / 2));
  for (int64_t i = 0; i < (int64_t)rows * d; i += W) {  // inside a vector
    vf y = load(x + i) * factor;
#pragma GCC unroll 4
    for (int h = 1; h < W; h *= 2) {
      vf other, sign;
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) {
        other[j] = y[j ^ h];
        sign[j] = j & h ? -1.0f : 1.0f;
      }
      y = other + sign * y;
    }
    store(x + i, y);
  }
  for (int h = W; h < n; h *= 2)  // vectors of a row with each other: [.., 2, h]
    for (float *a = x; a < x + (int64_t)rows * d; a += 2 * h)
      for (int i = 0; i < h; i += W) {
        const vf y = load(a + i), z = load(a + h + i);
        store(a + i, y + z);
        store(a + h + i, y - z);
      }
}

template <class K, class V>
static void attend_pages(const KiviCall &c, const Unit &u, Queries &queries, PageScratch &s,
                         State &state) {
  const Layout at(c);
  balance_queries(page_of(c, *u.row, u.kv_head, 0), at, queries, s.balance, s.unbalance);
  // What comes after the last page: a page of full-precision tokens has the same size.
  const uint8_t *residual = Source(c, *u.row, u.kv_head, u.raw_from).find(u.raw_from).k;
  const bool modified = queries.soft_cap > 0 || queries.slopes || queries.window;
  for (int64_t block = u.block_lo; block < u.block_hi; block++) {
    const uint8_t *page = page_of(c, *u.row, u.kv_head, block);
    const uint8_t *next =
        block + 1 < u.block_hi ? page_of(c, *u.row, u.kv_head, block + 1) : residual;
    const int64_t first = block * kBlock;
    const int low = block ? 0 : (int)c.sink_tokens;  // those are read at full precision
    const int high = (int)min_of<int64_t>(kBlock, u.raw_from - first);
    const bool plain = !modified && low == 0 && high == kBlock;
    Stream stream{(const char *)next};
    prepare_page(page, s.balance, at, s.prepared);
    for (int r0 = 0; r0 < queries.rows;) {
      const int left = queries.rows - r0;
      const int turns = (left + kRows - 1) / kRows;
      const int n = (left + turns - 1) / turns;  // 5 rows as 3 and 2, not 4 and 1
      with_constant<kRows>(n, [&](auto rows) __attribute__((always_inline)) {
        if (r0 == 0)
          attend_page<K, V, rows.value, kLinesAhead<K, V>>(queries, r0, first, low, high, plain, page,
                                                           stream, at, s, state);
        else
          attend_page<K, V, rows.value, 0>(queries, r0, first, low, high, plain, page, stream, at, s,
                                           state);
      });
      r0 += n;
    }
  }
}
