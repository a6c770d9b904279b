// The kernels of one instruction set: everything that differs by it, in one namespace.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "units.h"

namespace kivi {
namespace KIVI_ISA {

#include "simd.h"
#include "codes.h"
#include "source.h"
#include "dot.h"
#include "words.h"
#include "prepare.h"
#include "paper.h"
#include "two_level.h"
#include "page.h"
#include "chosen.h"
#include "dot_keys.h"
#include "select_keys.h"
#include "select.h"
#include "raw.h"
#include "encode.h"

struct AttendScratch {
  float q[kMaxNumbers];
  float acc[kMaxNumbers];
  float slopes[kMaxRows];
  union {
    PageScratch page;
    RawScratch raw;
    SelectScratch select;
    KeysScratch keys;
  };
};

static void load_queries(const KiviCall &c, const Unit &u, AttendScratch &s, Queries &q) {
  const int d = (int)c.head_size, group = (int)(c.num_heads / c.num_kv_heads);
  const float log2e = 1.4426950408889634f, scale = (float)c.scale * log2e;
  q.heads = u.g1 - u.g0;
  q.rows = (int)rows_of(u);
  q.start = u.start;
  q.q = s.q;
  q.soft_cap = (float)c.soft_cap * log2e;
  q.window = c.sliding_window;
  q.slopes = nullptr;
  if (c.alibi_slopes) {
    for (int h = 0; h < q.heads; h++) s.slopes[h] = c.alibi_slopes[u.kv_head * group + u.g0 + h];
    q.slopes = s.slopes;
  }
  for (int r = 0; r < q.rows; r++) {
    const int64_t token = u.row->q0 + u.start - u.row->a + r / q.heads;
    const int64_t head = (int64_t)u.kv_head * group + u.g0 + r % q.heads;
    const uint8_t *from =
        c.query.data + token * c.query.token_stride + head * c.query.head_stride;
    float *to = s.q + (int64_t)r * d;
    for (int i = 0; i < d; i += W)
      store(to + i, load_any(c.dtype, from + i * dtype_bytes(c.dtype)) * scale);
  }
}

static INLINE uint8_t *output_of(const KiviCall &c, const Unit &u, int row) {
  const int heads = u.g1 - u.g0;
  const int64_t token = u.row->q0 + u.start - u.row->a + row / heads;
  const int64_t head = (int64_t)u.kv_head * (c.num_heads / c.num_kv_heads) + u.g0 + row % heads;
  return c.output.data + token * c.output.token_stride + head * c.output.head_stride;
}

// What makes sums of weighted values an output: one over the sum of weights, of which the sink
// logit, if there is one, has one too, but no value.
static INLINE float share_of(const KiviCall &c, int64_t head, float max, float sum) {
  if (!c.sink_logits) return 1.0f / sum;
  const float logit = c.sink_logits[head] * 1.4426950408889634f, top = max_of(max, logit);
  const float keep = exp2s(max - top);  // the logit may be far above all scores
  return keep / (sum * keep + exp2s(logit - top));
}

static void write_output(const KiviCall &c, const Unit &u, const State &state, int rows) {
  const int d = (int)c.head_size;
  for (int r = 0; r < rows; r++) {
    uint8_t *out = output_of(c, u, r);
    const int64_t head = (int64_t)u.kv_head * (c.num_heads / c.num_kv_heads) + u.g0 + r % (u.g1 - u.g0);
    const float share = share_of(c, head, state.max[r], state.sum[r]);
    for (int i = 0; i < d; i += W)
      store_any(c.out_dtype, out + i * dtype_bytes(c.out_dtype),
                load(state.acc + (int64_t)r * d + i) * share);
  }
}

static void attend(const KiviCall &c, const Unit &u, uint8_t *scratch) {
  AttendScratch &s = *(AttendScratch *)scratch;
  const int64_t d = c.head_size;
  Queries q;
  load_queries(c, u, s, q);
  State state;
  state.acc = s.acc;
  for (int r = 0; r < q.rows; r++) {
    state.max[r] = -__builtin_inff();
    state.sum[r] = 0.0f;
  }
  __builtin_memset(s.acc, 0, sizeof(float) * q.rows * d);
  if (u.block_lo < u.block_hi) {
    with_codes(c, [&](auto k, auto v, auto two_level) {
      attend_pages<decltype(k), decltype(v), two_level.value>(c, u, q, s.page, state);
    });
    if (c.two_level) rotate_back(s.acc, q.rows, (int)d);
  }
  if (q.window || q.slopes) {  // positions count
    attend_raw(c, u, 0, u.sink_lo, u.sink_hi, q, s.raw, state);
    attend_raw(c, u, 0, u.raw_lo, u.raw_hi, q, s.raw, state);
  } else {
    attend_raw(c, u, (int)(u.sink_hi - u.sink_lo), u.raw_lo, u.raw_hi, q, s.raw, state);
  }
  if (!u.partial) return write_output(c, u, state, q.rows);
  float *out = u.partial;
  __builtin_memcpy(out, state.max, sizeof(float) * q.rows);
  __builtin_memcpy(out + q.rows, state.sum, sizeof(float) * q.rows);
  __builtin_memcpy(out + 2 * q.rows, s.acc, sizeof(float) * q.rows * d);
}

static void combine(const KiviCall &c, const Unit &u, int parts, uint8_t *scratch) {
  AttendScratch &s = *(AttendScratch *)scratch;
  const int rows = (int)rows_of(u), d = (int)c.head_size;
  const int64_t size = partial_floats(u, d);
  State state;
  state.acc = s.acc;
  for (int r = 0; r < rows; r++) {
    float m = -__builtin_inff(), sum = 0.0f;
    float *acc = s.acc + (int64_t)r * d;
    __builtin_memset(acc, 0, sizeof(float) * d);
    for (int p = 0; p < parts; p++) m = max_of(m, u.partial[p * size + r]);
    for (int p = 0; p < parts; p++) {
      const float *part = u.partial + p * size;
      const float weight = exp2s(part[r] - m);
      sum += weight * part[rows + r];
      for (int i = 0; i < d; i += W)
        store(acc + i, load(acc + i) + weight * load(part + 2 * rows + (int64_t)r * d + i));
    }
    state.max[r] = m;
    state.sum[r] = sum;
  }
  write_output(c, u, state, rows);
}

static void estimate(const KiviCall &c, const Unit &whole, float *out, int64_t stride,
                     uint8_t *scratch) {
  AttendScratch &s = *(AttendScratch *)scratch;
  const int most = (int)most_rows(c.head_size);
  const auto rows_together = [&](auto f) {
    Unit u = whole;
    for (; u.g0 < whole.g1; u.g0 = u.g1) {
      u.g1 = min_of(whole.g1, u.g0 + most);
      Queries q;
      load_queries(c, u, s, q);
      f(u, q.rows);
    }
  };
  if (c.estimate_channels) {
    const int d = (int)c.head_size;
    const uint8_t *newest = page_of(c, *whole.row, whole.kv_head, whole.raw_from / kBlock - 1);
    const uint16_t *step = (const uint16_t *)(newest + TwoLevelLayout(c).k_step);
    __builtin_memset(s.keys.power, 0, sizeof(float) * d);
    rows_together([&](const Unit &, int rows) { add_power(s.q, rows, d, step, s.keys.power); });
    choose_quads(c, s.keys.power, s.keys.chosen);
    plan_fetching(c, s.keys);
  }
  rows_together([&](const Unit &u, int rows) {
    estimate(c, u, s.q, rows, out + (u.g0 - whole.g0) * estimates_of_page(c) * stride, stride,
             s.select, s.keys);
  });
}

static void encode(const KiviCall &c, const KiviRow &row, int64_t block, int64_t kv_head,
                   uint8_t *scratch) {
  encode_block(c, row, block, kv_head, *(EncodeScratch *)scratch);
}

#if !defined(KIVI_AMX)
static void begin() {}
static void end() {}
#endif

constexpr int64_t kScratch =
    sizeof(AttendScratch) > sizeof(EncodeScratch) ? sizeof(AttendScratch) : sizeof(EncodeScratch);

extern const Kernels kernels;
const Kernels kernels = {KIVI_NAME, kScratch, attend, combine, encode, kRows, estimate, weigh, begin, end};

}  // namespace KIVI_ISA
}  // namespace kivi
