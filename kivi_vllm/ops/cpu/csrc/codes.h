// What depends on the bits of a code: where it lies in a page, and what it can be. The rule, and the
// same names, are in ops/codes.py; Triton has them in ops/triton/codes.py.
//
// Codes come in vectors of 64 bytes: 16 lanes of 4 numbers that are summed over, a "quad". A byte
// holds a code in each of its slots. A tile is 32 numbers of the result (tokens of K, channels of
// V): a pair of slots, of which slot 0 has the first 16.

// All formats: bits of keys and of values, and whether the page is that of recipe "best".
#define KIVI_FORMATS(FORMAT) \
  FORMAT(2, 2, true)         \
  FORMAT(3, 2, true)         \
  FORMAT(3, 3, true)         \
  FORMAT(4, 3, true)         \
  FORMAT(4, 4, true)         \
  FORMAT(2, 2, false)        \
  FORMAT(4, 4, false)

// Bytes of a page's codes of one side.
constexpr int code_bytes(int64_t bits, int head_size) { return kBlock * head_size * (int)bits / 8; }

// As much of a vector of codes as is worked on together. Each byte is a number of its own, but
// instructions shift no less than 16 bits.
#if defined(__AVX512F__)
typedef uint16_t vc __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef uint16_t vc __attribute__((vector_size(32)));
#else
typedef uint16_t vc;  // one byte of it
#endif

static INLINE vc load_codes(const uint8_t *p) {
#if defined(__AVX2__)
  typedef uint16_t vc_mem __attribute__((vector_size(sizeof(vc)), aligned(1), may_alias));
  return *(const vc_mem *)p;
#else
  return *p;
#endif
}

// The vectors of `quads` quads of a tile, from quad `first` on, and which pair of slots the tile has
// in them.
template <class CODES, int PAIR>
struct Run {
  const uint8_t *vectors;
  int first, quads;

  // The codes of one vector, or of a part of it, from its byte `at` on: slot 0's as they are, slot
  // 1's times CODES::slot1.
  INLINE void read(int64_t at, vc (&slot)[2]) const {
    constexpr int pitch = CODES::pitch;
    constexpr uint16_t all_bytes = 0x0101;
    vc x = load_codes(vectors + at);
    if (PAIR) x = x >> (2 * pitch * PAIR);
    slot[0] = x & (uint16_t)(CODES::top * all_bytes);
    slot[1] = (CODES::in_place ? x : (vc)(x >> pitch)) &
              (uint16_t)(CODES::top * CODES::slot1 * all_bytes);
  }
};

// The last quarter of a tile of 3-bit codes, whose bits are the spare ones of three vectors each.
// APART: bytes from one of them to the next; 0: `apart`. Those of the next quad follow (APART), or
// lie one vector on.
template <class CODES, int APART>
struct SpareRun {
  const uint8_t *vectors;
  int first, quads, apart;

  INLINE void read(int64_t at, vc (&slot)[2]) const {
    const uint8_t *x = vectors + at + (APART ? 2 * (at & ~63) : 0);
    const int step = APART ? APART : apart;
    const vc codes = (load_codes(x) >> 3 & (uint16_t)0x1111) |
                     (load_codes(x + step) >> 2 & (uint16_t)0x2222) |
                     (load_codes(x + 2 * step) >> 1 & (uint16_t)0x4444);
    slot[0] = codes & (uint16_t)0x0707;
    slot[1] = codes >> 4 & (uint16_t)0x0707;
  }
};

template <int BITS>
struct Codes {
  static constexpr int bits = BITS;
  static constexpr int top = (1 << BITS) - 1;          // the largest code
  static constexpr int slots = 8 / BITS;               // of a byte
  static constexpr int pitch = 8 / slots;              // bits from one slot to the next
  static constexpr int spare = pitch - BITS;           // bits of a slot above its code
  static constexpr int pairs = slots / 2;              // of slots
  static constexpr int key_tokens = 16 * slots;        // whose codes share vectors
  static constexpr int key_units = spare ? 3 : kBlock / key_tokens;  // of such vectors, stored
  static constexpr int value_tokens = kBlock / pairs;  // that lie one after the other
  static constexpr int value_quads = value_tokens / 4;
  static constexpr int stored_quads = spare ? value_quads / 4 * 3 : value_quads;
  // Numbers of up to 4 bits may be multiplied where they lie: sums of 16 bits hold the products.
  static constexpr bool in_place = BITS + pitch <= 4;
  static constexpr int slot1 = in_place ? 1 << pitch : 1;
  static constexpr int zero_step = BITS == 2 ? 1 : BITS == 3 ? 4 : 8;
  static constexpr double gauss_step = BITS == 2 ? 0.9957 : BITS == 3 ? 0.5860 : 0.3352;

  // A tile of keys, or of values: calls f with each Run of it.
  struct Keys {
    const uint8_t *vectors;
    int quads;
    bool second;  // of two pairs of slots
    bool last;    // of the page's tiles

    INLINE Keys(const uint8_t *codes, int head_size, int tile)
        : vectors(codes + tile / pairs * head_size * 16), quads(head_size / 4),
          second(tile % pairs != 0), last(tile == 3) {}

