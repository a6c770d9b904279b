// Quantize and pack one block: the numbers of codec.py bit for bit, in the order of format.py.
//
// Keys are taken as [128 tokens][channels] and values as [channels][128 tokens], so that the groups
// of both are runs of rows, and a vector has as many groups as lanes.

struct EncodeScratch {
  float x[kBlock * kMaxHead];
  uint8_t codes[kBlock * kMaxHead];  // like x
};

typedef double vd __attribute__((vector_size(W * 8)));
#define WIDE(x) __builtin_convertvector(x, vd)
#define NARROW(x) __builtin_convertvector(x, vf)

// codec.fit: scale and zero of smaller squared error, of W groups of n numbers in rows `columns` apart.
// All sums and products are of whole numbers, so nothing is rounded before the quotients.
static INLINE void fit(const float *x, int n, int columns, float top, vf low, vf spread, vf *scale,
                       vf *zero) {
  const float kSteps = 1023.0f;
  vf u[kBlock], weight[kBlock];
  const vi good = (spread > 1e-6f) & (spread < 65504.0f);
  const vf span = either(good, spread, all(1.0f));
  const vf to_steps = kSteps / span;
  vf total = {}, count = {};
  for (int t = 0; t < n; t++) {
    u[t] = half_even(clamp((load(x + t * columns) - low) * to_steps, all(kSteps)));
    const vf off = 2.0f * u[t] - kSteps;  // its square is below 2^20
    weight[t] = 1.0f + half_even(off * off * (1.0f / (1 << 18)));
    count += weight[t];
    total += weight[t] * u[t];
  }
  vf slope = all(kSteps) / top, start = {};
  for (int round = 0; round < kFitRounds; round++) {
    const vf inverse = 1.0f / slope;
    vf c1 = {}, c2 = {}, cu = {};
    for (int t = 0; t < n; t++) {
      const vf c = half_even(clamp((u[t] - start) * inverse, all(top)));
      const vf wc = weight[t] * c;
      c1 += wc;
      c2 += wc * c;
      cu += wc * u[t];
    }
    const vd n0 = WIDE(count), n1 = WIDE(c1), n2 = WIDE(c2), nu = WIDE(cu), all_u = WIDE(total);
    const vd d = n0 * n2 - n1 * n1;
    const vi several = NARROW(d) > 0.0f;
    const vd divisor = WIDE(either(several, NARROW(d), all(1.0f)));
    slope = either(several, NARROW((n0 * nu - n1 * all_u) / divisor), slope);
    start = either(several, NARROW((all_u * n2 - n1 * nu) / divisor), start);
  }
  const vf step = span / kSteps;
  *scale = either(good, slope * step, *scale);
  *zero = either(good, NARROW(WIDE(low) + WIDE(start) * WIDE(step)), low);
}
#undef WIDE
#undef NARROW

// Codes, scales and zeros of `rows` of `columns` numbers, `group` rows a group.
template <class CODES>
static void quantize(EncodeScratch &s, int rows, int columns, int group, bool clip, uint16_t *scale,
                     uint16_t *zero) {
  const float top = (float)CODES::top;
  const float kMax = 65504.0f, kNan = __builtin_nanf("");
  for (int g = 0; g < rows; g += group, scale += columns, zero += columns)
    for (int i = 0; i < columns; i += W) {
      const float *x = s.x + g * columns + i;
      vf low = load(x), high = low;
      vi nan = low != low;
      for (int t = 1; t < group; t++) {
        const vf y = load(x + t * columns);
        nan |= y != y;
        low = y < low ? y : low;
        high = y > high ? y : high;
      }
      const vf spread = either(high == low, vf{}, high - low);
      vf step = spread / top, from = low;
      if (clip) fit(x, group, columns, top, low, spread, &step, &from);
      step = either(nan, all(kNan), step < kMax ? step : all(kMax));
      from = from < -kMax ? all(-kMax) : from;
      from = either(nan, all(kNan), from > kMax ? all(kMax) : from);
      store_half(scale + i, step);
      store_half(zero + i, from);
      step = load_half(scale + i);
      from = load_half(zero + i);
      const vi positive = step > 0.0f;  // not 0, not NaN
      uint8_t *codes = s.codes + g * columns + i;
      const typename CODES::Rounding code_of(step, positive);
      for (int t = 0; t < group; t++)
        store_bytes(codes + t * columns, code_of(load(x + t * columns) - from) & positive);
    }
}

