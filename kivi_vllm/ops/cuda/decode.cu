// Attention of a few query tokens a request over its packed pages and its full-precision tokens.
//
// One warp is a program: it serves one request, one kv head, and one split of the pages; the
// full-precision tokens are a split of their own. What it leaves is what `_decode` of
// triton/decode.py leaves, and `_combine` puts the splits together.
//
// All products are mma.m16n8k16. Codes are its wide side, as they lie in the page (codes.py): a
// word has 4 bytes, j = 0 to 3, of one lane, and with one AND its bytes 0 and 2, or after a shift
// 1 and 3, become two fp16 numbers below the normal range, code * 2^(s - 24) with s the place of
// the slot, which tensor cores multiply exactly. Lanes 2g and 2g + 1 are rows g and g + 8 of a
// product, a quad of bytes is one thread's part of its 16 summands, and the scores of 16 tokens,
// transposed by movmatrix, are just what the product with V takes.
//
// Compile-time constants, all of them given by decode.py:
//   D, K_BITS, V_BITS, G, ZERO_STEP, SINKS: of the page format; PER_BLOCK: pages of a block
//   RING, TAIL: tokens of a page of the ring and of a tail; R: residual length
//   GQA, TILES, N: query heads of a kv head, tiles of columns, columns of a tile (8 or 16)
//   MASKED: whether some column does not see all of the pages; BF16: the model's dtype
//   CAP, ALIBI, WINDOW, CHUNK: see triton/softmax.py; CALL_BYTES: sizeof(Call)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define MEMBER __device__ __forceinline__
#define DEV static MEMBER
#define UNROLL _Pragma("unroll")

constexpr int B = 128;
constexpr int NT = N / 8;  // of products with 8 columns
constexpr float LOG2E = 1.4426950408889634f;
#define NOTHING __int_as_float(0xff800000)

// codes.py
__host__ __device__ constexpr int slots(int bits) { return 8 / bits; }
__host__ __device__ constexpr int pitch(int bits) { return 8 / slots(bits); }
__host__ __device__ constexpr u32 mask_of(int bits, int slot) { return ((1u << bits) - 1u) * 0x10001u << slot * pitch(bits); }
constexpr int K_SLOTS = slots(K_BITS), K_UNITS = 8 / K_SLOTS, K_STORED = K_BITS == 3 ? 3 : K_UNITS;
constexpr int V_SLOTS = slots(V_BITS), V_STEPS = V_SLOTS == 4 ? 4 : 8;  // of 4 quads
constexpr int V_QUADS = 8 * V_BITS;                                      // that are stored

// format.py
constexpr int K_STEP = 2 * D, K_RANGE = 4 * D, K_CODES = K_RANGE + B / G * D;
constexpr int K_BYTES = K_CODES + 16 * D * K_BITS;
constexpr int V_SCALE = 2 * D, V_CODES = V_SCALE + 2 * B, V_BYTES = V_CODES + 16 * D * V_BITS;

// Strides are bytes; see `Pages` and `RawTokens` of triton/tokens.py.
struct Call {
  const u8 *query;
  i64 query_token, query_head;
  const int *query_start_loc, *seq_lens;
  const u8 *pages;
  i64 page_block, page_page, page_head;
  const int *table;
  i64 table_row;
  const u8 *key;
  i64 key_token, key_head;
  const u8 *value;
  i64 value_token, value_head;
  const u8 *ring;
  i64 ring_page, ring_head, ring_token;
  const int *ring_table;
  i64 ring_row;
  const i64 *tails;
  i64 tails_page, tails_head, tails_token, tails_row;
  const u8 *sinks;
  i64 sinks_page, sinks_head, sinks_token;
  const int *sinks_table;
  i64 sinks_row;
  const float *slopes;
  float *partial, *statistics;
  float scale;
  int splits;
};
static_assert(sizeof(Call) == CALL_BYTES, "decode.py knows other fields");

