// The fields of a page of recipe "best": two_level.encode_keys and encode_values bit for bit.
//
// What is rounded to a whole number is cut to a range before, so that no product is fused with the
// addition that rounds it; sums are of whole numbers that the arithmetic holds exactly.

typedef double vd __attribute__((vector_size(W * 8)));
#define WIDE(x) __builtin_convertvector(x, vd)
#define NARROW(x) __builtin_convertvector(x, vf)

// two_level.fit: scale and zero of smaller squared error, of W groups of n numbers in rows
// `columns` apart; `scale` begins as that of the whole span.
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

constexpr float kLimit = 1 << 20;     // LIMIT of two_level.py
constexpr float kMeanSteps = 1024;    // MEAN_STEPS
constexpr float kMomentSteps = 8;     // MOMENT_STEPS
constexpr float kSparePower = 1.5f;  // SPARE_POWER

static INLINE vf between(vf x, float most) { return vmin(vmax(x, all(-most)), all(most)); }
static INLINE vf whole(vf x, float most) { return half_even(between(x, most)); }
static INLINE vf root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf y;
  for (int i = 0; i < W; i++) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

// Numbers as they are after a rounding to fp16, which are stored at `to` too.
static INLINE vf keep_half(vf x, uint16_t *to) {
  store_half(to, x);
  return load_half(to);
}

// two_level.encode_keys of s.x [128][d].
template <class CODES>
static void encode_keys(EncodeScratch &s, int d, int group, uint16_t *low, uint16_t *step,
                        uint8_t *range) {
  const float top = (float)CODES::top, r = CODES::zero_step, levels = 15, kMax = 65504.0f;
  const int groups = kBlock / group;
  const vd middle_code = WIDE(all(top / 2));
  for (int i = 0; i < d; i += W) {
    vf scale[kKGroups], zero[kKGroups];
    vf least_zero = all(__builtin_inff()), largest_scale = vf{};
    vi nan = {};
    for (int g = 0; g < groups; g++) {
      const float *x = s.x + g * group * d + i;
      vf from, to;
      nan |= span_of(x, group, d, &from, &to);
      const vf spread = either(to == from, vf{}, to - from);
      scale[g] = spread / top;
      fit(x, group, d, top, from, spread, &scale[g], &zero[g]);
      scale[g] = vmin(scale[g], all(60000.0f));  // MOST_SCALE
      zero[g] = between(zero[g], kMax);
      least_zero = vmin(zero[g], least_zero);
      largest_scale = vmax(scale[g], largest_scale);
    }
    const vf start = keep_half(least_zero, low + i);
    vf span = zero[0] - start;
    for (int g = 1; g < groups; g++) span = vmax(span, zero[g] - start);
    const vf most = vmax(largest_scale / levels, span / (levels * r));
    const vf unit = keep_half(vmax(most, all(1.0f / (1 << 24))), step + i);
    for (int g = 0; g < groups; g++) {
      const vf u = vmax(all(1.0f), vmin(half_even(clamp(scale[g] / unit, all(levels + 1))), all(levels)));
      const vd middle = WIDE(zero[g]) + WIDE(scale[g]) * middle_code - WIDE(u * unit) * middle_code;
      const vf above = NARROW(middle - WIDE(start));
      const vf z = half_even(clamp(above / (unit * r), all(levels)));
      const vf by = u * unit, from = start + z * (unit * r), inverse = 1.0f / by;
      store_bytes(range + g * d + i, __builtin_convertvector(u + 16.0f * z, vi) & ~nan);
      for (int t = g * group; t < (g + 1) * group; t++) {
        const vf y = clamp((load(s.x + t * d + i) - from) * inverse, all(top));
        store_bytes(s.codes + t * d + i, __builtin_convertvector(half_even(y), vi) & ~nan);
      }
    }
    store_half(low + i, either(nan, all(__builtin_nanf("")), start));
    store_half(step + i, either(nan, vf{}, unit));
  }
}

