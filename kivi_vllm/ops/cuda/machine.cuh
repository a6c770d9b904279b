// Instructions that CUDA C++ has no names for, and what all kernels here need of a warp.

#pragma once
#include "constants.cuh"  // kernels.py makes it: after what the compiler itself includes

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define MEMBER __device__ __forceinline__
#define DEV static MEMBER
#define UNROLL _Pragma("unroll")

#define NOTHING __int_as_float(0xff800000)  // minus infinity
constexpr float LOG2E = 1.4426950408889634f;

DEV int larger(int a, int b) { return a > b ? a : b; }
DEV int smaller(int a, int b) { return a < b ? a : b; }

DEV u32 mul2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

DEV u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// x & a | b, in one instruction.
DEV u32 and_or(u32 x, u32 a, u32 b) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(x), "r"(a), "r"(b));
  return d;
}

DEV u32 max2(u32 a, u32 b) {
  u32 d;
  asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Two numbers as fp16, the first in the low half.
DEV u32 half2(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Two numbers in the model's dtype.
DEV u32 model2(float low, float high) {
  if (!BF16) return half2(low, high);
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

DEV float number(u16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
  return f;
}

DEV float low_half(u32 x) { return number((u16)x); }
DEV float high_half(u32 x) { return number((u16)(x >> 16)); }
DEV float low_model(u32 x) { return BF16 ? __uint_as_float(x << 16) : low_half(x); }
DEV float high_model(u32 x) { return BF16 ? __uint_as_float(x & 0xffff0000u) : high_half(x); }

DEV float power2(float x) {
  float f;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(x));
  return f;
}

DEV float inverse(float x) {
  float f;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(x));
  return f;
}

DEV void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEV void mma_model(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (!BF16) return mma(c, a0, a1, a2, a3, b0, b1);
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Of an 8 x 8 matrix of 16-bit numbers, of which thread 4g + t has columns 2t, 2t + 1 of row g.
DEV u32 transposed(u32 x) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
  return d;
}

// Until all copies but those of the newest group have come, of all threads.
DEV void wait() {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncwarp();
}

DEV u32 shared_address(const void *x) { return (u32)__cvta_generic_to_shared(x); }

DEV u32 word(const u8 *at) { return *(const u32 *)at; }
DEV uint2 words(const u8 *at) { return *(const uint2 *)at; }

// The largest, or the sum, of the threads that have the same column of a product.
DEV float most_of_column(float x) {
  UNROLL for (int i = 4; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

DEV float sum_of_column(float x) {
  UNROLL for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}
