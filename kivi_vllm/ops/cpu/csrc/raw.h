// Attention over full-precision tokens, `kKeys` at a time, from wherever they lie: sinks, tails, ring,
// the step's own. Many query rows make fp32 copies of them, for matrix products; a few read them in
// place, because for them making a copy is most of the work.

struct RawScratch {
  const uint8_t *k[kKeys], *v[kKeys];
  alignas(64) float rows[W * kMaxHead];
  alignas(64) float keys[kMaxHead * kKeys];      // [head_size][kKeys]
  alignas(64) float values[kKeys * kMaxHead];    // [kKeys][head_size]
  alignas(64) float scores[kMaxRows * kKeys];
};

// Tokens that are fetched (into L2, see Stream) before they are needed: they lie in short runs, of
// which the processor foresees little.
constexpr int kTokensAhead = 16;

static INLINE void fetch_ahead(const uint8_t *const *k, const uint8_t *const *v, int j, int n,
                               int bytes) {
  j += kTokensAhead;
  if (j < n) fetch_token(k[j], v[j], bytes);
}

// fp32 copies of n tokens' K, transposed, [head_size][kKeys] with zeros up to `columns`, and of their
// V, [n][head_size]; read in the order of memory. (Any numbers would do for zeros but those that
// arithmetic is slow with, of which there are many in what the scratch memory held before.)
template <int DT>
static void convert(const uint8_t *const *k, const uint8_t *const *v, int n, int columns, int d,
                    float *rows, float *keys, float *values) {
  constexpr int size = DT == KIVI_FP32 ? 4 : 2;
  for (int j0 = 0; j0 < columns; j0 += W) {
    const int filled = min_of(W, n - j0);
    for (int j = j0; j < j0 + filled; j++) {
      fetch_ahead(k, v, j, n, d * size);
      for (int i = 0; i < d; i += W) store(rows + (j - j0) * d + i, load_as<DT>(k[j] + i * size));
      for (int i = 0; i < d; i += W) store(values + j * d + i, load_as<DT>(v[j] + i * size));
    }
    __builtin_memset(rows + filled * d, 0, sizeof(float) * (W - filled) * d);
    for (int i = 0; i < d; i += W) {
      vf x[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; l++) x[l] = load(rows + l * d + i);
      transpose(x);
#pragma GCC unroll 16
      for (int l = 0; l < W; l++) store(keys + (i + l) * kKeys + j0, x[l]);
    }
  }
}

// C[m][0..N*W) (+)= A[m][0..k) B[0..k)[0..N*W), all fp32, rows lda and ldc apart; b(i, n) loads
// vector n of B's row i.
template <int M, int N, class LOAD>
static INLINE void multiply_rows(const float *a, int lda, LOAD b, int k, float *c, int ldc, bool add) {
  vf x[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) x[m][n] = add ? load(c + m * ldc + n * W) : vf{};
  for (int i = 0; i < k; i++) {
    vf y[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) y[n] = b(i, n);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const vf z = all(a[m * lda + i]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) x[m][n] += z * y[n];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(c + m * ldc + n * W, x[m][n]);
}

constexpr int kM = W == 16 ? 12 : 4;    // rows whose sums of two vectors fill the registers
constexpr int kFew = W == 16 ? 4 : 2;  // and of four

// The same for any number of rows and a number of columns that is a multiple of W. Few rows take
// more columns together: as many sums under way as the latency of an addition needs.
static void multiply(const float *a, int lda, const float *b, int ldb, int rows, int k, int columns,
                     float *c, int ldc, bool add) {
  const auto block = [&](auto M, auto N, int m, int n) __attribute__((always_inline)) {
    const auto at = [&](int i, int v) __attribute__((always_inline)) {
      return load(b + i * ldb + n + v * W);
    };
    multiply_rows<M.value, N.value>(a + m * lda, lda, at, k, c + m * ldc + n, ldc, add);
  };
  int m = 0;
  for (; m + kM <= rows; m += kM) {
    int n = 0;
    for (; n + 2 * W <= columns; n += 2 * W) block(Constant<kM>(), Constant<2>(), m, n);
    if (n < columns) block(Constant<kM>(), Constant<1>(), m, n);
  }
  while (m < rows) {
    const int taken = min_of(rows - m, kFew);
    with_constant<kFew>(taken, [&](auto M) __attribute__((always_inline)) {
      int n = 0;
      for (; n + 4 * W <= columns; n += 4 * W) block(M, Constant<4>(), m, n);
      for (; n < columns; n += W) block(M, Constant<1>(), m, n);
    });
    m += taken;
  }
}

constexpr int kInPlace = 4;  // rows that read tokens in place

// scores[r][j] = dot(q[r], K of token j); what lies beyond n stays unknown.
template <int DT, int R>
static void scores_in_place(const float *q, const uint8_t *const *k, const uint8_t *const *v, int n,
                            int d, float *scores) {
  constexpr int size = DT == KIVI_FP32 ? 4 : 2;
  constexpr int T = W == 16 ? 4 : 2;  // tokens together
  for (int j = 0; j < n; j += T) {
    const uint8_t *at[T];
    for (int t = 0; t < T; t++) {
      at[t] = k[min_of(j + t, n - 1)];
      fetch_ahead(k, v, j + t, n, d * size);
    }
    vf s[R * T];
#pragma GCC unroll 16
    for (int x = 0; x < R * T; x++) s[x] = vf{};
    for (int i = 0; i < d; i += W) {
      vf y[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) y[r] = load(q + (int64_t)r * d + i);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const vf x = load_as<DT>(at[t] + i * size);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) s[r * T + t] += x * y[r];
      }
    }
    for (int r = 0; r < R; r++) sum_each<T>(s + r * T, scores + r * kKeys + j);
  }
}

