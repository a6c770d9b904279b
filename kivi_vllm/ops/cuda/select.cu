// Which pages generated tokens read: select.py. `score` estimates, for every head, how much each page
// weighs; `choose` adds that up and lists the best pages.
//
// Compile-time constants: PAGES, that a token has at the most; and those of the headers.

#include "page.cuh"

// By the ranges of a page's groups, of which the threads with this g have group g.
DEV void page_estimates(const u8 *k, const Queries &q, float (*x)[2], int g, int t) {
  const float unit = unit_of_steps(k, t);
  const u32 by = half2(inverse(unit), inverse(unit));
  float low[NT][4] = {}, zeros[NT][4] = {}, scales[NT][4] = {};
  UNROLL for (int s = 0; s < D / 16; s++) {
    const Ranges of = Ranges::of(k, 4 * s + t, by, g);
    const u32 z = of.group;
    UNROLL for (int n = 0; n < NT; n++) {
      const uint2 query = q.of(n, s);
      // With half the radius: q + |q| / 2.
      const u32 wide_even = fma2(query.x & 0x7fff7fffu, 0x38003800u, query.x);
      const u32 wide_odd = fma2(query.y & 0x7fff7fffu, 0x38003800u, query.y);
      mma(low[n], of.low_even, 0, of.low_odd, 0, query.x, query.y);
      mma(zeros[n], z & 0x00f000f0u, 0, z >> 8 & 0x00f000f0u, 0, mul2(query.x, of.step_even),
          mul2(query.y, of.step_odd));
      mma(scales[n], z & 0x000f000fu, 0, z >> 8 & 0x000f000fu, 0, mul2(wide_even, of.step_even),
          mul2(wide_odd, of.step_odd));
    }
  }
  const float zero = unit * (float)(1 << 20) * ZERO_STEP;
  const float half = unit * (float)(1 << 23) * top(K_BITS);
  UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++)
    x[n][c] = low[n][c] + zeros[n][c] * zero + scales[n][c] * half;
}

// Whether a token chooses: whether it generates, and has more whole pages than it may read. These are
// `whole` ones from `first` on.
DEV bool chooses(const Call &call, const Row &row, int t, int &first, int &whole) {
  first = oldest_seen(t) / B;
  whole = larger(first_raw(t) / B - first, 0);
  return call.generated[row.index] && whole > BUDGET;
}

