// Vectors of the instruction set that this translation unit is compiled for. Included inside a
// namespace of its own: code compiled for different instruction sets must never be merged.

#if defined(__AVX512F__)
constexpr int W = 16;  // fp32 lanes
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define INLINE __attribute__((always_inline)) inline

// A number that a template takes from an argument.
template <int N>
struct Constant {
  static constexpr int value = N;
};

// Call f with a number from 1 to MOST as a constant.
template <int MOST, class F>
static INLINE void with_constant(int n, F f) {
  if constexpr (MOST > 1)
    if (n < MOST) return with_constant<MOST - 1>(n, f);
  f(Constant<MOST>());
}

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef float vf_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef uint8_t vb_mem __attribute__((vector_size(W), aligned(1), may_alias));

static INLINE vf load(const float *p) { return *(const vf_mem *)p; }
static INLINE void store(float *p, vf x) { *(vf_mem *)p = x; }
static INLINE vf all(float x) { return x - vf{}; }
static INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
static INLINE vf load_ints(const int32_t *p) { return to_float(*(const vi_mem *)p); }

template <class T>
static INLINE constexpr T min_of(T a, T b) { return b < a ? b : a; }
template <class T>
static INLINE constexpr T max_of(T a, T b) { return a < b ? b : a; }

// If one of them is NaN, the second.
static INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

static INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

static INLINE vf half_even(vf x) { return (x + 12582912.0f) - 12582912.0f; }  // |x| < 2^22
static INLINE vf either(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
// A product that is clamped before it is rounded cannot be fused with the addition that rounds it.
static INLINE vf clamp(vf x, vf top) { return vmin(vmax(x, vf{}), top); }  // of NaN: 0

static INLINE vi larger(vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

static INLINE float sum_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < W; i++) s += x[i];
  return s;
#endif
}

static INLINE float largest(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < W; i++) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

#if !defined(__AVX2__)
// fp16 bits of a scalar, round to nearest even, and back.
static INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits = (rest << 13) + 0x38000000u;            // rebias the exponent
  if (rest >= 0x7c00) bits += 0x38000000u;               // infinity, NaN
  if (rest < 0x0400) {                                   // subnormal: exact in fp32
    const float f = (float)rest * 5.9604644775390625e-8f;  // 2^-24
    __builtin_memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

static INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;           // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;          // rounds to infinity
  if (bits < 0x38800000) {                               // subnormal: let the adder round
    float a;
    __builtin_memcpy(&a, &bits, 4);
    a += 0.5f;
    __builtin_memcpy(&bits, &a, 4);
    return sign | (uint16_t)(bits - 0x3f000000);
  }
  bits += 0xc8000fff + ((bits >> 13) & 1);
  return sign | (uint16_t)(bits >> 13);
}
#endif

static INLINE vf load_half(const uint16_t *p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
  vf x;
  for (int i = 0; i < W; i++) x[i] = half_to_float(p[i]);
  return x;
#endif
}

static INLINE void store_half(uint16_t *p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; i++) p[i] = float_to_half(x[i]);
#endif
}

// The low byte of each lane. Compilers take the lanes out one by one.
static INLINE void store_bytes(uint8_t *p, vi x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
  const __m256i first = _mm256_set1_epi32(0x0c080400);
  const __m256i y = _mm256_shuffle_epi8((__m256i)x, first);  // of each half, its four
  _mm_storel_epi64((__m128i *)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(y),
                                                    _mm256_extracti128_si256(y, 1)));
#else
  *(vb_mem *)p = __builtin_convertvector(x, vb);
#endif
}

static INLINE vf load_bf16(const uint16_t *p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
  const vh x = *(const vh_mem *)p;
  return (vf)(__builtin_convertvector(x, vu) << 16);
#endif
}

// W numbers of dtype DT.
template <int DT>
static INLINE vf load_as(const uint8_t *p) {
  if (DT == KIVI_FP32) return load((const float *)p);
  if (DT == KIVI_FP16) return load_half((const uint16_t *)p);
  return load_bf16((const uint16_t *)p);
}

