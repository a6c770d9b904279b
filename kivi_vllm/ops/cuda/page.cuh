// Products with a packed page. They are mma.m16n8k16, of which codes are the wide side, as they lie
// in the page: a word has 4 bytes, j = 0 to 3, of one lane, and with one AND its bytes 0 and 2, or
// after a shift 1 and 3, become two fp16 numbers below the normal range, code * 2^(s - 24) with s the
// place of the slot, which tensor cores multiply exactly. Lanes 2g and 2g + 1 are rows g and g + 8 of
// a product, a quad of bytes is one thread's part of its 16 summands, and the scores of 16 tokens,
// transposed by movmatrix, are just what the product with V takes.

#pragma once
#include "softmax.cuh"

// The queries of columns g, divided by their largest number, as fp16: of quad 4s + t the even
// channels and the odd ones. In registers, as far as there are enough.
constexpr bool SHARED = NT > 1 || D > 128;

struct Queries {
  uint2 own[SHARED ? 1 : NT * D / 16];
  uint2 *shared;  // [NT][D / 16][32]

  MEMBER uint2 &at(int n, int s) {
    const int i = n * (D / 16) + s;
    return SHARED ? shared[32 * i] : own[i];
  }
  MEMBER uint2 of(int n, int s) const {
    const int i = n * (D / 16) + s;
    return SHARED ? shared[32 * i] : own[i];
  }
};

// Load them; `factor` is what products of columns 2t and 2t + 1 are to be multiplied by.
DEV void load_queries(const Call &call, const Row &row, int head, int tile, Queries &queries,
                      float (*factor)[2], int g, int t) {
  UNROLL for (int n = 0; n < NT; n++) {
    const Column c = Column::of(row, head, tile, 8 * n + g);
    const u8 *from = call.query + (i64)(row.q0 + c.t - row.a) * call.query_token +
                     c.head * call.query_head + 8 * t;
    uint2 q[D / 16];
    float largest = 0.f;
    UNROLL for (int s = 0; s < D / 16; s++) {
      q[s] = c.live ? words(from + 32 * s) : make_uint2(0, 0);
      largest = fmaxf(largest, fmaxf(fabsf(low_model(q[s].x)), fabsf(high_model(q[s].x))));
      largest = fmaxf(largest, fmaxf(fabsf(low_model(q[s].y)), fabsf(high_model(q[s].y))));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    if (!(largest > 0.f)) largest = 1.f;
    UNROLL for (int s = 0; s < D / 16; s++) {
      const float even0 = low_model(q[s].x) / largest, even1 = low_model(q[s].y) / largest;
      const float odd0 = high_model(q[s].x) / largest, odd1 = high_model(q[s].y) / largest;
      queries.at(n, s) = make_uint2(half2(even0, even1), half2(odd0, odd1));
    }
    const float scaled = largest * call.scale * (PLAIN ? LOG2E : 1.f);
    UNROLL for (int c2 = 0; c2 < 2; c2++)
      factor[n][c2] = __shfl_sync(~0u, scaled, 4 * (2 * t + c2));
  }
}

// A number with the power of two that is not above it, of those that fp16 has the inverses of.
DEV float power_below(float x) {
  return fmaxf(__uint_as_float(__float_as_uint(x) & 0x7f800000u), 1.f / (1 << 15));
}

// What a page's steps are divided by: they become 2 at most, so that no factor is beyond fp16, and
// none that matters below it.
DEV float unit_of_steps(const u8 *k, int t) {
  u32 most = 0;
  UNROLL for (int s = 0; s < D / 16; s++) {
    const uint2 w = words(k + K_STEP + 8 * (4 * s + t));
    most = max2(most, max2(w.x, w.y));
  }
  float largest = fmaxf(low_half(most), high_half(most));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  return power_below(fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)));
}

// The ranges of quad 4s + t of a page: even and odd channels of `low` and of steps divided by their
// unit, and what the groups have, of which the threads with this g have group g.
struct Ranges {
  u32 low_even, low_odd, step_even, step_odd, group;

