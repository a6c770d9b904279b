// Quantize and pack one block: the numbers of codec.py bit for bit, in the order of format.py.

struct EncodeScratch {
  float x[kBlock * kMaxHead];                  // [128][head_size]
  float zero[kMaxHead], scale[kMaxHead];       // of one group, as fp32
  uint8_t codes[kBlock * kMaxHead];            // [128][head_size]
  uint8_t turned[kMaxHead * kBlock];           // [head_size][128]
};

// zero and scale of a group with the given extremes; NaN if one of its numbers is.
static INLINE void scale_of(float low, float high, bool nan, float top, uint16_t *zero,
                            uint16_t *scale) {
  const float kMax = 65504.0f, kNan = __builtin_nanf("");
  const float spread = high == low ? 0.0f : high - low;
  const float s = min_of(spread / top, kMax), z = low < -kMax ? -kMax : low > kMax ? kMax : low;
  *zero = float_to_half(nan ? kNan : z);
  *scale = float_to_half(nan ? kNan : s);
}

// Codes of n numbers with their own or (step 0) one common zero and scale.
static INLINE void codes_of(const float *x, const float *zero, const float *scale, int step, int n,
                            float top, uint8_t *codes) {
  for (int i = 0; i < n; i += W) {
    const vf z = step ? load(zero + i) : all(*zero), s = step ? load(scale + i) : all(*scale);
    const vi positive = s > 0.0f;  // not 0, not NaN
    const vf divisor = (vf)(((vi)s & positive) | ((vi)all(1.0f) & ~positive));
    vf y = (load(x + i) - z) / divisor;
    y = y > 0.0f ? y : vf{};  // NaN too, before it meets the integers
    y = y < top ? y : all(top);
    y = (y + 12582912.0f) - 12582912.0f;  // half to even
    const vi code = __builtin_convertvector(y, vi) & positive;
    for (int j = 0; j < W; j++) codes[i + j] = (uint8_t)code[j];
  }
}

static void quantize_keys(EncodeScratch &s, int d, int group, float top, uint8_t *page,
                          const Layout &at) {
  for (int g = 0; g < kBlock / group; g++) {
    const float *x = s.x + g * group * d;
    uint16_t *scale = (uint16_t *)(page + at.k_scale) + g * d;
    uint16_t *zero = (uint16_t *)(page + at.k_zero) + g * d;
    for (int i = 0; i < d; i += W) {
      vf low = load(x + i), high = low;
      vi nan = low != low;
      for (int t = 1; t < group; t++) {
        const vf y = load(x + t * d + i);
        nan |= y != y;
        low = y < low ? y : low;
        high = y > high ? y : high;
      }
      for (int j = 0; j < W; j++) scale_of(low[j], high[j], nan[j], top, zero + i + j, scale + i + j);
    }
    for (int i = 0; i < d; i++) {
      s.scale[i] = half_to_float(scale[i]);
      s.zero[i] = half_to_float(zero[i]);
    }
    for (int t = 0; t < group; t++)
      codes_of(x + t * d, s.zero, s.scale, 1, d, top, s.codes + (g * group + t) * d);
  }
}

static void quantize_values(EncodeScratch &s, int d, int group, float top, uint8_t *page,
                            const Layout &at) {
  for (int t = 0; t < kBlock; t++)
    for (int g = 0; g < d / group; g++) {
      const float *x = s.x + t * d + g * group;
      uint16_t *scale = (uint16_t *)(page + at.v_scale) + g * kBlock + t;
      uint16_t *zero = (uint16_t *)(page + at.v_zero) + g * kBlock + t;
      vf low = load(x), high = low;
      vi nan = low != low;
      for (int i = W; i < group; i += W) {
        const vf y = load(x + i);
        nan |= y != y;
        low = y < low ? y : low;
        high = y > high ? y : high;
      }
      const float largest_of = largest(high), smallest = -largest(-low);
      bool bad = false;
      for (int j = 0; j < W; j++) bad |= nan[j] != 0;
      scale_of(smallest, largest_of, bad, top, zero, scale);
      const float fs = half_to_float(*scale), fz = half_to_float(*zero);
      codes_of(x, &fz, &fs, 0, group, top, s.codes + t * d + g * group);
    }
}

