// Reading memory and doing nothing else, for the bandwidth floor.
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

// Read `nbytes[i]` bytes from `addresses[i]`, one after the other, each thread an equal share of
// the ranges: the least time in which these bytes can be read. Returns their sum, as a proof.
uint64_t read_ranges(const int64_t *addresses, const int64_t *nbytes, int64_t n, int64_t threads) {
  uint64_t sum = 0;
#pragma omp parallel num_threads((int)threads) reduction(+ : sum)
  {
#if defined(_OPENMP)
    const int64_t id = omp_get_thread_num(), of = omp_get_num_threads();
#else
    const int64_t id = 0, of = 1;
#endif
    typedef uint64_t vec __attribute__((vector_size(64), aligned(8), may_alias));
    vec s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (int64_t i = n * id / of; i < n * (id + 1) / of; i++) {
      const char *p = (const char *)addresses[i];
      const char *next = (const char *)addresses[i + 1 < n ? i + 1 : i];
      const int64_t size = nbytes[i];
      int64_t o = 0;
      for (; o + 256 <= size; o += 256) {
        const char *ahead = o + 4096 < size ? p + o + 4096 : next + (o + 4096 - size);
        for (int k = 0; k < 256; k += 64) __builtin_prefetch(ahead + k, 0, 3);
        s0 += *(const vec *)(p + o);
        s1 += *(const vec *)(p + o + 64);
        s2 += *(const vec *)(p + o + 128);
        s3 += *(const vec *)(p + o + 192);
      }
      for (; o + 64 <= size; o += 64) s0 += *(const vec *)(p + o);
    }
    s0 += s1 + s2 + s3;
    for (int k = 0; k < 8; k++) sum += s0[k];
  }
  return sum;
}
