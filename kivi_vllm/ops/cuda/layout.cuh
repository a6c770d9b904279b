// Where things lie in a page, as format.py has it, and how pages are copied.
//
// Compile-time constants: D, K_BITS, V_BITS, G, ZERO_STEP, SINKS of the page format; N, the columns
// of a product, 8 or 16: query heads of a kv head, or those at several positions.

#pragma once
#include "codes.cuh"

constexpr int B = 128;
constexpr int NT = N / 8;  // of products with 8 columns

// format.py
constexpr int K_STEP = 2 * D, K_RANGE = 4 * D, K_CODES = K_RANGE + B / G * D;
constexpr int K_BYTES = K_CODES + 16 * D * K_BITS;
constexpr int V_SCALE = 2 * D, V_CODES = V_SCALE + 2 * B, V_BYTES = V_CODES + 16 * D * V_BITS;

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

// Of quad q of the copied codes, the words of lanes 2g and 2g + 1.
DEV uint2 code_words(const u8 *codes, int q, int g) {
  return words(codes + 64 * q + (8 * g ^ (q & 2) << 4));
}
