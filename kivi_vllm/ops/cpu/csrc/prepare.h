// The state of a unit's query rows, and a page's scales made ready for them.

constexpr int kMaxHead = 256;
constexpr int kKGroups = kBlock / 32;      // at most
constexpr int kVGroups = kMaxHead / 32;    // at most
constexpr float kTop = 32600.0f;           // of scales in fixed point, see multiply_split

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

// The query rows of a unit, in the forms that the two kinds of cache want.
struct Queries {
  int rows, heads;      // rows = tokens * heads
  int64_t start;        // position of the first token
  float *q;             // [rows][head_size], times scale * log2(e)
  int16_t *fixed;       // [rows][head_size], and its unit: see balance_queries
  float unit[kMaxRows];
  const float *slopes;  // [heads] of this unit, or null
  float soft_cap;       // times log2(e); 0: none
  int64_t window;       // 0: none
  int64_t position(int row) const { return start + row / heads; }
};

// A page's scales, ready for any number of rows.
struct Prepared {
  alignas(64) float v_norm[kBlock];  // each token's largest scale
  int16_t k_fixed[kKGroups * kMaxHead], v_fixed[kVGroups * kBlock];
  float k_factor[kKGroups];
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

// Scales of keys [groups][n], times `balance` [n], to fixed point, each group with its own unit.
static INLINE void prepare_keys(const uint16_t *scale, const float *balance, int groups, int n,
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

// Byte offsets of a page's fields, as in format.py.
struct Layout {
  int k_groups, v_groups, head_size;
  int group_tiles;  // tiles of 32 tokens, or channels, in a group
  int k_scale, k_zero, k_codes, v_scale, v_zero, v_codes;
  explicit Layout(const KiviCall &c) {
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

static INLINE void prepare_page(const uint8_t *page, const float *balance, const Layout &at,
                                Prepared &p) {
  const auto halves = [&](int offset) { return (const uint16_t *)(page + offset); };
  prepare_keys(halves(at.k_scale), balance, at.k_groups, at.head_size, p.k_fixed, p.k_factor);
  prepare_values(halves(at.v_scale), at.v_groups, p.v_fixed, p.v_norm);
}

// Some channels of K have scales many times those of the others, on all pages. 16 bits of scale
// times 16 bits of query would be spent on the products of large scales with large queries, which
// need not meet: so each scale is divided by its channel's largest on the request's first page, and
// the query multiplied by it. `q` is not changed, `fixed` and `unit` are made.
static void balance_queries(const uint8_t *page, const Layout &at, Queries &q, float *balance,
                            float *scratch) {
  const int d = at.head_size;
  const uint16_t *scale = (const uint16_t *)(page + at.k_scale);
  vf m = {};
  for (int i = 0; i < d; i += W) {
    vf most = load_half(scale + i);
    for (int g = 1; g < at.k_groups; g++) most = vmax(most, load_half(scale + g * d + i));
    store(scratch + i, most);
    m = vmax(m, most);
  }
  const float top = largest(m), least = top > 0 ? top * (1.0f / 64) : 1.0f;
  for (int i = 0; i < d; i += W) store(scratch + i, vmax(load(scratch + i), all(least)));
  for (int i = 0; i < d; i += W) store(balance + i, 1.0f / load(scratch + i));
  for (int r = 0; r < q.rows; r++) {
    const auto x = [&](int i) __attribute__((always_inline)) {
      return load(q.q + (int64_t)r * d + i) * load(scratch + i);
    };
    m = vf{};
    for (int i = 0; i < d; i += W) m = vmax(m, vmax(x(i), -x(i)));
    const float most = largest(m);
    q.unit[r] = most * (1.0f / 32767.0f);
    to_fixed(x, d, most > 0 ? 32767.0f / most : 0.0f, q.fixed + (int64_t)r * d);
  }
}
