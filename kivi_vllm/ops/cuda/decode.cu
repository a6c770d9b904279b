// Attention of a few query tokens a request over its packed pages and its full-precision tokens.
//
// One warp is a program: it serves one request, one kv head, and one split of the pages; the
// full-precision tokens are a split of their own. What it leaves is what `_decode` of
// triton/decode.py leaves, and `_combine` puts the splits together.
//
// Compile-time constants: MASKED, whether some column does not see all of the pages; and those of
// the headers.

#include "page.cuh"
#include "raw.cuh"

DEV void attend_pages(const Call &call, const Row &row, int head, int tile, const int *list, int first,
                      int last, i64 at, u8 *shared, int lane) {
  const int g = lane / 4, t = lane % 4;
  const u8 *const k = shared, *const v = shared + K_BYTES;
  const u32 k_at = shared_address(k), v_at = shared_address(v);
  // Blocks of the request; or those of a list.
  const auto block_of = [&](int n) {
    n = smaller(n, last - 1);
    return BUDGET > 0 && list ? list[n] : n;
  };
  int block = block_of(first), next_block = block_of(first + 1);
  const u8 *next = page_of(call, row, head, block);
  copy_keys(k_at, next, true, lane);
  copy_values(v_at, next, true, lane);
  next = page_of(call, row, head, next_block);
  Queries queries;
  queries.shared = (uint2 *)(shared + K_BYTES + V_BYTES) + lane;
  float factor[NT][2];
  load_queries(call, row, head, tile, queries, factor, g, t);
  Softmax softmax;
  softmax.begin();
  float acc[NT][D / 16][4] = {};
  float unit = 1.f / (1 << 15);
#pragma unroll 1
  for (int n = first; n < last; n++) {
    const int following_block = block_of(n + 2);
    const u8 *const following = page_of(call, row, head, following_block);
    float scores[NT][8][4], zeros[NT][2], alpha[NT][2];
    wait();
    const float k_unit = page_scores(k, queries, scores, zeros, g, t);
    __syncwarp();
    copy_keys(k_at, next, n + 1 < last, lane);
    UNROLL for (int m = 0; m < NT; m++) UNROLL for (int c = 0; c < 2; c++) {
      const Column of = Column::of(row, head, tile, 8 * m + 2 * t + c);
      const int seen_from = first_raw(of.t);
      const float slope = ALIBI ? call.slopes[of.head] : 0.f;
      const float zero_of_g = zeros[m][c] * factor[m][c], scale = factor[m][c] * k_unit;
      float zero;
      UNROLL for (int i = 0; i < 8; i++) {
        if (16 * i % G == 0) zero = __shfl_sync(~0u, zero_of_g, 16 * i / G * 4 + t);
        UNROLL for (int r = 0; r < 2; r++) {
          const int token = 16 * i + 2 * g + r, s = block * B + token;
          float &x = scores[m][i][2 * r + c];
          x = finished(x * (scale * unit_of(i % K_SLOTS)) + zero, s, of.t, slope);
          if (MASKED && !(s < seen_from && visible(s, of.t))) x = NOTHING;
          if (SINKS > 0 && i == 0 && block == 0 && token < SINKS) x = NOTHING;
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
    block = next_block, next_block = following_block;
    next = following;
  }
  softmax.store(call, at, g, t);
  UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++) {
    if (!Column::of(row, head, tile, 8 * n + 2 * t + c).live) continue;
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
  const Row row = Row::of(call, blockIdx.x);
  if (row.a >= row.b || !Column::of(row, head, tile, 0).live) return;
  int oldest = row.a, newest = row.b - 1, listed = -1;
  const int *list = nullptr;
  if (BUDGET > 0) {
    oldest = newest = position_of(row, tile);
    const i64 token = row.q0 + newest - row.a;
    listed = call.counts[token];
    if (listed >= 0) list = call.blocks + (token * (gridDim.y / TILES) + head) * (BUDGET + 1);
  }
  i64 at = (i64)row.index * gridDim.y + blockIdx.y;
  at = (at * gridDim.z + split) * N;
  if (split == 0) return attend_raw(call, row, head, tile, at, lane);
  int first = listed >= 0 ? 0 : oldest_seen(oldest) / B;
  const int end = listed >= 0 ? listed : (first_raw(newest) + B - 1) / B;
  const int each = larger((end - first + call.splits - 1) / call.splits, 2);
  first += (split - 1) * each;
  if (first < end)
    attend_pages(call, row, head, tile, list, first, smaller(first + each, end), at, shared, lane);
}
