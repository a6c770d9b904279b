// A page of recipe "paper": fp16 scale and zero of every group of tokens of a channel of K, and of
// every group of channels of a token of V.
//
// Keys: score(token) = sum_c q[c] (scale[c] code[c] + zero[c]), so the scales of a group are
// multiplied into the query once for its tokens, the codes' part is an integer dot product, and
// the zeros give one number per group. Values: out[c] = sum_t p[t] (scale[t] code[t] + zero[t]),
// likewise with the probabilities in the query's place.

// Byte offsets of a page's fields, as in format.py.
struct PaperLayout {
  int head_size, k_groups, v_groups;
  int group_tiles;  // tiles of 32 tokens, or channels, in a group
  int k_scale, k_zero, k_codes, v_scale, v_zero, v_codes;
  explicit PaperLayout(const KiviCall &c) {
    const int d = (int)c.head_size, g = (int)c.group_size;
    head_size = d;
    k_groups = kBlock / g;
    v_groups = d / g;
    group_tiles = g / 32;
    k_scale = 0;
    k_zero = k_scale + 2 * k_groups * d;
    k_codes = k_zero + 2 * k_groups * d;
    v_scale = k_codes + code_bytes(c.k_bits, d);
    v_zero = v_scale + 2 * v_groups * kBlock;
    v_codes = v_zero + 2 * v_groups * kBlock;
  }
};

// Scales [groups][n], times `balance` [n], to fixed point, each group with its own unit.
static INLINE void to_fixed_each(const uint16_t *scale, const float *balance, int groups, int n,
                                 int16_t *fixed, float *factor) {
  alignas(64) float x[kKGroups * kMaxHead];
  for_groups<4>(groups, [&](int g0, auto count) __attribute__((always_inline)) {
    constexpr int G = count.value;
    vf m[G] = {};
    for (int i = 0; i < n; i += W) {
      const vf b = load(balance + i);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const vf y = load_half(scale + (g0 + g) * n + i) * b;
        m[g] = vmax(m[g], y);
        store(x + (g0 + g) * n + i, y);
      }
    }
    float top[G];
    largest_each<G>(m, top);
    for (int g = 0; g < G; g++) {
      factor[g0 + g] = top[g] * (32768.0f / kTop);
      to_fixed([&](int i) __attribute__((always_inline)) { return load(x + (g0 + g) * n + i); }, n,
               top[g] > 0 ? kTop / top[g] : 0.0f, fixed + (g0 + g) * n);
    }
  });
}

// Scales of values, [groups][128]: each token's, over its largest, to fixed point. The largest goes
// into the probability: attention rests on tokens with small values (sinks), and the bits of the
// others' probabilities would be lost if they were relative to a sink's.
static INLINE void prepare_values(const uint16_t *scale, int groups, int16_t *fixed, float *norm) {
  alignas(64) uint16_t most[kBlock] = {};
  for (int g = 0; g < groups; g++)
    for (int i = 0; i < kBlock; i++) {  // not negative, so as bits they order like integers
      const uint16_t x = scale[g * kBlock + i];
      most[i] = most[i] < x ? x : most[i];
    }
  alignas(64) float inverse[kBlock];
  for (int i = 0; i < kBlock; i += W) {
    const vf n = vmax(all(5.9604645e-8f), load_half(most + i));
    store(norm + i, n);
    store(inverse + i, reciprocal(n));
  }
  for (int g = 0; g < groups; g++, scale += kBlock, fixed += kBlock)
    to_fixed([&](int i) __attribute__((always_inline)) {
      return load_half(scale + i) * load(inverse + i);
    }, kBlock, kTop, fixed);
}

// As many groups together as there are registers for: one alone would wait for its own additions.
template <int R>
static INLINE void zero_sums(const uint8_t *zeros, int groups, const float *x, int stride, int n,
                             float *sums) {
  constexpr int kMost = W == 16 && R <= 4 ? 4 : 2;
  for_groups<kMost>(groups, [&](int g, auto count) __attribute__((always_inline)) {
    dot_halves<R, count.value>((const uint16_t *)zeros + g * n, x, stride, n, sums + g * kRows);
  });
}