  DEV Ranges of(const u8 *k, int quad, u32 by, int g) {
    const uint2 l = words(k + 8 * quad), w = words(k + K_STEP + 8 * quad);
    Ranges r;
    r.low_even = __byte_perm(l.x, l.y, 0x5410), r.low_odd = __byte_perm(l.x, l.y, 0x7632);
    r.step_even = mul2(__byte_perm(w.x, w.y, 0x5410), by);
    r.step_odd = mul2(__byte_perm(w.x, w.y, 0x7632), by);
    r.group = B / G >= 8 || g < B / G ? word(k + K_RANGE + g * D + 4 * quad) : 0;
    return r;
  }
};

// Scores of a page, without the zeros: those of tile k in units of the returned number over
// `unit_of(k % K_SLOTS)`; and the zeros of the groups, of which the threads with this g have group g.
DEV float page_scores(const u8 *k, const Queries &q, float (*scores)[8][4], float (*zeros)[2], int g,
                      int t) {
  const float unit = unit_of_steps(k, t);
  const u32 by = half2(inverse(unit), inverse(unit));
  float low[NT][4] = {}, steps[NT][4] = {};
  UNROLL for (int n = 0; n < NT; n++) UNROLL for (int i = 0; i < 32; i++) scores[n][i / 4][i % 4] = 0.f;
  UNROLL for (int s = 0; s < D / 16; s++) {
    const int quad = 4 * s + t;
    const Ranges of = Ranges::of(k, quad, by, g);
    u32 x[NT][2], x1024[NT][2];
    uint2 query[NT];
    UNROLL for (int n = 0; n < NT; n++) {
      query[n] = q.of(n, s);
      x[n][0] = mul2(query[n].x, of.step_even);
      x[n][1] = mul2(query[n].y, of.step_odd);
      x1024[n][0] = mul2(x[n][0], 0xe400e400u);  // * -1024
      x1024[n][1] = mul2(x[n][1], 0xe400e400u);
      mma(low[n], of.low_even, 0, of.low_odd, 0, query[n].x, query[n].y);
      mma(steps[n], of.group & 0x00f000f0u, 0, of.group >> 8 & 0x00f000f0u, 0, x[n][0], x[n][1]);
    }
    uint2 codes[K_UNITS];
    UNROLL for (int u = 0; u < K_STORED; u++)
      codes[u] = code_words(k + K_CODES, u * (D / 4) + quad, g);
    if (K_STORED < K_UNITS)
      codes[K_UNITS - 1] = spare_words(codes[0], codes[1], codes[2 % K_UNITS]);
    u32 y[NT][2];
    UNROLL for (int u = 0; u < K_UNITS; u++) {
      const uint2 c = codes[u], shifted = make_uint2(c.x >> 8, c.y >> 8);
      UNROLL for (int i = 0; i < K_SLOTS; i++) {
        const int token = (u * K_SLOTS + i) * 16;
        if (token % G == 0) {
          // 1024 + scale, times x, less 1024x: the scale times x, rounded once.
          const u32 r = word(k + K_RANGE + token / G * D + 4 * quad);
          const u32 r0 = and_or(r, 0x000f000fu, 0x64006400u);
          const u32 r1 = and_or(r >> 8, 0x000f000fu, 0x64006400u);
          UNROLL for (int n = 0; n < NT; n++) {
            y[n][0] = fma2(r0, x[n][0], x1024[n][0]);
            y[n][1] = fma2(r1, x[n][1], x1024[n][1]);
          }
        }
        const u32 m = mask_of(K_BITS, i);
        UNROLL for (int n = 0; n < NT; n++)
          mma(scores[n][u * K_SLOTS + i], c.x & m, c.y & m, shifted.x & m, shifted.y & m, y[n][0],
              y[n][1]);
      }
    }
  }
  // The rows of `low` are one row eight times.
  const float step = unit * (float)(1 << 20) * ZERO_STEP;
  UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++)
    zeros[n][c] = steps[n][c] * step + low[n][c];
  return unit;
}

