// What the instruction-set independent part asks of the kernels of one instruction set.
#pragma once
#include "abi.h"

namespace kivi {

constexpr int kBlock = 128;    // tokens of a page (BLOCK_SIZE)
constexpr int kMaxHead = 512;  // channels of a head
constexpr int kMaxRows = 128;  // query rows (tokens x heads) of a unit
constexpr int kMaxNumbers = kMaxRows * 256;  // rows times channels of a unit
constexpr int kFitRounds = 2;  // FIT_ROUNDS of two_level.py
constexpr int kKeys = 64;      // full-precision tokens of one step of the online softmax

// A tile whose pages are shared out: `count` units from `first` on, of which `left` are not done.
struct Split {
  int64_t first;
  int count, left;
};

// A piece of attention: some query tokens of one request, for the query heads [g0, g1) of one kv
// head, over whole pages [block_lo, block_hi) and full-precision tokens [raw_lo, raw_hi) and [sink_lo, sink_hi).
struct Unit {
  const KiviRow *row;
  int kv_head, g0, g1;
  int64_t start, end;           // positions of the query tokens, all in one block
  int64_t raw_from;             // F: positions below are read from pages
  int64_t block_lo, block_hi;
  int64_t tile_block_lo;        // of all parts of the tile
  const int32_t *list;          // blocks that block numbers are places in; null: they are blocks
  int64_t raw_lo, raw_hi;
  int64_t sink_lo, sink_hi;     // of the sinks, which are full-precision tokens too
  float *partial;               // where to leave (max, sum, accumulator) of a part; null: output
  Split *split;                 // of a part
};

struct Kernels {
  const char *name;
  int64_t scratch_bytes;  // that one thread needs, 64-byte aligned
  void (*attend)(const KiviCall &, const Unit &, uint8_t *scratch);
  // Add up the partial results of `parts` units of one tile, of which this is the first: they lie
  // one after the other.
  void (*combine)(const KiviCall &, const Unit &, int parts, uint8_t *scratch);
  // Quantize one block of one request and kv head; keep its last tokens in the tails.
  void (*encode)(const KiviCall &, const KiviRow &, int64_t block, int64_t kv_head, uint8_t *scratch);
  int rows;  // query rows whose estimates lie together
  // Estimates of the rows of the unit's one token, see select.h; `out` is that of block 0, and
  // `stride` the pages of all units of the token.
  void (*estimate)(const KiviCall &, const Unit &, float *out, int64_t stride, uint8_t *scratch);
  void (*weigh)(const KiviCall &, float *estimates, int rows, int64_t pages, int64_t stride,
                float *weights);
  void (*begin)();  // once per thread and call, before any of the above
  void (*end)();
};

// Query rows of a unit at most: fewer where heads are larger, so that a thread's scratch is not.
static inline int64_t most_rows(int64_t head_size) {
  return head_size * kMaxRows <= kMaxNumbers ? kMaxRows : kMaxNumbers / head_size;
}

static inline int64_t rows_of(const Unit &u) { return (u.end - u.start) * (u.g1 - u.g0); }

// Floats of one partial result of a unit.
static inline int64_t partial_floats(const Unit &u, int64_t head_size) {
  return rows_of(u) * (head_size + 2);
}

// Bytes of a page whose fields end at `end`.
static inline int padded_bytes(int end) { return (end + kBlock - 1) / kBlock * kBlock; }

// Where a position lies in the ring: residual.ring_entry and ring_slot.
static inline int64_t ring_entry(const KiviCall &c, int64_t s) {
  const int64_t tokens = c.ring.page_tokens;
  return s / kBlock * ((kBlock + tokens - 1) / tokens) + s % kBlock / tokens;
}
static inline int64_t ring_slot(const KiviCall &c, int64_t s) {
  return s % kBlock % c.ring.page_tokens;
}

// Estimates of a page: of each group of keys, or one.
static inline int estimates_of_page(const KiviCall &c) {
  return c.estimate_channels ? 1 : kBlock / (int)c.group_size;
}

// Whether pages hold tokens verbatim.
static inline bool is_raw(const KiviCall &c) { return c.k_bits == KIVI_RAW_BITS; }

// The first position that a row at position `t` sees: residual.first_visible.
static inline int64_t first_visible(const KiviCall &c, int64_t t) {
  const int64_t window = c.sliding_window && t >= c.sliding_window ? t + 1 - c.sliding_window : 0;
  const int64_t chunk = c.chunk_size ? t / c.chunk_size * c.chunk_size : 0;
  return window > chunk ? window : chunk;
}

// The last position that the row's token at position `t` sees (images.last_visible).
static inline int64_t last_visible(const KiviCall &c, const KiviRow &row, int64_t t) {
  if (!c.last_visible) return t;
  const int64_t seen = c.last_visible[row.q0 + t - row.a];
  return seen < t ? t : seen < row.b ? seen : row.b - 1;
}

// Of a position: the first block whose page it reads something of, the first one of which it does
// not read all as it is in pages, and the one after the last (select.candidates).
struct Pages {
  int64_t first, whole, end;
};

static inline Pages pages_of(const KiviCall &c, const KiviRow &row, int64_t t) {
  const bool by_position = c.per_position || row.b - row.a <= c.decode_len;
  const int64_t start = (by_position ? t : row.a) / kBlock * kBlock - c.residual_length;
  const int64_t raw_from = start > 0 ? start : 0, first = first_visible(c, t) / kBlock;
  const int64_t whole = raw_from / kBlock, end = (raw_from + kBlock - 1) / kBlock;
  return {first, whole > first ? whole : first, end > first ? end : first};
}

// The block at a place of what the unit reads.
static inline int64_t block_at(const Unit &u, int64_t i) { return u.list ? u.list[i] : i; }

// The pool's block that holds the page of a request's block, or 0: it has no page.
static inline int64_t pool_block(const KiviCall &c, const KiviRow &row, int64_t block) {
  const uint32_t entry = (uint32_t)block / (uint32_t)c.pages_per_block;
  return c.block_table[row.index * c.block_table_stride + entry];
}

// The page of a request's block, for one kv head.
static inline uint8_t *page_of(const KiviCall &c, const KiviRow &row, int64_t head, int64_t block) {
  return c.pages + pool_block(c, row, block) * c.page_block_stride +
         (uint32_t)block % (uint32_t)c.pages_per_block * c.page_stride + head * c.page_head_stride;
}

}  // namespace kivi