// Grid (rows, num_kv_heads * TILES, parts of the pages); a warp is a program.
extern "C" __global__ void __launch_bounds__(32) score(const __grid_constant__ Call call) {
  constexpr int BYTES = (K_CODES + 127) / 128 * 128;
  __shared__ __align__(128) u8 shared[2 * BYTES + (SHARED ? N * D * 2 : 0)];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y / TILES, tile = blockIdx.y % TILES;
  const Row row = Row::of(call, blockIdx.x);
  const int position = position_of(row, tile);
  int first, whole;
  if (position >= row.b || !chooses(call, row, position, first, whole)) return;
  const int each = (whole + gridDim.z - 1) / gridDim.z, start = blockIdx.z * each;
  const int end = smaller(start + each, whole);
  if (start >= end) return;
  const auto fetch = [&](int n) {
    if (n < end)
      copy<K_CODES, false>(shared_address(shared) + n % 2 * BYTES,
                           page_of(call, row, head, first + n), lane);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  fetch(start);
  Queries queries;
  queries.shared = (uint2 *)(shared + 2 * BYTES) + lane;
  float factor[NT][2];
  load_queries(call, row, head, tile, queries, factor, g, t);
  const i64 at = ((i64)row.q0 + position - row.a) * (gridDim.y / TILES) + head;
  float2 *const out = (float2 *)call.estimates + at * GQA * call.most_pages;
#pragma unroll 1
  for (int n = start; n < end; n++) {
    fetch(n + 1);
    wait();
    float x[NT][2];
    page_estimates(shared + n % 2 * BYTES, queries, x, g, t);
    __syncwarp();
    UNROLL for (int m = 0; m < NT; m++) UNROLL for (int c = 0; c < 2; c++) {
      const float product = x[m][c] * factor[m][c];
      const bool finite = fabsf(product) < __int_as_float(0x7f800000) && g < B / G;
      const float score = finite ? finished(product, 0, 0, 0.f) : NOTHING;
      const float most = most_of_column(score);
      const float mass = sum_of_column(finite ? power2(score - most) : 0.f);
      const int of = tile % TOKEN_TILES * N + 8 * m + 2 * t + c;
      if (g == 0 && of < GQA) out[(i64)of * call.most_pages + n] = make_float2(most, mass);
    }
  }
}

// ------------------------------------------------------------------- the choice

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Together {  // of the threads of a program
  float numbers[WARPS];
  int counts[WARPS];
};

DEV float most_of_all(float x, Together &shared) {
  UNROLL for (int i = 1; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.numbers[threadIdx.x / 32] = x;
  __syncthreads();
  UNROLL for (int i = 0; i < WARPS; i++) x = fmaxf(x, shared.numbers[i]);
  return x;
}

DEV float sum_of_all(float x, Together &shared) {
  UNROLL for (int i = 1; i < 32; i *= 2) x += __shfl_xor_sync(~0u, x, i);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.numbers[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.f;
  UNROLL for (int i = 0; i < WARPS; i++) x += shared.numbers[i];
  return x;
}

// How many threads before this one have it true; `total`: how many of all.
DEV int count_before(bool is, int &total, Together &shared) {
  const u32 of_warp = __ballot_sync(~0u, is);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.counts[threadIdx.x / 32] = __popc(of_warp);
  __syncthreads();
  int before = __popc(of_warp & ((1u << threadIdx.x % 32) - 1u));
  total = 0;
  UNROLL for (int i = 0; i < WARPS; i++) {
    if (i < threadIdx.x / 32) before += shared.counts[i];
    total += shared.counts[i];
  }
  return before;
}

// What the pages of this thread weigh: their part of the softmax of every head.
DEV void add_weights(const float2 *estimates, int most_pages, int whole, float *w, Together &shared) {
  for (int p = threadIdx.x; p < whole; p += THREADS) w[p] = 0.f;
  for (int h = 0; h < GQA; h++, estimates += most_pages) {
    float most = NOTHING, sum = 0.f;
    for (int p = threadIdx.x; p < whole; p += THREADS) most = fmaxf(most, estimates[p].x);
    most = most_of_all(most, shared);
    if (most == NOTHING) continue;
    for (int p = threadIdx.x; p < whole; p += THREADS)
      sum += estimates[p].y * power2(estimates[p].x - most);
    sum = sum_of_all(sum, shared);
    for (int p = threadIdx.x; p < whole; p += THREADS)
      w[p] += estimates[p].y * power2(estimates[p].x - most) / sum;
  }
}

// The largest number that BUDGET of the pages' weights, as whole numbers, are not below.
DEV u32 threshold(const u32 *w, int whole, Together &shared) {
  u32 least = 0;
  for (int bit = 30; bit >= 0; bit--) {
    const u32 trial = least | 1u << bit;
    float count = 0.f;
    for (int p = threadIdx.x; p < whole; p += THREADS) count += w[p] >= trial ? 1.f : 0.f;
    if (sum_of_all(count, shared) >= (float)BUDGET) least = trial;
  }
  return least;
}

// Grid (rows, num_kv_heads, tokens of a request).
extern "C" __global__ void __launch_bounds__(THREADS) choose(const __grid_constant__ Call call) {
  __shared__ float w[PAGES];
  __shared__ Together shared;
  const int head = blockIdx.y;
  const Row row = Row::of(call, blockIdx.x);
  const int position = row.a + blockIdx.z;
  if (position >= row.b) return;
  int first, whole;
  const bool listed = chooses(call, row, position, first, whole);
  const bool cut = first_raw(position) % B > 0;
  const i64 token = row.q0 + position - row.a, at = token * gridDim.y + head;
  if (threadIdx.x == 0) {
    if (head == 0) call.counts[token] = listed ? BUDGET + cut : -1;
    if (call.generated[row.index]) {
      const int seen = larger((first_raw(position) + B - 1) / B - first, 0);
      call.counted[2 * at] += seen;
      call.counted[2 * at + 1] += listed ? BUDGET + cut : seen;
    }
  }
  if (!listed) return;
  add_weights((const float2 *)call.estimates + at * GQA * call.most_pages, call.most_pages, whole, w,
              shared);
  if ((whole - 1) % THREADS == threadIdx.x) w[whole - 1] = __int_as_float(0x7f800000);
  const u32 *const keys = (const u32 *)w;  // weights are not negative, and so in the same order
  const u32 least = threshold(keys, whole, shared);
  float more = 0.f;
  for (int p = threadIdx.x; p < whole; p += THREADS) more += keys[p] > least ? 1.f : 0.f;
  const int of_least = BUDGET - (int)sum_of_all(more, shared);  // the older ones
  int *const to = call.blocks + at * (BUDGET + 1);
  int taken = 0, equal = 0;
  for (int start = 0; start < whole; start += THREADS) {
    const int p = start + threadIdx.x;
    const u32 key = p < whole ? keys[p] : 0;
    int equals, takes;
    const bool is_least = p < whole && key == least;
    const int before = equal + count_before(is_least, equals, shared);
    const bool take = p < whole && (key > least || is_least && before < of_least);
    const int place = taken + count_before(take, takes, shared);
    if (take) to[place] = first + p;
    equal += equals;
    taken += takes;
  }
  if (cut && threadIdx.x == 0) to[BUDGET] = first + whole;
}