// codec.rotate of the channels, which are the rows of x [d][128].
static void rotate_rows(float *x, int d) {
  const int n = d & -d;
  for (int h = 1; h < n; h *= 2)
    for (int r = 0; r < d; r++) {
      if (r & h) continue;
      float *a = x + r * kBlock, *b = a + h * kBlock;
      for (int i = 0; i < kBlock; i += W) {
        const vf sum = load(a + i) + load(b + i), difference = load(a + i) - load(b + i);
        store(a + i, sum);
        store(b + i, difference);
      }
    }
  const float factor = 1.0f / (float)(1 << __builtin_ctz(n) / 2);
  for (int i = 0; i < d * kBlock; i += W) store(x + i, load(x + i) * factor);
}

// fp32 copies of 128 tokens, [128][d].
static void load_keys(int64_t dtype, const uint8_t *const *k, int d, float *x) {
  for (int t = 0; t < kBlock; t++)
    for (int i = 0; i < d; i += W)
      store(x + t * d + i, load_any(dtype, k[t] + i * dtype_bytes(dtype)));
}

// The same, transposed: [d][128].
static void load_values(int64_t dtype, const uint8_t *const *v, int d, float *x) {
  for (int t = 0; t < kBlock; t += W)
    for (int i = 0; i < d; i += W) {
      vf y[W];
      for (int l = 0; l < W; l++) y[l] = load_any(dtype, v[t + l] + i * dtype_bytes(dtype));
      transpose(y);
      for (int l = 0; l < W; l++) store(x + (i + l) * kBlock + t, y[l]);
    }
}

static void copy(const uint8_t *from, int64_t n, uint8_t *to) { __builtin_memcpy(to, from, n); }

static void encode_block(const KiviCall &c, const KiviRow &row, int64_t block, int64_t head,
                         EncodeScratch &s) {
  const int d = (int)c.head_size, group = (int)c.group_size;
  const Source source(c, row, head, 0);
  const uint8_t *k[kBlock], *v[kBlock];
  source.find(block * kBlock, kBlock, k, v);
  uint8_t *page = page_of(c, row, head, block);
  const int64_t bytes = source.bytes;
  const auto keep = [&](int64_t t, uint8_t *to) {
    copy(k[t], bytes, to);
    copy(v[t], bytes, to + bytes);
  };
  for (int64_t t = kBlock - c.residual_length; t < kBlock; t++) {
    const int64_t at = t - (kBlock - c.residual_length);
    const KiviRaw &tail = c.tails[at / c.raw_tokens];
    if (tail.table[row.index * tail.table_stride + block] != 0)  // vLLM's null page
      keep(t, Source::token(tail, row.index, block, head, at % c.raw_tokens));
  }
  if (block == 0)
    for (int64_t t = 0; t < c.sink_tokens; t++) {
      keep(t, Source::token(c.sinks, row.index, 0, head, t));
      k[t] = k[c.sink_tokens + t];  // stands in for it in its group
    }
  if (is_raw(c)) {
    for (int t = 0; t < kBlock; t++) {
      copy(k[t], bytes, page + t * bytes);
      copy(v[t], bytes, page + (kBlock + t) * bytes);
    }
    return;
  }
  const Layout at(c);
  const auto half = [&](int offset) { return (uint16_t *)(page + offset); };
  with_codes(c, [&](auto of_keys, auto of_values) {
    using K = decltype(of_keys);
    using V = decltype(of_values);
    load_keys(c.dtype, k, d, s.x);
    quantize<K>(s, kBlock, d, group, c.clip, half(at.k_scale), half(at.k_zero));
    K::pack_keys(s.codes, d, page + at.k_codes);
    load_values(c.dtype, v, d, s.x);
    if (c.rotate_values) rotate_rows(s.x, d);
    quantize<V>(s, d, kBlock, group, c.clip, half(at.v_scale), half(at.v_zero));
    V::pack_values(s.codes, d, page + at.v_codes);
  });
}