static INLINE vf load_any(int64_t dtype, const uint8_t *p) {
  if (dtype == KIVI_FP32) return load_as<KIVI_FP32>(p);
  if (dtype == KIVI_FP16) return load_as<KIVI_FP16>(p);
  return load_as<KIVI_BF16>(p);
}

static INLINE void store_any(int64_t dtype, uint8_t *p, vf x) {
  if (dtype == KIVI_FP32) {
    store((float *)p, x);
  } else if (dtype == KIVI_FP16) {
    store_half((uint16_t *)p, x);
  } else {
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vi nan = x != x;
    const vu kept = (rounded & ~(vu)nan) | (0x7fc0 & (vu)nan);
    *(vh_mem *)p = __builtin_convertvector(kept, vh);
  }
}

static INLINE int64_t dtype_bytes(int64_t dtype) { return dtype == KIVI_FP32 ? 4 : 2; }

// 1 / x for x > 0. Relative error 1e-6.
static INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  vf r = (vf)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  vf r = (vf)_mm256_rcp_ps((__m256)x);
#else
  return 1.0f / x;
#endif
#if defined(__AVX2__)
  return r * (2.0f - x * r);
#endif
}

// 2^x for x <= 16: 2^-110 and less is 2^-110; a NaN of arithmetic stays. Relative error 2e-7, and 5e-6 if ROUGH.
template <bool ROUGH = false>
static INLINE vf exp2v(vf x) {
  x = vmax(all(-110.0f), x);
  const vf shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer part moves to the low bits
  const vf r = x - (shifted - 12582912.0f);
  vf p;
  if (ROUGH) {
    p = all(9.59327e-3f);
    p = p * r + 5.58825e-2f;
    p = p * r + 2.4023688e-1f;
  } else {
    p = all(1.5403530e-4f);
    p = p * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
  }
  p = p * r + (ROUGH ? 6.9312661e-1f : 6.9314718e-1f);
  p = p * r + 1.0f;
  return (vf)(((vu)shifted << 23) + (vu)p);  // unsigned: of a NaN the sum may wrap
}

static INLINE float exp2s(float x) { return exp2v(all(x))[0]; }

// tanh(x) = sign(x) * (1 - e) / (1 + e), e = exp(-2|x|); for logit soft caps.
static INLINE vf tanhv(vf x) {
  const vi sign = (vi)x & (vi)all(-0.0f);
  const vf size = (vf)((vi)x & 0x7fffffff);
  const vf e = exp2v(size * -2.8853900817779268f);
  const vf t = (1.0f - e) / (1.0f + e);
  // Small x: the difference above cancels; the series does not.
  const vf x2 = size * size;
  const vf series = size * (1.0f + x2 * (-0.33333333f + x2 * (0.13333333f - x2 * 0.053968254f)));
  const vi small = size < 0.1f;
  return (vf)((((vi)series & small) | ((vi)t & ~small)) | sign);
}

#if defined(__AVX2__)
// Of each 128 bits of a and b: what is joined of a, of b, of a, of b; and pairs of that likewise.
template <class JOIN>
static INLINE vf join_ones(vf a, vf b, JOIN join) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)a, y = (__m512)b;
  return join((vf)_mm512_unpacklo_ps(x, y), (vf)_mm512_unpackhi_ps(x, y));
#else
  const __m256 x = (__m256)a, y = (__m256)b;
  return join((vf)_mm256_unpacklo_ps(x, y), (vf)_mm256_unpackhi_ps(x, y));
#endif
}
template <class JOIN>
static INLINE vf join_twos(vf a, vf b, JOIN join) {
#if defined(__AVX512F__)
  const __m512d x = (__m512d)a, y = (__m512d)b;
  return join((vf)_mm512_unpacklo_pd(x, y), (vf)_mm512_unpackhi_pd(x, y));
#else
  const __m256d x = (__m256d)a, y = (__m256d)b;
  return join((vf)_mm256_unpacklo_pd(x, y), (vf)_mm256_unpackhi_pd(x, y));
#endif
}
#endif

