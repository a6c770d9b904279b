// Attention over full-precision tokens: fp32 matrix products on tiles of `kKeys` tokens, which are
// gathered from the tails, the ring and the step's own keys and values, and converted on the way.

struct RawScratch {
  const uint8_t *k[kKeys], *v[kKeys];
  alignas(64) float rows[W * kMaxHead];
  alignas(64) float keys[kMaxHead * kKeys];      // [head_size][kKeys]
  alignas(64) float values[kKeys * kMaxHead];    // [kKeys][head_size]
  alignas(64) float scores[kMaxRows * kKeys];
};

// Tokens that are fetched before they are needed: they lie in short runs, of which the processor
// foresees little.
constexpr int kTokensAhead = 8;

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
      if (j + kTokensAhead < n) {
        fetch(k[j + kTokensAhead], d * size);
        fetch(v[j + kTokensAhead], d * size);
      }
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

// C[m][0..N*W) (+)= A[m][0..k) B[0..k)[0..N*W), all fp32, rows lda, ldb and ldc apart.
template <int M, int N>
static INLINE void multiply_rows(const float *a, int lda, const float *b, int ldb, int k, float *c,
                                 int ldc, bool add) {
  vf x[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) x[m][n] = add ? load(c + m * ldc + n * W) : vf{};
  for (int i = 0; i < k; i++) {
    vf y[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) y[n] = load(b + i * ldb + n * W);
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

// The same for up to kFew rows.
template <int N>
static INLINE void multiply_few(int rows, const float *a, int lda, const float *b, int ldb, int k,
                                float *c, int ldc, bool add) {
  switch (rows) {
    case 1: multiply_rows<1, N>(a, lda, b, ldb, k, c, ldc, add); break;
    case 2: multiply_rows<2, N>(a, lda, b, ldb, k, c, ldc, add); break;
#if defined(__AVX512F__)
    case 3: multiply_rows<3, N>(a, lda, b, ldb, k, c, ldc, add); break;
    default: multiply_rows<4, N>(a, lda, b, ldb, k, c, ldc, add);
#endif
  }
}

// The same for any number of rows and a number of columns that is a multiple of W. Few rows take
// more columns at once: as many sums under way as the latency of an addition needs.
static void multiply(const float *a, int lda, const float *b, int ldb, int rows, int k, int columns,
                     float *c, int ldc, bool add) {
  int m = 0;
  for (; m + kM <= rows; m += kM) {
    int n = 0;
    for (; n + 2 * W <= columns; n += 2 * W)
      multiply_rows<kM, 2>(a + m * lda, lda, b + n, ldb, k, c + m * ldc + n, ldc, add);
    if (n < columns)
      multiply_rows<kM, 1>(a + m * lda, lda, b + n, ldb, k, c + m * ldc + n, ldc, add);
  }
  while (m < rows) {
    const int taken = min_of(rows - m, kFew);
    int n = 0;
    for (; n + 4 * W <= columns; n += 4 * W)
      multiply_few<4>(taken, a + m * lda, lda, b + n, ldb, k, c + m * ldc + n, ldc, add);
    for (; n < columns; n += W)
      multiply_few<1>(taken, a + m * lda, lda, b + n, ldb, k, c + m * ldc + n, ldc, add);
    m += taken;
  }
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
    if (c.dtype == KIVI_FP32)
      convert<KIVI_FP32>(s.k, s.v, n, columns, d, s.rows, s.keys, s.values);
    else if (c.dtype == KIVI_FP16)
      convert<KIVI_FP16>(s.k, s.v, n, columns, d, s.rows, s.keys, s.values);
    else
      convert<KIVI_BF16>(s.k, s.v, n, columns, d, s.rows, s.keys, s.values);
    // Earlier tokens of the unit than the tile's first see none of it.
    const int r0 = (int)max_of<int64_t>(0, first - q.start) * q.heads;
    const int rows = q.rows - r0;
    float *scores = s.scores;
    multiply(q.q + (int64_t)r0 * d, d, s.keys, kKeys, rows, d, columns, scores, kKeys, false);
    for (int r = 0; r < rows; r++) {
      float *x = scores + r * kKeys;
      const int64_t t = q.position(r0 + r);
      if (q.soft_cap > 0 || q.slopes) modify_scores(q, r0 + r, first, columns, x);
      const int64_t oldest = q.window ? max_of<int64_t>(0, t + 1 - q.window - first) : 0;
      hide((int)min_of<int64_t>(oldest, columns), (int)min_of<int64_t>(n, t + 1 - first), columns, x);
      softmax_row(state, r0 + r, d, x, columns);
    }
    multiply(scores, kKeys, s.values, d, rows, n, d, state.acc + (int64_t)r0 * d, d, true);
  }
}