// Some channels of K have scales many times those of the others, on all pages. 16 bits of scale
// times 16 bits of query would be spent on the products of large scales with large queries, which
// need not meet: so each scale is divided by its channel's largest on the first page that the tile
// reads (`s.unbalance`), and the query multiplied by it, which makes `s.q_fixed` and `s.q_unit`.
static void balance_queries(int d, const Queries &q, PageScratch &s) {
  vf m = {};
  for (int i = 0; i < d; i += W) m = vmax(m, load(s.unbalance + i));
  const float top = largest(m), least = top > 0 ? top * (1.0f / 64) : 1.0f;
  for (int i = 0; i < d; i += W) store(s.unbalance + i, vmax(load(s.unbalance + i), all(least)));
  for (int i = 0; i < d; i += W) store(s.balance + i, 1.0f / load(s.unbalance + i));
  for (int r = 0; r < q.rows; r++) {
    const auto x = [&](int i) __attribute__((always_inline)) {
      return load(q.q + (int64_t)r * d + i) * load(s.unbalance + i);
    };
    m = vf{};
    for (int i = 0; i < d; i += W) m = vmax(m, vmax(x(i), -x(i)));
    const float most = largest(m);
    s.q_unit[r] = most * (1.0f / 32767.0f);
    to_fixed(x, d, most > 0 ? 32767.0f / most : 0.0f, s.q_fixed + (int64_t)r * d);
  }
}

template <class CODES>
struct PaperKeys {
  static constexpr int kLines = CODES::bits + 1;  // of a page, over its vectors of codes, times 4

  // With the first page that a tile reads: of the request's, a window may have left it to others.
  static void begin(const uint8_t *page, const PaperLayout &at, const Queries &q, PageScratch &s) {
    const uint16_t *scale = (const uint16_t *)(page + at.k_scale);
    for (int i = 0; i < at.head_size; i += W) {
      vf most = load_half(scale + i);
      for (int g = 1; g < at.k_groups; g++)
        most = vmax(most, load_half(scale + g * at.head_size + i));
      store(s.unbalance + i, most);
    }
    balance_queries(at.head_size, q, s);
  }

  static void prepare(const uint8_t *page, const PaperLayout &at, PageScratch &s) {
    to_fixed_each((const uint16_t *)(page + at.k_scale), s.balance, at.k_groups, at.head_size,
                  s.k_fixed, s.k_factor);
  }

  // Scores of R rows, from row `r0` on.
  template <int R, int AHEAD>
  static void scores(const Queries &queries, int r0, const uint8_t *page, Stream &stream,
                     const PaperLayout &at, PageScratch &s) {
    const int d = at.head_size;
    zero_sums<R>(page + at.k_zero, at.k_groups, queries.q + (int64_t)r0 * d, d, d, s.sums);
    for (int g = 0, tile = 0; g < at.k_groups; g++) {
      for (int r = 0; r < R; r++)
        multiply_split(s.q_fixed + (int64_t)(r0 + r) * d, s.k_fixed + g * d, d,
                       s.parts[0] + 128 * r);
      for (int end = tile + at.group_tiles; tile < end; tile++) {
        stream.fetch_tokens<AHEAD>();
        dot<R, AHEAD, 0>(typename CODES::Keys(page + at.k_codes, d, tile), s.parts[0], s.dots,
                         stream);
        for (int r = 0; r < R; r++)
          for (int i = 0; i < 32; i += W)
            store(s.scores[r] + 32 * tile + i,
                  scaled<CODES>(s.dots[r], i, s.q_unit[r0 + r] * s.k_factor[g]) +
                      s.sums[g * kRows + r]);
      }
    }
  }
};

template <class CODES>
struct PaperValues {
  static constexpr int kLines = CODES::bits + 1;
  static constexpr float kMostFixed = 32767.0f;  // of a probability, see multiply_split

  static void prepare(const uint8_t *page, const PaperLayout &at, PageScratch &s) {
    prepare_values((const uint16_t *)(page + at.v_scale), at.v_groups, s.v_fixed, s.v_norm);
  }

  // Add the page's values to the sums of R rows, from row `r0` on.
  template <int R, int AHEAD>
  static void add(int r0, const uint8_t *page, Stream &stream, const PaperLayout &at,
                  PageScratch &s, State &state) {
    zero_sums<R>(page + at.v_zero, at.v_groups, s.scores[0], kBlock, kBlock, s.sums);
    for (int g = 0, tile = 0; g < at.v_groups; g++) {
      for (int r = 0; r < R; r++)
        multiply_split(s.p_fixed[r], s.v_fixed + g * kBlock, kBlock, s.parts[0] + 128 * r);
      for (int end = tile + at.group_tiles; tile < end; tile++) {
        stream.fetch_tokens<AHEAD>();
        dot<R, AHEAD, 0>(typename CODES::Values(page + at.v_codes, tile), s.parts[0], s.dots,
                         stream);
        for (int r = 0; r < R; r++) {
          const float scale = s.weight[r] * s.product_unit[r] * (32768.0f / kTop);
          const float zero = s.weight[r] * s.sums[g * kRows + r];
          float *acc = state.acc + (int64_t)(r0 + r) * at.head_size + 32 * tile;
          for (int i = 0; i < 32; i += W)
            store(acc + i, scaled<CODES>(s.dots[r], i, scale) + (load(acc + i) + zero));
        }
      }
    }
  }
};