// out[i] = the lanes of v[i] joined, in the same order whatever N is; of 32 bits. Several together
// cost little more than one, which is mostly waiting.
template <int N, class T, class JOIN>
static INLINE void join_each(const vf *v, T *out, JOIN join) {
#if defined(__AVX2__)
#pragma GCC unroll 4
  for (int i = 0; i < N; i += 4) {
    const auto at = [&](int k) { return v[min_of(i + k, N - 1)]; };
    vf s = join_twos(join_ones(at(0), at(1), join), join_ones(at(2), at(3), join), join);
#if defined(__AVX512F__)
    s = join(s, (vf)_mm512_shuffle_f32x4((__m512)s, (__m512)s, 0x4e));
    s = join(s, (vf)_mm512_shuffle_f32x4((__m512)s, (__m512)s, 0xb1));
#else
    s = join(s, (vf)_mm256_permute2f128_ps((__m256)s, (__m256)s, 1));
#endif
    __builtin_memcpy(out + i, &s, sizeof(T) * min_of(4, N - i));
  }
#else
  for (int i = 0; i < N; i++) {
    vf x = v[i], y = x;
    for (int k = W / 2; k > 0; k /= 2) {
      for (int j = 0; j < k; j++) y[j] = x[j + k];
      x = join(x, y);
    }
    __builtin_memcpy(out + i, &x, sizeof(T));
  }
#endif
}

template <int N>
static INLINE void sum_each(const vf *v, float *sums) {
  join_each<N>(v, sums, [](vf a, vf b) __attribute__((always_inline)) { return a + b; });
}

// Of integers, exactly.
template <int N, class JOIN>
static INLINE void join_each(const vi *v, int32_t *out, JOIN join) {
  vf as_floats[N];
  __builtin_memcpy(as_floats, v, sizeof(as_floats));
  join_each<N>(as_floats, out, [=](vf a, vf b) __attribute__((always_inline)) {
    return (vf)join((vi)a, (vi)b);
  });
}

template <int N>
static INLINE void sum_each(const vi *v, int32_t *sums) {
  join_each<N>(v, sums, [](vi a, vi b) __attribute__((always_inline)) { return a + b; });
}

template <int N>
static INLINE void largest_each(const vf *v, float *most) {
  join_each<N>(v, most, [](vf a, vf b) __attribute__((always_inline)) { return vmax(a, b); });
}

template <int N>
static INLINE void largest_each(const vi *v, int32_t *most) {
  join_each<N>(v, most, [](vi a, vi b) __attribute__((always_inline)) { return larger(a, b); });
}

// Interleave the low or the high halves of two vectors.
#if defined(__clang__)
#define KIVI_ZIP(name, first)                                   \
  static INLINE vf name(vf a, vf b) {                           \
    vf r;                                                       \
    for (int i = 0; i < W / 2; i++) {                           \
      r[2 * i] = a[first + i];                                  \
      r[2 * i + 1] = b[first + i];                              \
    }                                                           \
    return r;                                                   \
  }
#else
#define KIVI_ZIP(name, first)                                   \
  static INLINE vf name(vf a, vf b) {                           \
    vi mask;                                                    \
    for (int i = 0; i < W / 2; i++) {                           \
      mask[2 * i] = first + i;                                  \
      mask[2 * i + 1] = W + first + i;                          \
    }                                                           \
    return __builtin_shuffle(a, b, mask);                       \
  }
#endif
KIVI_ZIP(zip_low, 0)
KIVI_ZIP(zip_high, W / 2)
#undef KIVI_ZIP

// Transpose W vectors of W lanes in place: log2(W) perfect shuffles.
static INLINE void transpose(vf *v) {
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    vf t[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) {
      t[2 * i] = zip_low(v[i], v[i + W / 2]);
      t[2 * i + 1] = zip_high(v[i], v[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) v[i] = t[i];
  }
}