// two_level.encode_values of s.x [d][128], rotated; `u` are its numbers in steps.
template <class CODES>
static void encode_values(EncodeScratch &s, int d, int sinks, uint16_t *scale_out,
                          uint16_t *mean_out) {
  const float top = (float)CODES::top, steps = 1023, kMax = 65504.0f;
  const float gauss = (float)(CODES::gauss_step / __builtin_sqrt((double)d));
  alignas(64) float power[kBlock], size[kBlock], scale[kBlock];
  vf sums[kMaxHead];  // of a channel's directions
  for (int c = 0; c < d; c++) sums[c] = vf{};
  vi lane;
  for (int l = 0; l < W; l++) lane[l] = l;
  const auto placed = [&](vf u, vf factor) __attribute__((always_inline)) {
    return whole(u * factor, kLimit);
  };
  for (int t = 0; t < kBlock; t += W) {
    vf most = {};
    vi nan = {};
    for (int c = 0; c < d; c++) {
      const vf x = load(s.x + c * kBlock + t);
      nan |= x != x;
      most = vmax(most, vmax(x, -x));
    }
    const vi finite = (most < __builtin_inff()) & ~nan;
    const vi good = finite & (most > 0x1p-60f);
    most = either(good, most, all(1.0f));
    const vf factor = steps / most;
    vi squares = {};
    for (int c = 0; c < d; c++) {
      const vf u = either(good, whole(load(s.x + c * kBlock + t) * factor, steps), vf{});
      store(s.u + c * kBlock + t, u);
      squares += __builtin_convertvector(u * u, vi);
    }
    const vf p = to_float(squares), first = either(good, root(p) * gauss, all(1.0f));
    store(power + t, p);
    // A size that is not good says so: infinity if it is not finite, else 0.
    store(size + t, either(good, most, either(finite, vf{}, all(__builtin_inff()))));
    store(scale + t, first);
    const vf to_place = kMeanSteps / first;
    const vi counts = lane + t >= sinks;
    for (int c = 0; c < d; c++)
      sums[c] += either(counts, placed(load(s.u + c * kBlock + t), to_place), vf{});
  }
  // Means of the channels.
  alignas(64) float mean[kMaxHead], at[kMaxHead], coarse[kMaxHead];
  double taken = 0, coarse_squares = 0;
  const float count = kMeanSteps * (float)(kBlock - sinks);
  for (int c = 0; c < d; c++) {
    mean[c] = sum_of(sums[c]) / count;
    const float m = whole(all(mean[c] * kMomentSteps), kLimit)[0];
    taken += (double)m * m;
  }
  const float part = (float)(CODES::gauss_step * CODES::gauss_step /
                             (double)(kMomentSteps * kMomentSteps * d));
  const vf left = 1.0f - vmin(all((float)taken * part), all(15.0f / 16));
  const vf smaller = root(vmin(left * kSparePower, all(1.0f)));
  for (int c = 0; c < d; c += W) {
    const vf m = keep_half(load(mean + c) / smaller, mean_out + c);
    const vf h = whole(m * kMomentSteps, kLimit) - kMomentSteps * top / 2;
    store(mean + c, m - top / 2);
    store(at + c, whole(m * kMeanSteps, kLimit) - kMeanSteps * top / 2);
    store(coarse + c, h);
  }
  for (int c = 0; c < d; c++) coarse_squares += (double)coarse[c] * coarse[c];
  const int all_squares = (int)coarse_squares;
  for (int t = 0; t < kBlock; t += W) {
    const vf p = load(power + t), begin = load(scale + t) * smaller;
    vi along_mean = {};
    for (int c = 0; c < d; c++)
      along_mean += __builtin_convertvector(load(s.u + c * kBlock + t), vi) * (int)coarse[c];
    // Sums of u times what the codes stand for, in steps of 1 / kMomentSteps, and of its square.
    vf along, square;
    const auto moments = [&](vf scale) __attribute__((always_inline)) {
      const vf to_place = kMeanSteps / scale;
      vf cu = {}, cc = {}, ch = {};
      for (int c = 0; c < d; c++) {
        const vf u = load(s.u + c * kBlock + t);
        const vf code =
            half_even(clamp((placed(u, to_place) - at[c]) * (1.0f / kMeanSteps), all(top)));
        cu += code * u;
        cc += code * code;
        ch += code * coarse[c];
      }
      const auto ints = [](vf x) __attribute__((always_inline)) {
        return __builtin_convertvector(x, vi);
      };
      const int m = (int)kMomentSteps;
      along = to_float(ints(cu) * m + along_mean);
      square = to_float(ints(cc) * (m * m) + ints(ch) * (2 * m) + all_squares);
    };
    vf fitted = begin;
    for (int round = 0; round < kFitRounds; round++) {
      moments(fitted);
      const vi useful = (along > 0.0f) & (square > 0.0f);
      const vf next = along * kMomentSteps / either(useful, square, all(1.0f));
      fitted = either(useful, next, fitted);
      fitted = vmin(vmax(fitted, begin * 0.25f), begin * 4.0f);
    }
    moments(fitted);
    along = along * fitted;
    const vi useful = along > 0.0f;
    const vf ratio = either(useful, p * kMomentSteps / either(useful, along, all(1.0f)), all(1.0f));
    const vf most = load(size + t);
    const vi good = (most > 0.0f) & (most < __builtin_inff());
    vf out = fitted * vmin(vmax(ratio, all(1.0f)), all(1.5f)) *
             (either(good, most, all(1.0f)) / steps);
    out = either(good, vmin(out, all(kMax)), vf{});
    out = either(most == __builtin_inff(), all(__builtin_nanf("")), out);
    out = keep_half(out, scale_out + t);
    const vi positive = out > 0.0f;
    const vf inverse = either(positive, 1.0f / either(positive, out, all(1.0f)), vf{});
    for (int c = 0; c < d; c++) {
      const vf y = between(load(s.x + c * kBlock + t) * inverse, kLimit) - mean[c];
      store_bytes(s.codes + c * kBlock + t,
                  __builtin_convertvector(half_even(clamp(y, all(top))), vi) & positive);
    }
  }
}
#undef WIDE
#undef NARROW

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