// ------------------------------------------------------------------- instructions

DEV u32 mul2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

DEV u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// x & a | b, in one instruction.
DEV u32 and_or(u32 x, u32 a, u32 b) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(x), "r"(a), "r"(b));
  return d;
}

DEV u32 max2(u32 a, u32 b) {
  u32 d;
  asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Two numbers as fp16, the first in the low half.
DEV u32 half2(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Two numbers in the model's dtype.
DEV u32 model2(float low, float high) {
  if (!BF16) return half2(low, high);
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

DEV float number(u16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
  return f;
}

DEV float low_half(u32 x) { return number((u16)x); }
DEV float high_half(u32 x) { return number((u16)(x >> 16)); }
DEV float low_model(u32 x) { return BF16 ? __uint_as_float(x << 16) : low_half(x); }
DEV float high_model(u32 x) { return BF16 ? __uint_as_float(x & 0xffff0000u) : high_half(x); }

DEV float power2(float x) {
  float f;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(x));
  return f;
}

DEV float inverse(float x) {
  float f;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(x));
  return f;
}

DEV void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEV void mma_model(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (!BF16) return mma(c, a0, a1, a2, a3, b0, b1);
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Of an 8 x 8 matrix of 16-bit numbers, of which thread 4g + t has columns 2t, 2t + 1 of row g.
DEV u32 transposed(u32 x) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
  return d;
}

// Until all copies but those of the newest group have come, of all threads.
DEV void wait() {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncwarp();
}

DEV u32 shared_address(const void *x) { return (u32)__cvta_generic_to_shared(x); }

// What is read as words by many threads lies as in the page; of codes, every other 128 bytes have
// their halves of 64 bytes swapped, so that the threads of `code_words` need all banks.
template <int BYTES, bool CODES>
DEV void copy(u32 to, const u8 *from, int lane) {
  const int at = CODES ? 16 * lane ^ (16 * lane >> 2 & 32) : 16 * lane;
  UNROLL for (int i = 0; i < BYTES; i += 512) {
    if (i + 512 <= BYTES || i + 16 * lane < BYTES)
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to + i + at),
                   "l"(from + i + 16 * lane)
                   : "memory");
  }
}