// acc[r] += sum_j p[r][j] * V of token j.
template <int DT, int R>
static void values_in_place(const float *p, const uint8_t *const *v, int n, int d, float *acc) {
  constexpr int N = R > 2 || W < 16 ? 2 : 4;  // sums enough for the latency of an addition
  const auto block = [&](auto N, int i) __attribute__((always_inline)) {
    const auto at = [&](int j, int m) __attribute__((always_inline)) {
      return load_as<DT>(v[j] + (i + m * W) * (DT == KIVI_FP32 ? 4 : 2));
    };
    multiply_rows<R, N.value>(p, kKeys, at, n, acc + i, d, true);
  };
  int i = 0;
  for (; i + N * W <= d; i += N * W) block(Constant<N>(), i);
  for (; i < d; i += W) block(Constant<1>(), i);
}

// Call f with the dtype as a constant.
template <class F>
static INLINE void with_dtype(int64_t dtype, F f) {
  if (dtype == KIVI_FP32) return f(Constant<KIVI_FP32>());
  if (dtype == KIVI_FP16) return f(Constant<KIVI_FP16>());
  f(Constant<KIVI_BF16>());
}

// Online softmax of one row over `n` scores (a multiple of W), which become probabilities.
static INLINE void softmax_row(State &state, int row, int d, float *x, int n) {
  vf m = load(x);
  for (int i = W; i < n; i += W) m = vmax(m, load(x + i));
  const float top = largest(m);
  if (top == -__builtin_inff()) {  // sees none of them, or nothing but a NaN, which stays
    for (int i = 0; i < n; i += W) store(x + i, vmax(vf{}, load(x + i)));
    return;
  }
  state.see(row, d, top);
  const vf shift = all(state.max[row]);
  vf sum = {};
  for (int i = 0; i < n; i += W) {
    const vf e = exp2v(load(x + i) - shift);
    sum += e;
    store(x + i, e);
  }
  state.sum[row] += sum_of(sum);
}

// The tokens at [low, high), and before them, as if they were their neighbours, at [0, lead).
static void attend_raw(const KiviCall &c, const Unit &u, int lead, int64_t low, int64_t high,
                       const Queries &q, RawScratch &s, State &state) {
  const int d = (int)c.head_size;
  const Source source(c, *u.row, u.kv_head, u.raw_from);
  for (int64_t first = low - lead; first < high; first += kKeys) {
    const int n = (int)min_of<int64_t>(kKeys, high - first), led = first < low ? lead : 0;
    source.find(0, led, s.k, s.v);
    source.find(first + led, n - led, s.k + led, s.v + led);
    const int columns = (n + W - 1) / W * W;
    // Earlier tokens of the unit than the tile's first see none of it, or their image reaches it.
    int64_t t0 = max_of<int64_t>(u.start, c.last_visible ? 0 : first);
    while (last_visible(c, *u.row, t0) < first) t0++;
    const int r0 = (int)(t0 - u.start) * q.heads;
    const int rows = q.rows - r0;
    const bool in_place = rows <= kInPlace;
    const float *query = q.q + (int64_t)r0 * d;
    float *scores = s.scores, *acc = state.acc + (int64_t)r0 * d;
    with_dtype(c.dtype, [&](auto dtype) {
      if (in_place)
        with_constant<kInPlace>(rows, [&](auto count) {
          scores_in_place<dtype.value, count.value>(query, s.k, s.v, n, d, scores);
        });
      else
        convert<dtype.value>(s.k, s.v, n, columns, d, s.rows, s.keys, s.values);
    });
    if (!in_place) multiply(query, d, s.keys, kKeys, rows, d, columns, scores, kKeys, false);
    for (int r = 0; r < rows; r++) {
      float *x = scores + r * kKeys;
      const int64_t t = q.position(r0 + r);
      if (q.soft_cap > 0 || q.slopes) modify_scores(q, r0 + r, first, columns, x);
      const int64_t oldest = q.window ? max_of<int64_t>(0, t + 1 - q.window - first) : 0;
      const int64_t end = last_visible(c, *u.row, t) + 1 - first;
      hide((int)min_of<int64_t>(oldest, columns), (int)min_of<int64_t>(n, end), columns, x);
      softmax_row(state, r0 + r, d, x, columns);
    }
    if (in_place)
      with_dtype(c.dtype, [&](auto dtype) {
        with_constant<kInPlace>(rows, [&](auto count) {
          values_in_place<dtype.value, count.value>(scores, s.v, n, d, acc);
        });
      });
    else
      multiply(scores, kKeys, s.values, d, rows, n, d, acc, d, true);
  }
}
