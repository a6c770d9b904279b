// Reading memory and doing nothing else, for the bandwidth floor.
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

enum { kAhead = 128 };  // lines that are fetched before they are read, whatever pieces they lie in

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
    const int64_t end = n * (id + 1) / of;
    int64_t piece = n * id / of, at = 0, lines = kAhead;  // what is fetched, and lines until then
    for (int64_t i = piece; i < end; i++) {
      const char *p = (const char *)addresses[i];
      for (int64_t o = 0; o < nbytes[i]; o += 256, lines += 4) {
        for (; lines > 0 && piece < end; lines--, at += 64) {
          if (at >= nbytes[piece] && ++piece < end) at = 0;
          if (piece < end) __builtin_prefetch((const char *)addresses[piece] + at, 0, 2);
        }
        if (o + 256 <= nbytes[i]) {
          s0 += *(const vec *)(p + o);
          s1 += *(const vec *)(p + o + 64);
          s2 += *(const vec *)(p + o + 128);
          s3 += *(const vec *)(p + o + 192);
        } else {
          for (int64_t k = o; k + 64 <= nbytes[i]; k += 64) s0 += *(const vec *)(p + k);
        }
      }
    }
    s0 += s1 + s2 + s3;
    for (int k = 0; k < 8; k++) sum += s0[k];
  }
  return sum;
}
