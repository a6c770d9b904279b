// Attention over packed pages, without dequantizing them: paper.h and two_level.h know how.
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

// R rows' scores of the page become probabilities, in `scores`, and with the tokens' norms
// `products`; those are also made whole numbers up to `most_fixed`, of `product_unit`.
template <int R>
static void weigh_page(int r0, int d, float most_fixed, PageScratch &s, State &state) {
  // All rows together: each step of one alone would wait for the one before.
  vf most[R], sum[R], products[R], shift[R];
  float top[R], top_product[R], total[R];
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
    most[r] = sum[r] = products[r] = vf{};
  }
  for (int i = 0; i < kBlock; i += W) {
    const vf norm = load(s.v_norm + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vf e = exp2v<true>(load(s.scores[r] + i) - shift[r]), product = e * norm;
      sum[r] += e;
      products[r] += product;
      most[r] = vmax(most[r], product);
      store(s.scores[r] + i, e);
      store(s.products[r] + i, product);
    }
  }
  largest_each<R>(most, top_product);
  sum_each<R>(sum, total);
  sum_each<R>(products, s.product_sum);
  for (int r = 0; r < R; r++) {
    s.product_unit[r] = top_product[r] / most_fixed;
    to_fixed([&](int i) __attribute__((always_inline)) { return load(s.products[r] + i); }, kBlock,
             most_fixed / top_product[r], s.p_fixed[r]);
    // Weigh the block against what the row has seen.
    const int row = r0 + r;
    s.weight[r] = 0.0f;
    if (top[r] != -__builtin_inff()) {
      state.see(row, d, top[r]);
      s.weight[r] = exp2s(top[r] - state.max[row]);
      state.sum[row] += s.weight[r] * total[r];
    }
  }
}

// R rows, from row `r0` on, over the page of tokens [first, first + 128), of which those in
// [low, high) (relative to `first`) count. `stream` is the next page, which the first rows fetch.
template <class KEYS, class VALUES, class LAYOUT, int R, int K_AHEAD, int V_AHEAD>
static void attend_page(const Queries &queries, int r0, int64_t first, int low, int high, bool plain,
                        const uint8_t *page, Stream &stream, const LAYOUT &at, PageScratch &s,
                        State &state) {
  KEYS::template scores<R, K_AHEAD>(queries, r0, page, stream, at, s);
  if (!plain)
    for (int r = 0; r < R; r++) {
      modify_scores(queries, r0 + r, first, kBlock, s.scores[r]);
      const int64_t t = queries.position(r0 + r);
      const int64_t seen = queries.window ? t + 1 - queries.window - first : 0;
      hide((int)max_of<int64_t>(low, min_of<int64_t>(seen, kBlock)), high, kBlock, s.scores[r]);
    }
  weigh_page<R>(r0, at.head_size, VALUES::kMostFixed, s, state);
  VALUES::template add<R, V_AHEAD>(r0, page, stream, at, s, state);
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

// The last pages, with which the tokens after them are fetched, and how many of these with a tile at
// most: they must stay in L2, and others have to be fetched meanwhile.
constexpr int64_t kPagesBefore = 16, kTokensOfTile = 2;

template <class KEYS, class VALUES, class LAYOUT>
static void attend_pages_of(const KiviCall &c, const Unit &u, const Queries &queries, PageScratch &s,
                            State &state) {
  const LAYOUT at(c);
  const auto page_at = [&](int64_t i) { return page_of(c, *u.row, u.kv_head, block_at(u, i)); };
  KEYS::begin(page_at(u.tile_block_lo), at, queries, s);
  const uint8_t *page = page_at(u.block_lo);
  // What comes after the last page: a page of full-precision tokens has the same size.
  const Source source(c, *u.row, u.kv_head, u.raw_from);
  const uint8_t *residual = source.find(u.raw_from).k;
  const int64_t tokens = u.raw_hi - u.raw_lo, pages = u.block_hi - u.block_lo;
  const int64_t last = min_of(pages, kPagesBefore);
  const int64_t tiles = last * (kBlock + c.head_size) / 32;
  const int64_t each = min_of((tokens + tiles - 1) / tiles, kTokensOfTile);
  TokensAhead ahead{source, u.raw_lo, u.raw_lo, (int)each, {}};
  const bool modified = queries.soft_cap > 0 || queries.slopes || queries.window;
  for (int64_t i = u.block_lo; i < u.block_hi; i++) {
    const uint8_t *next = i + 1 < u.block_hi ? page_at(i + 1) : residual;
    const int64_t block = block_at(u, i), first = block * kBlock;
    const int low = block ? 0 : (int)c.sink_tokens;  // those are read at full precision
    const int high = (int)min_of<int64_t>(kBlock, u.raw_from - first);
    const bool plain = !modified && low == 0 && high == kBlock;
    if (u.block_hi - i <= last) ahead.end = u.raw_hi;
    Stream stream{(const char *)next, queries.rows > 2, ahead};
    KEYS::prepare(page, at, s);
    VALUES::prepare(page, at, s);
    for (int r0 = 0; r0 < queries.rows;) {
      const int left = queries.rows - r0;
      const int turns = (left + kRows - 1) / kRows;
      const int n = (left + turns - 1) / turns;  // 5 rows as 3 and 2, not 4 and 1
      with_constant<kRows>(n, [&](auto rows) __attribute__((always_inline)) {
        constexpr int R = rows.value;
        if (r0 == 0)
          attend_page<KEYS, VALUES, LAYOUT, R, KEYS::kLines, VALUES::kLines>(
              queries, r0, first, low, high, plain, page, stream, at, s, state);
        else
          attend_page<KEYS, VALUES, LAYOUT, R, 0, 0>(queries, r0, first, low, high, plain, page,
                                                     stream, at, s, state);
      });
      r0 += n;
    }
    page = next;
  }
}

template <class K, class V, bool TWO_LEVEL>
static void attend_pages(const KiviCall &c, const Unit &u, const Queries &q, PageScratch &s,
                         State &state) {
  if constexpr (TWO_LEVEL)
    attend_pages_of<TwoLevelKeys<K>, TwoLevelValues<V>, TwoLevelLayout>(c, u, q, s, state);
  else
    attend_pages_of<PaperKeys<K>, PaperValues<V>, PaperLayout>(c, u, q, s, state);
}
