// What the instruction-set independent part asks of the kernels of one instruction set.
#pragma once
#include "abi.h"

namespace kivi {

constexpr int kBlock = 128;    // tokens of a page (BLOCK_SIZE)
constexpr int kMaxRows = 128;  // query rows (tokens x heads) of a unit
constexpr int kKeys = 64;      // full-precision tokens of one step of the online softmax

// A piece of attention: some query tokens of one request, for the query heads [g0, g1) of one kv
// head, over whole pages [block_lo, block_hi) and full-precision tokens [raw_lo, raw_hi).
struct Unit {
  const KiviRow *row;
  int kv_head, g0, g1;
  int64_t start, end;           // positions of the query tokens, all in one block
  int64_t raw_from;             // F: positions below are read from pages
  int64_t block_lo, block_hi;
  int64_t raw_lo, raw_hi;
  float *partial;               // where to leave (max, sum, accumulator) of a part; null: output
};

struct Kernels {
  const char *name;
  int64_t scratch_bytes;  // that one thread needs, 64-byte aligned
  void (*attend)(const KiviCall &, const Unit &, uint8_t *scratch);
  // Add up the `parts` partial results of a unit, laid out one after the other.
  void (*combine)(const KiviCall &, const Unit &, const float *partials, int parts, uint8_t *scratch);
  // Quantize one block of one request and kv head; keep its last tokens in the tails.
  void (*encode)(const KiviCall &, const KiviRow &, int64_t block, int64_t kv_head, uint8_t *scratch);
  void (*begin)();  // once per thread and call, before any of the above
  void (*end)();
};

// Floats of one partial result of `rows` rows.
static inline int64_t partial_floats(int64_t rows, int64_t head_size) { return rows * (head_size + 2); }

}  // namespace kivi