// A group of copies, empty unless `wanted`.
DEV void copy_keys(u32 to, const u8 *page, bool wanted, int lane) {
  if (wanted) {
    copy<K_CODES, false>(to, page, lane);
    copy<K_BYTES - K_CODES, true>(to + K_CODES, page + K_CODES, lane);
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

DEV void copy_values(u32 to, const u8 *page, bool wanted, int lane) {
  if (wanted) {
    copy<V_CODES, false>(to, page + K_BYTES, lane);
    copy<V_BYTES - V_CODES, true>(to + V_CODES, page + K_BYTES + V_CODES, lane);
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

DEV u32 word(const u8 *at) { return *(const u32 *)at; }
DEV uint2 words(const u8 *at) { return *(const uint2 *)at; }

// Of quad q of the copied codes, the words of lanes 2g and 2g + 1.
DEV uint2 code_words(const u8 *codes, int q, int g) {
  return words(codes + 64 * q + (8 * g ^ (q & 2) << 4));
}

// The largest, or the sum, of the threads that have the same column of a product.
DEV float most_of_column(float x) {
  UNROLL for (int i = 4; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

DEV float sum_of_column(float x) {
  UNROLL for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// ------------------------------------------------------------------- rules

DEV int larger(int a, int b) { return a > b ? a : b; }
DEV int smaller(int a, int b) { return a < b ? a : b; }

// F(t), of triton/tokens.py.
DEV int first_raw(int t) { return larger(t / B * B - R, 0); }

DEV int oldest_seen(int t) {
  int oldest = 0;
  if (WINDOW > 0) oldest = larger(t + 1 - WINDOW, 0);
  if (CHUNK > 0) oldest = larger(oldest, t / (CHUNK > 0 ? CHUNK : 1) * CHUNK);
  return oldest;
}

DEV bool visible(int s, int t) { return s <= t && s >= oldest_seen(t); }

// A column: a query head at a position.
struct Column {
  int t, head;  // of queries
  bool live;

  DEV Column of(int kv_head, int column, int a, int b) {
    Column c;
    c.t = a + column / GQA;
    c.head = kv_head * GQA + column % GQA;
    c.live = c.t < b;
    return c;
  }
};

// A score, as a power of two, of a product times the scale (and, in plain cases, LOG2E).
constexpr bool PLAIN = CAP == 0 && !ALIBI;

DEV float finished(float x, int s, int t, float slope) {
  if (PLAIN) return x;
  if (CAP > 0) x = CAP * (1.f - 2.f * inverse(power2(x * (2.f * LOG2E / (CAP > 0 ? CAP : 1))) + 1.f));
  if (ALIBI) x += slope * (float)(s - t);
  return x * LOG2E;
}

// The softmax so far of two columns, and what came of them in a split.
struct Softmax {
  float m[NT][2], mass[NT][2];

  MEMBER void begin() {
    UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++) {
      m[n][c] = NOTHING;
      mass[n][c] = 0.f;
    }
  }

  // Scores of COUNT tiles to weights; `alpha` is what older sums are multiplied by.
  template <int COUNT>
  MEMBER void weigh(float (*scores)[COUNT][4], float (*alpha)[2]) {
    UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++) {
      float most = scores[n][0][c];
      UNROLL for (int k = 0; k < COUNT; k++)
        most = fmaxf(most, fmaxf(scores[n][k][c], scores[n][k][2 + c]));
      most = fmaxf(m[n][c], most_of_column(most));
      const float safe = most == NOTHING ? 0.f : most;
      alpha[n][c] = power2(m[n][c] - safe);
      m[n][c] = most;
      float sum = 0.f;
      UNROLL for (int k = 0; k < COUNT; k++) UNROLL for (int r = c; r < 4; r += 2) {
        scores[n][k][r] = power2(scores[n][k][r] - safe);
        sum += scores[n][k][r];
      }
      mass[n][c] = mass[n][c] * alpha[n][c] + sum;
    }
  }

  MEMBER void store(const Call &call, i64 at, int g, int t) {
    UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++) {
      const float sum = sum_of_column(mass[n][c]);
      if (g == 0) {
        float *to = call.statistics + 2 * (at + 8 * n + 2 * t + c);
        to[0] = m[n][c];
        to[1] = sum;
      }
    }
  }
};

// ------------------------------------------------------------------- full-precision tokens

struct Row {
  int index, q0, a, b;
};

// A row of a table.
DEV const int *row_of(const int *table, i64 stride, int row) {
  return (const int *)((const u8 *)table + row * stride);
}

struct Token {
  const u8 *k, *v;
};

// `raw_bases` of triton/tokens.py, of one token.
DEV Token raw_token(const Call &call, const Row &row, int head, int s) {
  if (s >= row.a) {
    const i64 at = row.q0 + s - row.a;
    return {call.key + at * call.key_token + head * call.key_head,
            call.value + at * call.value_token + head * call.value_head};
  }
  const int start = row.a / B * B, seen_from = first_raw(row.a);
  const u8 *k;
  if (SINKS > 0 && s < smaller(seen_from, SINKS)) {
    const i64 page = *row_of(call.sinks_table, call.sinks_row, row.index);
    k = call.sinks + page * call.sinks_page + head * call.sinks_head + s * call.sinks_token;
  } else if (s < start) {
    const int i = s - (start - R);
    const i64 *tail = call.tails + i / TAIL * 2;
    const int *table = (const int *)tail[1];
    const i64 page = row_of(table, call.tails_row, row.index)[start / B - 1];
    k = (const u8 *)tail[0] + page * call.tails_page + head * call.tails_head +
        i % TAIL * call.tails_token;
  } else {
    const int entry = s / B * ((B + RING - 1) / RING) + s % B / RING;
    const i64 page = row_of(call.ring_table, call.ring_row, row.index)[entry];
    k = call.ring + page * call.ring_page + head * call.ring_head + s % B % RING * call.ring_token;
  }
  return {k, k + 2 * D};
}

// Of 16 tokens, that are read together: as many as there are registers for.
constexpr int RAW_TILES = NT * D > 64 ? 1 : 2;

DEV void attend_raw(const Call &call, const Row &row, int head, int tile, i64 at, int lane) {
  const int g = lane / 4, t = lane % 4;
  // Queries: of chunks of 32 channels, thread t has channels 8t to 8t + 7.
  uint4 q[NT][D / 32];
  UNROLL for (int n = 0; n < NT; n++) {
    const Column c = Column::of(head, tile * N + 8 * n + g, row.a, row.b);
    const u8 *from = call.query + (i64)(row.q0 + c.t - row.a) * call.query_token +
                     c.head * call.query_head + 16 * t;
    UNROLL for (int i = 0; i < D / 32; i++)
      q[n][i] = c.live ? *(const uint4 *)(from + 64 * i) : make_uint4(0, 0, 0, 0);
  }
  Softmax softmax;
  softmax.begin();
  float acc[NT][D / 16][4] = {};
  const int seen_from = first_raw(row.a), oldest = oldest_seen(row.a);
  const int lead = SINKS > 0 && oldest < SINKS ? smaller(seen_from, SINKS) : 0;
  const int start = larger(seen_from, oldest) - lead;
  const float factor = call.scale * (PLAIN ? LOG2E : 1.f);
  int next[2 * RAW_TILES];  // positions, and where they are: one round ahead
  Token next_token[2 * RAW_TILES];
  const auto find = [&](int first) {
    UNROLL for (int r = 0; r < 2 * RAW_TILES; r++) {
      next[r] = first + g + 8 * r;
      if (SINKS > 0 && next[r] < start + lead) next[r] -= start;
      next_token[r] = raw_token(call, row, head, smaller(next[r], row.b - 1));
    }
  };
  find(start);
#pragma unroll 1
  for (int first = start; first < row.b; first += 16 * RAW_TILES) {
    int s[2 * RAW_TILES];
    Token token[2 * RAW_TILES];
    UNROLL for (int r = 0; r < 2 * RAW_TILES; r++) {
      s[r] = next[r];
      token[r] = next_token[r];
    }
    // All that is read is asked for before any of it is needed, as far as there are registers.
    uint4 k[2 * RAW_TILES][D / 32];
    uint2 v[4 * RAW_TILES][D / 32];  // of tokens 2t, 2t + 1, 2t + 8, 2t + 9 of each tile
    UNROLL for (int r = 0; r < 2 * RAW_TILES; r++) UNROLL for (int i = 0; i < D / 32; i++)
      k[r][i] = *(const uint4 *)(token[r].k + 16 * t + 64 * i);
    const auto load_values = [&] {
      UNROLL for (int r = 0; r < 4 * RAW_TILES; r++) {
        const i64 of = __shfl_sync(~0u, (i64)token[r / 2].v, 4 * (2 * t + r % 2));
        UNROLL for (int i = 0; i < D / 32; i++) v[r][i] = words((const u8 *)of + 8 * g + 64 * i);
      }
    };
    if (D <= 128) load_values();
    if (first + 16 * RAW_TILES < row.b) find(first + 16 * RAW_TILES);
    float scores[NT][RAW_TILES][4] = {}, alpha[NT][2];
    UNROLL for (int n = 0; n < NT; n++) UNROLL for (int m = 0; m < RAW_TILES; m++) {
      float *const x = scores[n][m];
      UNROLL for (int i = 0; i < D / 32; i++) {
        const uint4 k0 = k[2 * m][i], k1 = k[2 * m + 1][i];
        mma_model(x, k0.x, k1.x, k0.y, k1.y, q[n][i].x, q[n][i].y);
        mma_model(x, k0.z, k1.z, k0.w, k1.w, q[n][i].z, q[n][i].w);
      }
      UNROLL for (int r = 0; r < 4; r++) {
        const int of = s[2 * m + r / 2];
        const Column c = Column::of(head, tile * N + 8 * n + 2 * t + r % 2, row.a, row.b);
        const bool whole = of >= first_raw(c.t) || (SINKS > 0 && of < SINKS);
        const float slope = ALIBI ? call.slopes[c.head] : 0.f;
        const float score = finished(x[r] * factor, of, c.t, slope);
        x[r] = whole && visible(of, c.t) && of < row.b ? score : NOTHING;
      }
    }
    if (D > 128) load_values();
    softmax.weigh<RAW_TILES>(scores, alpha);
    UNROLL for (int n = 0; n < NT; n++) {
      UNROLL for (int i = 0; i < D / 16; i++) UNROLL for (int r = 0; r < 4; r++)
        acc[n][i][r] *= alpha[n][r % 2];
      UNROLL for (int m = 0; m < RAW_TILES; m++) {
        const u32 p0 = transposed(model2(scores[n][m][0], scores[n][m][1]));
        const u32 p1 = transposed(model2(scores[n][m][2], scores[n][m][3]));
        UNROLL for (int i = 0; i < D / 32; i++) UNROLL for (int j = 0; j < 2; j++) {
          const auto of = [&](int r) { return j ? v[4 * m + r][i].y : v[4 * m + r][i].x; };
          mma_model(acc[n][2 * i + j], __byte_perm(of(0), of(1), 0x5410),
                    __byte_perm(of(0), of(1), 0x7632), __byte_perm(of(2), of(3), 0x5410),
                    __byte_perm(of(2), of(3), 0x7632), p0, p1);
        }
      }
    }
  }
  softmax.store(call, at, g, t);
  UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++) {
    if (!Column::of(head, tile * N + 8 * n + 2 * t + c, row.a, row.b).live) continue;
    float *to = call.partial + (at + 8 * n + 2 * t + c) * D + 4 * g;
    UNROLL for (int i = 0; i < D / 16; i++)
      *(float2 *)(to + i / 2 * 32 + i % 2 * 2) = make_float2(acc[n][i][c], acc[n][i][2 + c]);
  }
}

// ------------------------------------------------------------------- packed pages

DEV const u8 *page_of(const Call &call, const Row &row, int head, int block) {
  const i64 held = row_of(call.table, call.table_row, row.index)[block / PER_BLOCK];
  return call.pages + held * call.page_block + block % PER_BLOCK * call.page_page +
         head * call.page_head;
}

DEV uint2 spare(uint2 a, uint2 b, uint2 c) {
  const auto of = [](u32 x, u32 y, u32 z) {
    return (x >> 3 & 0x11111111u) | (y >> 2 & 0x22222222u) | (z >> 1 & 0x44444444u);
  };
  return make_uint2(of(a.x, b.x, c.x), of(a.y, b.y, c.y));
}

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

// A number with the power of two that is not above it, of those that fp16 has the inverses of.
DEV float power_below(float x) {
  return fmaxf(__uint_as_float(__float_as_uint(x) & 0x7f800000u), 1.f / (1 << 15));
}

// Scores of a page, without the zeros: those of tile k in units of the returned number over
// `unit_of(k % K_SLOTS)`; and the zeros of the groups, of which the threads with this g have group g.
DEV float page_scores(const u8 *k, const Queries &q, float (*scores)[8][4], float (*zeros)[2], int g,
                      int t) {
  // Steps become 2 at most, so that no factor is beyond fp16, and none that matters below it.
  u32 most = 0;
  UNROLL for (int s = 0; s < D / 16; s++) {
    const uint2 w = words(k + K_STEP + 8 * (4 * s + t));
    most = max2(most, max2(w.x, w.y));
  }
  float largest = fmaxf(low_half(most), high_half(most));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  const float unit = power_below(fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)));
  const float inverse_unit = inverse(unit);
  const u32 by = half2(inverse_unit, inverse_unit);
  float low[NT][4] = {}, steps[NT][4] = {};
  UNROLL for (int n = 0; n < NT; n++) UNROLL for (int i = 0; i < 32; i++) scores[n][i / 4][i % 4] = 0.f;
  UNROLL for (int s = 0; s < D / 16; s++) {
    const int quad = 4 * s + t;
    const uint2 l = words(k + 8 * quad), w = words(k + K_STEP + 8 * quad);
    const u32 low_even = __byte_perm(l.x, l.y, 0x5410), low_odd = __byte_perm(l.x, l.y, 0x7632);
    const u32 step_even = mul2(__byte_perm(w.x, w.y, 0x5410), by);
    const u32 step_odd = mul2(__byte_perm(w.x, w.y, 0x7632), by);
    u32 x[NT][2], x1024[NT][2];
    uint2 query[NT];
    u32 z = 0;
    if (B / G >= 8 || g < B / G) z = word(k + K_RANGE + g * D + 4 * quad);
    UNROLL for (int n = 0; n < NT; n++) {
      query[n] = q.of(n, s);
      x[n][0] = mul2(query[n].x, step_even);
      x[n][1] = mul2(query[n].y, step_odd);
      x1024[n][0] = mul2(x[n][0], 0xe400e400u);  // * -1024
      x1024[n][1] = mul2(x[n][1], 0xe400e400u);
      mma(low[n], low_even, 0, low_odd, 0, query[n].x, query[n].y);
      mma(steps[n], z & 0x00f000f0u, 0, z >> 8 & 0x00f000f0u, 0, x[n][0], x[n][1]);
    }
    uint2 codes[K_UNITS];
    UNROLL for (int u = 0; u < K_STORED; u++)
      codes[u] = code_words(k + K_CODES, u * (D / 4) + quad, g);
    if (K_BITS == 3) codes[K_UNITS - 1] = spare(codes[0], codes[1], codes[2 % K_UNITS]);
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
    constexpr float MIDDLE = ((1 << V_BITS) - 1) / 2.f;
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
    if (V_BITS == 3 && j >= 6) {
      const int q = 3 * (4 * (j - 6) + t);
      c = spare(at(q), at(q + 1), at(q + 2));
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

DEV void attend_pages(const Call &call, const Row &row, int head, int tile, int first, int last,
                      i64 at, u8 *shared, int lane) {
  const int g = lane / 4, t = lane % 4;
  const u8 *const k = shared, *const v = shared + K_BYTES;
  const u32 k_at = shared_address(k), v_at = shared_address(v);
  const u8 *page = page_of(call, row, head, first);
  copy_keys(k_at, page, true, lane);
  copy_values(v_at, page, true, lane);
  const u8 *next = page_of(call, row, head, smaller(first + 1, last - 1));
  Queries queries;
  queries.shared = (uint2 *)(shared + K_BYTES + V_BYTES) + lane;
  float factor[NT][2];
  UNROLL for (int n = 0; n < NT; n++) {
    const Column c = Column::of(head, tile * N + 8 * n + g, row.a, row.b);
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
  Softmax softmax;
  softmax.begin();
  float acc[NT][D / 16][4] = {};
  float unit = 1.f / (1 << 15);
#pragma unroll 1
  for (int n = first; n < last; n++) {
    const u8 *const following = page_of(call, row, head, smaller(n + 2, last - 1));
    float scores[NT][8][4], zeros[NT][2], alpha[NT][2];
    wait();
    const float k_unit = page_scores(k, queries, scores, zeros, g, t);
    __syncwarp();
    copy_keys(k_at, next, n + 1 < last, lane);
    UNROLL for (int m = 0; m < NT; m++) UNROLL for (int c = 0; c < 2; c++) {
      const Column of = Column::of(head, tile * N + 8 * m + 2 * t + c, row.a, row.b);
      const int seen_from = first_raw(of.t);
      const float slope = ALIBI ? call.slopes[of.head] : 0.f;
      const float zero_of_g = zeros[m][c] * factor[m][c], scale = factor[m][c] * k_unit;
      float zero;
      UNROLL for (int i = 0; i < 8; i++) {
        if (16 * i % G == 0) zero = __shfl_sync(~0u, zero_of_g, 16 * i / G * 4 + t);
        UNROLL for (int r = 0; r < 2; r++) {
          const int token = 16 * i + 2 * g + r, s = n * B + token;
          float &x = scores[m][i][2 * r + c];
          x = finished(x * (scale * unit_of(i % K_SLOTS)) + zero, s, of.t, slope);
          if (MASKED && !(s < seen_from && visible(s, of.t))) x = NOTHING;
          if (SINKS > 0 && i == 0 && n == 0 && token < SINKS) x = NOTHING;
        }
      }
    }
    softmax.weigh<8>(scores, alpha);
    wait();
    u32 p[NT][8][2];
    const float rescale = weights_of(v, scores, p, unit, g);
    UNROLL for (int m = 0; m < NT; m++) UNROLL for (int i = 0; i < D / 16; i++)
      UNROLL for (int r = 0; r < 4; r++) acc[m][i][r] *= alpha[m][r % 2] * rescale;
    page_values(v, p, acc, g, t);
    __syncwarp();
    copy_values(v_at, next, n + 1 < last, lane);
    next = following;
  }
  softmax.store(call, at, g, t);
  UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++) {
    if (!Column::of(head, tile * N + 8 * n + 2 * t + c, row.a, row.b).live) continue;
    float *to = call.partial + (at + 8 * n + 2 * t + c) * D + 2 * g;
    UNROLL for (int i = 0; i < D / 16; i++) {
      const float x = unit * (float)(1 << (24 - i % 2 * pitch(V_BITS)));
      *(float2 *)(to + 16 * i) = make_float2(acc[n][i][c] * x, acc[n][i][2 + c] * x);
    }
  }
}

// Programs of a multiprocessor, as far as registers go.
constexpr int PROGRAMS = NT > 1 || D > 128 ? 8 : 12;

// Grid (rows, num_kv_heads * TILES, 1 + splits).
extern "C" __global__ void __launch_bounds__(32, PROGRAMS) decode(const __grid_constant__ Call call) {
  __shared__ __align__(128) u8 shared[K_BYTES + V_BYTES + (SHARED ? N * D * 2 : 0)];
  const int lane = threadIdx.x, split = blockIdx.z;
  const int head = blockIdx.y / TILES, tile = blockIdx.y % TILES;
  Row row;
  row.index = blockIdx.x;
  row.q0 = call.query_start_loc[row.index];
  row.b = call.seq_lens[row.index];
  row.a = row.b - (call.query_start_loc[row.index + 1] - row.q0);
  if (row.a >= row.b) return;
  i64 at = (i64)row.index * gridDim.y + blockIdx.y;
  at = (at * gridDim.z + split) * N;
  if (split == 0) return attend_raw(call, row, head, tile, at, lane);
  int first = oldest_seen(row.a) / B;
  const int end = (first_raw(row.b - 1) + B - 1) / B;
  const int each = larger((end - first + call.splits - 1) / call.splits, 2);
  first += (split - 1) * each;
  if (first < end) attend_pages(call, row, head, tile, first, smaller(first + each, end), at, shared, lane);
}
