// Vectors of 16-bit numbers, as many as there are in two vectors of fp32.

#if defined(__AVX512F__)
typedef __m512i words;
static INLINE words load_words(const int16_t *p) { return _mm512_loadu_si512(p); }
static INLINE void store_words(int16_t *p, words x) { _mm512_storeu_si512(p, x); }
static INLINE words widen(const uint8_t *p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
}
static INLINE words low_nibbles(words x) { return _mm512_and_si512(x, _mm512_set1_epi16(15)); }
static INLINE words high_nibbles(words x) { return _mm512_srli_epi16(x, 4); }
static INLINE words shifted(words x, int n) { return _mm512_slli_epi16(x, n); }
static INLINE words same_words(int16_t x) { return _mm512_set1_epi16(x); }
// round(a b / 2^15)
static INLINE words multiply(words a, words b) { return _mm512_mulhrs_epi16(a, b); }
static INLINE vi add_products(vi sum, words a, words b) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, a, b);
#else
  return sum + (vi)_mm512_madd_epi16(a, b);
#endif
}
static INLINE words to_words(vf a, vf b) {
  return _mm512_permutexvar_epi64(
      _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7),
      _mm512_packs_epi32(_mm512_cvtps_epi32((__m512)a), _mm512_cvtps_epi32((__m512)b)));
}
#elif defined(__AVX2__)
typedef __m256i words;
static INLINE words load_words(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static INLINE void store_words(int16_t *p, words x) { _mm256_storeu_si256((__m256i *)p, x); }
static INLINE words widen(const uint8_t *p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
}
static INLINE words low_nibbles(words x) { return _mm256_and_si256(x, _mm256_set1_epi16(15)); }
static INLINE words high_nibbles(words x) { return _mm256_srli_epi16(x, 4); }
static INLINE words shifted(words x, int n) { return _mm256_slli_epi16(x, n); }
static INLINE words same_words(int16_t x) { return _mm256_set1_epi16(x); }
static INLINE words multiply(words a, words b) { return _mm256_mulhrs_epi16(a, b); }
static INLINE vi add_products(vi sum, words a, words b) {
  return sum + (vi)_mm256_madd_epi16(a, b);
}
static INLINE words to_words(vf a, vf b) {
  return _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)a), _mm256_cvtps_epi32((__m256)b)),
      _MM_SHUFFLE(3, 1, 2, 0));
}
#else
typedef int16_t words __attribute__((vector_size(4 * W)));
typedef int16_t words_mem __attribute__((vector_size(4 * W), aligned(2), may_alias));
static INLINE words load_words(const int16_t *p) { return *(const words_mem *)p; }
static INLINE void store_words(int16_t *p, words x) { *(words_mem *)p = x; }
static INLINE words widen(const uint8_t *p) {
  words x;
  for (int i = 0; i < 2 * W; i++) x[i] = p[i];
  return x;
}
static INLINE words low_nibbles(words x) { return x & 15; }
static INLINE words high_nibbles(words x) { return x >> 4; }
static INLINE words shifted(words x, int n) { return x << n; }
static INLINE words same_words(int16_t x) { return words{} + x; }
static INLINE words multiply(words a, words b) {
  for (int i = 0; i < 2 * W; i++) a[i] = (int16_t)((a[i] * b[i] + (1 << 14)) >> 15);
  return a;
}
static INLINE vi add_products(vi sum, words a, words b) {
  for (int i = 0; i < W; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
}
static INLINE words to_words(vf a, vf b) {
  int16_t x[2 * W];
  to_fixed([&](int i) { return i == 0 ? a : b; }, 2 * W, 1.0f, x);
  return load_words(x);
}
#endif