// What `page_scores` has of code 1 in slot i of K, one over it.
__host__ __device__ constexpr float unit_of(int i) { return (float)(1 << (24 - i * pitch(K_BITS))); }

// Add the page's values by the weights p of fp16, in fragments of 16 tokens.
DEV void page_values(const u8 *v, const u32 (*p)[8][2], float (*acc)[D / 16][4], int g, int t) {
  float total[NT][4] = {};
  UNROLL for (int n = 0; n < NT; n++) UNROLL for (int k = 0; k < 8; k++) {
    const u32 one = V_SLOTS == 4 && k >= 4 ? 0x4c004c00u : 0x3c003c00u;  // 16: see `weights_of`
    mma(total[n], one, one, one, one, p[n][k][0], p[n][k][1]);
  }
  UNROLL for (int n = 0; n < NT; n++) UNROLL for (int i = 0; i < D / 16; i++) {
    const u32 mean = word(v + (16 * i + 2 * g) * 2);
    constexpr float MIDDLE = top(V_BITS) / 2.f;
    const float unit = (float)(1 << i % 2 * pitch(V_BITS)) / (1 << 24);
    const float x = (low_half(mean) - MIDDLE) * unit, y = (high_half(mean) - MIDDLE) * unit;
    UNROLL for (int c = 0; c < 2; c++) {
      acc[n][i][c] += x * total[n][c];
      acc[n][i][2 + c] += y * total[n][c];
    }
  }
  UNROLL for (int u = 0; u < D / 32; u++) UNROLL for (int j = 0; j < V_STEPS; j++) {
    const auto at = [&](int q) { return code_words(v + V_CODES, u * V_QUADS + q, g); };
    uint2 c;
    if (4 * j >= V_QUADS) {
      const int q = 3 * (4 * j - V_QUADS + t);
      c = spare_words(at(q), at(q + 1), at(q + 2));
    } else {
      c = at(4 * j + t);
    }
    const uint2 shifted = make_uint2(c.x >> 8, c.y >> 8);
    UNROLL for (int i = 0; i < V_SLOTS; i++) {
      const u32 m = mask_of(V_BITS, i);
      UNROLL for (int n = 0; n < NT; n++) {
        const u32 *w = p[n][i / 2 * 4 + j];
        mma(acc[n][2 * u + i % 2], c.x & m, c.y & m, shifted.x & m, shifted.y & m, w[0], w[1]);
      }
    }
  }
}

// The weights times V's scales, in units of `unit`, a power of two that is not below the largest
// scale so far by more than a half; returns what older sums are multiplied by for that.
DEV float weights_of(const u8 *v, float (*scores)[8][4], u32 (*p)[8][2], float &unit, int g) {
  u32 scale[8], most = 0;
  UNROLL for (int k = 0; k < 8; k++) {
    scale[k] = word(v + V_SCALE + (16 * k + 2 * g) * 2);
    most = max2(most, scale[k]);
  }
  const float largest = most_of_column(fmaxf(low_half(most), high_half(most)));
  const float before = unit;
  unit = fmaxf(unit, power_below(largest));
  const float by = inverse(unit);
  UNROLL for (int k = 0; k < 8; k++) {
    // Of 2 bits, tokens from 64 on lie four bits higher in their bytes.
    const float one = V_SLOTS == 4 && k >= 4 ? by / 16.f : by;
    const u32 x = mul2(scale[k], half2(one, one));
    const u32 x0 = __byte_perm(x, x, 0x1010), x1 = __byte_perm(x, x, 0x3232);
    UNROLL for (int n = 0; n < NT; n++) {
      p[n][k][0] = transposed(mul2(half2(scores[n][k][0], scores[n][k][1]), x0));
      p[n][k][1] = transposed(mul2(half2(scores[n][k][2], scores[n][k][3]), x1));
    }
  }
  return before * by;
}
