// What depends on the bits of a code: where it lies in a page, and what it can be. The rule, and the
// same names, are in ops/codes.py.

#pragma once
#include "machine.cuh"

#define OF_BITS __host__ __device__ constexpr

OF_BITS int top(int bits) { return (1 << bits) - 1; }
OF_BITS int slots(int bits) { return 8 / bits; }
OF_BITS int pitch(int bits) { return 8 / slots(bits); }
OF_BITS int spare(int bits) { return pitch(bits) - bits; }
OF_BITS int key_units(int bits) { return 8 / slots(bits); }
OF_BITS int value_quads(int bits) { return 32 / (slots(bits) / 2); }

// Of so many vectors of a page those that are not in spare bits.
OF_BITS int stored(int vectors, int bits) { return vectors - vectors / 4 * spare(bits); }

// Of both halves of a word the code in a slot, where it is.
OF_BITS u32 mask_of(int bits, int slot) { return (u32)top(bits) * 0x10001u << slot * pitch(bits); }

constexpr int K_SLOTS = slots(K_BITS), K_UNITS = key_units(K_BITS);
constexpr int K_STORED = stored(K_UNITS, K_BITS);
constexpr int V_SLOTS = slots(V_BITS), V_STEPS = value_quads(V_BITS) / 4;  // of 4 quads
constexpr int V_QUADS = stored(value_quads(V_BITS), V_BITS);

// The words whose codes' bits are the spare ones of these; the masks cut off what is beside them.
DEV uint2 spare_words(uint2 a, uint2 b, uint2 c) {
  const auto of = [](u32 x, u32 y, u32 z) {
    return (x >> 3 & 0x11111111u) | (y >> 2 & 0x22222222u) | (z >> 1 & 0x44444444u);
  };
  return make_uint2(of(a.x, b.x, c.x), of(a.y, b.y, c.y));
}