static INLINE uint32_t four(const uint8_t *p) {
  uint32_t x;
  __builtin_memcpy(&x, p, 4);
  return x;
}

// K: byte (tile, channel / 4, lane, channel % 4); tiles of 32 tokens, two to a byte at 2 bits.
static void pack_keys(const uint8_t *codes, int d, int bits, uint8_t *out) {
  uint32_t *word = (uint32_t *)out;
  const int tokens = bits == 2 ? 64 : 32;  // of a byte's slots
  for (int t = 0; t < kBlock; t += tokens, word += d / 4 * 16)
    for (int lane = 0; lane < 16; lane++) {
      const uint8_t *x = codes + (t + lane) * d;
      if (bits == 2)
        for (int q = 0; q < d / 4; q++)
          word[q * 16 + lane] = four(x + 4 * q) | four(x + 16 * d + 4 * q) << 2 |
                                four(x + 32 * d + 4 * q) << 4 | four(x + 48 * d + 4 * q) << 6;
      else
        for (int q = 0; q < d / 4; q++)
          word[q * 16 + lane] = four(x + 4 * q) | four(x + 16 * d + 4 * q) << 4;
    }
}

// V: byte (tile, token / 4, lane, token % 4); tiles of 32 channels, at 2 bits tokens 64 apart share
// a byte.
static void pack_values(const uint8_t *codes, int d, int bits, uint8_t *turned, uint8_t *out) {
  for (int t = 0; t < kBlock; t++)
    for (int i = 0; i < d; i++) turned[i * kBlock + t] = codes[t * d + i];
  uint32_t *word = (uint32_t *)out;
  const int quads = bits == 2 ? 16 : 32;
  for (int tile = 0; tile < d / 32; tile++)
    for (int q = 0; q < quads; q++)
      for (int lane = 0; lane < 16; lane++, word++) {
        const uint8_t *x = turned + (32 * tile + lane) * kBlock + 4 * q, *y = x + 16 * kBlock;
        *word = bits == 2 ? four(x) | four(y) << 2 | four(x + 64) << 4 | four(y + 64) << 6
                          : four(x) | four(y) << 4;
      }
}

static void copy(const uint8_t *from, int64_t n, uint8_t *to) { __builtin_memcpy(to, from, n); }

static void encode_block(const KiviCall &c, const KiviRow &row, int64_t block, int64_t head,
                         EncodeScratch &s) {
  const int d = (int)c.head_size, group = (int)c.group_size;
  const int64_t first = block * kBlock;
  const Source source(c, row, head, 0);
  const uint8_t *k[kBlock], *v[kBlock];
  source.find(first, kBlock, k, v);
  uint8_t *page = page_of(c, row, head, block);
  const int64_t bytes = source.bytes;
  if (c.k_bits == 0) {
    for (int t = 0; t < kBlock; t++) {
      copy(k[t], bytes, page + t * bytes);
      copy(v[t], bytes, page + (kBlock + t) * bytes);
    }
  } else {
    const Layout at(c);
    for (int side = 0; side < 2; side++) {
      const int bits = (int)(side ? c.v_bits : c.k_bits);
      const float top = (float)((1 << bits) - 1);
      for (int t = 0; t < kBlock; t++)
        for (int i = 0; i < d; i += W)
          store(s.x + t * d + i, load_any(c.dtype, (side ? v : k)[t] + i * dtype_bytes(c.dtype)));
      if (side == 0) {
        quantize_keys(s, d, group, top, page, at);
        pack_keys(s.codes, d, bits, page + at.k_codes);
      } else {
        quantize_values(s, d, group, top, page, at);
        pack_values(s.codes, d, bits, s.turned, page + at.v_codes);
      }
    }
  }
  for (int64_t t = kBlock - c.residual_length; t < kBlock; t++) {
    const int64_t at = t - (kBlock - c.residual_length);
    uint8_t *to =
        Source::token(c.tails[at / c.raw_tokens], row.index, block, head, at % c.raw_tokens);
    copy(k[t], bytes, to);
    copy(v[t], bytes, to + bytes);
  }
}
