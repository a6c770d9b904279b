// Quantize and pack one block: the numbers of codec.py bit for bit, in the order of format.py.
//
// Keys are taken as [128 tokens][channels] and values as [channels][128 tokens], so that the groups
// of both are runs of rows, and a vector has as many groups as lanes.

struct EncodeScratch {
  float x[kBlock * kMaxHead];
  float u[kBlock * kMaxHead];        // of values: see encode_values
  uint8_t codes[kBlock * kMaxHead];  // like x
};

// The least and the largest of W groups of n numbers in rows `columns` apart; which have a NaN.
static INLINE vi span_of(const float *x, int n, int columns, vf *least, vf *largest) {
  vf low = load(x), high = low;
  vi nan = low != low;
  for (int t = 1; t < n; t++) {
    const vf y = load(x + t * columns);
    nan |= y != y;
    low = y < low ? y : low;
    high = y > high ? y : high;
  }
  *least = low;
  *largest = high;
  return nan;
}

// paper.quantize: codes, scales and zeros of `rows` of `columns` numbers, `group` rows a group.
template <class CODES>
static void quantize(EncodeScratch &s, int rows, int columns, int group, uint16_t *scale,
                     uint16_t *zero) {
  const float top = (float)CODES::top;
  const float kMax = 65504.0f, kNan = __builtin_nanf("");
  for (int g = 0; g < rows; g += group, scale += columns, zero += columns)
    for (int i = 0; i < columns; i += W) {
      const float *x = s.x + g * columns + i;
      vf low, high;
      const vi nan = span_of(x, group, columns, &low, &high);
      vf step = either(high == low, vf{}, high - low) / top, from = low;
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

#include "encode_two_level.h"

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

// Whether an entry of a request's is a page, not vLLM's null block.
static bool is_held(const KiviRaw &raw, const KiviRow &row, int64_t entry) {
  return raw.table[row.index * raw.table_stride + entry] != 0;
}

static void copy(const uint8_t *from, int64_t n, uint8_t *to) { __builtin_memcpy(to, from, n); }

static void encode_block(const KiviCall &c, const KiviRow &row, int64_t block, int64_t head,
                         EncodeScratch &s) {
  const int d = (int)c.head_size, group = (int)c.group_size;
  const Source source(c, row, head, 0);
  const uint8_t *k[kBlock], *v[kBlock];
  source.find(block * kBlock, kBlock, k, v);
  const int64_t bytes = source.bytes;
  const auto keep = [&](int64_t t, uint8_t *to) {
    copy(k[t], bytes, to);
    copy(v[t], bytes, to + bytes);
  };
  for (int64_t t = kBlock - c.residual_length; t < kBlock; t++) {
    const int64_t at = t - (kBlock - c.residual_length);
    const KiviRaw &tail = c.tails[at / c.tails->page_tokens];
    if (is_held(tail, row, block))
      keep(t, Source::token(tail, row.index, block, head, at % tail.page_tokens));
  }
  if (block == 0)
    for (int64_t t = 0; t < c.sink_tokens; t++) {
      if (is_held(c.sinks, row, 0)) keep(t, Source::token(c.sinks, row.index, 0, head, t));
      k[t] = k[c.sink_tokens + t];  // stands in for it in its group
    }
  if (pool_block(c, row, block) == 0) return;
  uint8_t *page = page_of(c, row, head, block);
  if (is_raw(c)) {
    for (int t = 0; t < kBlock; t++) {
      copy(k[t], bytes, page + t * bytes);
      copy(v[t], bytes, page + (kBlock + t) * bytes);
    }
    return;
  }
  const auto half = [&](int offset) { return (uint16_t *)(page + offset); };
  with_codes(c, [&](auto of_keys, auto of_values, auto two_level) {
    using K = decltype(of_keys);
    using V = decltype(of_values);
    load_keys(c.dtype, k, d, s.x);
    if constexpr (two_level.value) {
      const TwoLevelLayout at(c);
      encode_keys<K>(s, d, group, half(at.k_low), half(at.k_step), page + at.k_range);
      K::pack_keys(s.codes, d, page + at.k_codes);
      load_values(c.dtype, v, d, s.x);
      rotate_rows(s.x, d);
      encode_values<V>(s, d, block == 0 ? (int)c.sink_tokens : 0, half(at.v_scale),
                       half(at.v_mean));
      V::pack_values(s.codes, d, page + at.v_codes);
      __builtin_memset(page + at.end, 0, padded_bytes(at.end) - at.end);
    } else {
      const PaperLayout at(c);
      quantize<K>(s, kBlock, d, group, half(at.k_scale), half(at.k_zero));
      K::pack_keys(s.codes, d, page + at.k_codes);
      load_values(c.dtype, v, d, s.x);
      quantize<V>(s, d, kBlock, group, half(at.v_scale), half(at.v_zero));
      V::pack_values(s.codes, d, page + at.v_codes);
    }
  });
}
