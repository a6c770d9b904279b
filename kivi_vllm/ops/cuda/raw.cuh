// Attention over full-precision tokens: ring, tails, sinks, and the step's own.
//
// Compile-time constants: RING, TAIL, tokens of a page of the ring and of a tail; BF16, the model's
// dtype.

#pragma once
#include "softmax.cuh"

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
    const Column c = Column::of(row, head, tile, 8 * n + g);
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
        const Column c = Column::of(row, head, tile, 8 * n + 2 * t + r % 2);
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
    if (!Column::of(row, head, tile, 8 * n + 2 * t + c).live) continue;
    float *to = call.partial + (at + 8 * n + 2 * t + c) * D + 4 * g;
    UNROLL for (int i = 0; i < D / 16; i++)
      *(float2 *)(to + i / 2 * 32 + i % 2 * 2) = make_float2(acc[n][i][c], acc[n][i][2 + c]);
  }
}