    template <class F>
    INLINE void operator()(F f) const {
      if constexpr (pairs == 2)
        if (second) return f(Run<Codes, 1>{vectors, 0, quads});
      if constexpr (spare)
        if (last) return f(SpareRun<Codes, 0>{vectors - 3 * 64 * quads, 0, quads, 64 * quads});
      f(Run<Codes, 0>{vectors, 0, quads});
    }
  };

  struct Values {  // the tokens of one pair of slots, then those of the other
    const uint8_t *vectors;

    INLINE Values(const uint8_t *codes, int tile) : vectors(codes + tile * stored_quads * 64) {}

    template <class F>
    INLINE void operator()(F f) const {
      f(Run<Codes, 0>{vectors, 0, stored_quads});
      if constexpr (pairs == 2) f(Run<Codes, 1>{vectors, value_quads, value_quads});
      if constexpr (spare)
        f(SpareRun<Codes, 64>{vectors, stored_quads, value_quads - stored_quads, 64});
    }
  };

  // Codes [128 tokens][head_size] to the bytes of a page.
  static void pack_keys(const uint8_t *codes, int head_size, uint8_t *out) {
    const auto slot_at = [&](int slot) __attribute__((always_inline)) {
      return 16 * head_size * slot;
    };
    const int unit = 16 * head_size;  // bytes
    alignas(64) uint8_t last[spare ? 16 * kMaxHead : 1];
    for (int t = 0, n = 0; t < kBlock; t += key_tokens, n++)
      pack(codes + t * head_size, head_size, slot_at, head_size / 4,
           spare && n == 3 ? last : out + n * unit);
    if constexpr (spare)
      for (int n = 0; n < 3; n++)
        for (int i = 0; i < unit; i++) out[n * unit + i] |= (last[i] >> n & 0x11) << 3;
  }

  // Codes [head_size][128 tokens] to the bytes of a page.
  static void pack_values(const uint8_t *codes, int head_size, uint8_t *out) {
    const auto slot_at = [](int slot) __attribute__((always_inline)) {
      return slot % 2 * 16 * kBlock + slot / 2 * value_tokens;
    };
    alignas(64) uint8_t all[64 * value_quads];
    for (int c = 0; c < head_size; c += 32, out += 64 * stored_quads) {
      pack(codes + c * kBlock, kBlock, slot_at, value_quads, spare ? all : out);
      if constexpr (spare)
        for (int q = 0; q < stored_quads; q++)
          for (int i = 0; i < 64; i++)
            out[64 * q + i] = all[64 * q + i] |
                              (all[64 * (stored_quads + q / 3) + i] >> q % 3 & 0x11) << 3;
    }
  }

  // The codes of numbers from a group's zero on: round_half_even(y / step), between 0 and `top`.
  //
  // Two bits need no division: a scale has 11 bits, so 0.5, 1.5 and 2.5 of it are exact, and no fp32
  // number next to one of them is so near that its quotient would be rounded to the tie.
  struct Rounding {
    vf half, three_halves, five_halves, divisor;
    INLINE Rounding(vf step, vi positive) {
      if constexpr (BITS == 2) {
        half = 0.5f * step, three_halves = 1.5f * step, five_halves = 2.5f * step;
      } else {
        divisor = either(positive, step, all(1.0f));
      }
    }
    INLINE vi operator()(vf y) const {
      if constexpr (BITS == 2) {
        return -((y > half) + (y >= three_halves) + (y > five_halves));
      } else {
        return __builtin_convertvector(half_even(clamp(y / divisor, all((float)top))), vi);
      }
    }
  };

 private:
  // out[q][lane] = word q of row `lane` of 16, which are `stride` bytes apart; a word is a quad of
  // each slot, and those of a slot lie `slot_at(slot)` bytes on.
  template <class F>
  static INLINE void pack(const uint8_t *codes, int stride, F slot_at, int words, uint8_t *out) {
    for (int q = 0; q < words; q += W)
      for (int lane = 0; lane < 16; lane += W) {
        vf v[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; l++) {
          const uint8_t *x = codes + (lane + l) * stride + 4 * q;
          vu word = (vu)load((const float *)x);
#pragma GCC unroll 4
          for (int slot = 1; slot < slots; slot++)
            word |= (vu)load((const float *)(x + slot_at(slot))) << (slot * pitch);
          v[l] = (vf)word;
        }
        transpose(v);
        for (int l = 0; l < W && q + l < words; l++)
          store((float *)(out + 64 * (q + l) + 4 * lane), v[l]);
      }
  }
};

// f(Codes of the keys, Codes of the values, whether the page is two-level) of the call's format.
template <class F>
static INLINE void with_codes(const KiviCall &c, F f) {
#define KIVI_FORMAT(K, V, TWO_LEVEL)                                       \
  if (c.k_bits == K && c.v_bits == V && (c.two_level != 0) == TWO_LEVEL) \
    return f(Codes<K>(), Codes<V>(), Constant<TWO_LEVEL>());
  KIVI_FORMATS(KIVI_FORMAT)
#undef KIVI_FORMAT
}
