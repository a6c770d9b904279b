// What Python and the kernels say to each other: plain C structs of 64-bit fields, which
// `operators.py` packs. Strides are in bytes; the last dimension of every tensor is dense.
//
// Each field stands once more in KIVI_FIELDS, and in abi.py: when the library is loaded, Python
// compares names and offsets with its own.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum KiviDtype { KIVI_BF16 = 0, KIVI_FP16 = 1, KIVI_FP32 = 2 };

enum { KIVI_RAW_BITS = 0 };  // k_bits and v_bits of pages that hold tokens verbatim (RAW_BITS)

// A cache of full-precision tokens: K in the first head_size elements of a token, V in the next.
struct KiviRaw {
  uint8_t *data;  // [num_blocks, num_kv_heads, page_tokens, >= 2 * head_size]
  int64_t block_stride, head_stride, token_stride;
  int64_t num_blocks, page_tokens;
  const int32_t *table;  // [num_reqs, table_width]
  int64_t table_stride, table_width;
};

// One request of the step: tokens query[q0:q1] at positions a..b-1 (step.Row).
struct KiviRow {
  int64_t index, q0, q1, a, b, generated;
};

struct KiviTensor {
  uint8_t *data;  // [num_tokens, heads, head_size]
  int64_t token_stride, head_stride;
};

// One layer's step: step.Step and LayerCache, and, for kivi_select_pages and kivi_attend alone, the
// query, the output, step.AttentionParams and select.Selection.
struct KiviCall {
  const KiviRow *rows;
  int64_t num_rows;
  int64_t per_position, decode_len;
  int64_t k_bits, v_bits, group_size, two_level, head_size;  // PageFormat
  int64_t dtype;                                              // KiviDtype
  int64_t num_kv_heads;
  uint8_t *pages;  // [num_blocks, pages_per_block, num_kv_heads, page_bytes]
  int64_t page_block_stride, page_stride, page_head_stride, num_blocks, pages_per_block;
  const int32_t *block_table;  // [num_reqs, block_table_width], see page_of
  int64_t block_table_stride, block_table_width;
  KiviRaw ring;  // see ring_entry
  const KiviRaw *tails;
  int64_t num_tails, residual_length;
  KiviRaw sinks;  // entry 0 of a table: the first tokens of the sequence
  int64_t sink_tokens;
  KiviTensor key, value;
  int64_t threads;

  KiviTensor query, output;
  int64_t out_dtype, num_heads;
  double scale, soft_cap;
  const float *alibi_slopes;  // [num_heads] or null
  int64_t sliding_window;     // 0: none
  const float *sink_logits;   // [num_heads] or null
  int64_t chunk_size;         // a multiple of 128; 0: none
  const int32_t *last_visible;  // [num_tokens] or null: each token sees up to itself
  int64_t token_budget;         // a multiple of 128; 0: none
  int64_t estimate_channels;    // of keys, by which pages are chosen; 0: by ranges
  int32_t *selected;            // [num_tokens, num_kv_heads, selected_width] or null: all pages
  int32_t *selected_counts;     // [num_tokens]
  int64_t selected_width;
  int64_t *counted;  // two numbers: what generated tokens saw and read of pages of each kv head
};

#define KIVI_FIELDS(FIELD)                                                                     \
  FIELD(KiviRow, index) FIELD(KiviRow, q0) FIELD(KiviRow, q1) FIELD(KiviRow, a)                \
  FIELD(KiviRow, b) FIELD(KiviRow, generated) FIELD(KiviRaw, data) FIELD(KiviRaw, block_stride)                          \
  FIELD(KiviRaw, head_stride) FIELD(KiviRaw, token_stride) FIELD(KiviRaw, num_blocks)          \
  FIELD(KiviRaw, page_tokens) FIELD(KiviRaw, table) FIELD(KiviRaw, table_stride)               \
  FIELD(KiviRaw, table_width) FIELD(KiviTensor, data) FIELD(KiviTensor, token_stride)          \
  FIELD(KiviTensor, head_stride) FIELD(KiviCall, rows) FIELD(KiviCall, num_rows)               \
  FIELD(KiviCall, per_position) FIELD(KiviCall, decode_len) FIELD(KiviCall, k_bits)            \
  FIELD(KiviCall, v_bits) FIELD(KiviCall, group_size) FIELD(KiviCall, two_level)               \
  FIELD(KiviCall, head_size) FIELD(KiviCall, dtype) FIELD(KiviCall, num_kv_heads)              \
  FIELD(KiviCall, pages) FIELD(KiviCall, page_block_stride) FIELD(KiviCall, page_stride)       \
  FIELD(KiviCall, page_head_stride) FIELD(KiviCall, num_blocks)                                \
  FIELD(KiviCall, pages_per_block) FIELD(KiviCall, block_table)                                \
  FIELD(KiviCall, block_table_stride) FIELD(KiviCall, block_table_width)                       \
  FIELD(KiviCall, ring) FIELD(KiviCall, tails) FIELD(KiviCall, num_tails)                      \
  FIELD(KiviCall, residual_length) FIELD(KiviCall, sinks) FIELD(KiviCall, sink_tokens)         \
  FIELD(KiviCall, key) FIELD(KiviCall, value) FIELD(KiviCall, threads) FIELD(KiviCall, query)  \
  FIELD(KiviCall, output) FIELD(KiviCall, out_dtype) FIELD(KiviCall, num_heads)                \
  FIELD(KiviCall, scale) FIELD(KiviCall, soft_cap) FIELD(KiviCall, alibi_slopes)               \
  FIELD(KiviCall, sliding_window) FIELD(KiviCall, sink_logits) FIELD(KiviCall, chunk_size)      \
  FIELD(KiviCall, last_visible) FIELD(KiviCall, token_budget) FIELD(KiviCall, estimate_channels) FIELD(KiviCall, selected)        \
  FIELD(KiviCall, selected_counts) FIELD(KiviCall, selected_width) FIELD(KiviCall, counted)
#define KIVI_STRUCTS(STRUCT) STRUCT(KiviRow) STRUCT(KiviRaw) STRUCT(KiviTensor) STRUCT(KiviCall)

// Where a field begins, or a struct (whose name has no dot) ends.
struct KiviField {
  const char *name;
  int64_t offset;
};

// Status of a call.
enum {
  KIVI_OK = 0,
  KIVI_NO_MEMORY = 1,
  KIVI_BAD_PAGE = 2,  // a page id outside of its pool, or a table too narrow for the row
  KIVI_BAD_LIST = 3,  // selected blocks that are not ascending, or that the token does not see
};
