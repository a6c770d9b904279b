// A step: what the kernels get, and what a query sees of it.
//
// Compile-time constants: PER_BLOCK, pages of a block; R, the residual length; WINDOW and CHUNK, of
// the layer; GQA, query heads of a kv head; TILES, of columns; BUDGET, pages that a generated token
// reads, or 0: all (see select.py); CALL_BYTES.

#pragma once
#include "layout.cuh"

// Strides are bytes; see `Pages` and `RawTokens` of triton/tokens.py.
struct Call {
  const u8 *query;
  i64 query_token, query_head;
  const int *query_start_loc, *seq_lens;
  const u8 *pages;
  i64 page_block, page_page, page_head;
  const int *table;
  i64 table_row;
  const u8 *key;
  i64 key_token, key_head;
  const u8 *value;
  i64 value_token, value_head;
  const u8 *ring;
  i64 ring_page, ring_head, ring_token;
  const int *ring_table;
  i64 ring_row;
  const i64 *tails;
  i64 tails_page, tails_head, tails_token, tails_row;
  const u8 *sinks;
  i64 sinks_page, sinks_head, sinks_token;
  const int *sinks_table;
  i64 sinks_row;
  const float *slopes;
  float *partial, *statistics;
  // With a budget: whether requests generate, [rows]; what tokens read, [tokens, num_kv_heads,
  // BUDGET + 1], and how many, [tokens], as `Selection` has them; the estimates of all pages,
  // [tokens, num_kv_heads, GQA, most_pages, 2]; pages seen and read, [tokens, num_kv_heads, 2].
  const u8 *generated;
  int *blocks, *counts;
  float *estimates;
  i64 *counted;
  float scale;
  int splits, most_pages, unused;
};
static_assert(sizeof(Call) == CALL_BYTES, "kernels.py knows other fields");

// A request of the step.
struct Row {
  int index, q0, a, b;

  DEV Row of(const Call &call, int index) {
    Row row;
    row.index = index;
    row.q0 = call.query_start_loc[index];
    row.b = call.seq_lens[index];
    row.a = row.b - (call.query_start_loc[index + 1] - row.q0);
    return row;
  }
};

// A row of a table.
DEV const int *row_of(const int *table, i64 stride, int row) {
  return (const int *)((const u8 *)table + row * stride);
}

DEV const u8 *page_of(const Call &call, const Row &row, int head, int block) {
  const i64 held = row_of(call.table, call.table_row, row.index)[block / PER_BLOCK];
  return call.pages + held * call.page_block + block % PER_BLOCK * call.page_page +
         head * call.page_head;
}

// F(t), of triton/tokens.py.
DEV int first_raw(int t) { return larger(t / B * B - R, 0); }

DEV int oldest_seen(int t) {
  int oldest = 0;
  if (WINDOW > 0) oldest = larger(t + 1 - WINDOW, 0);
  if (CHUNK > 0) oldest = larger(oldest, t / (CHUNK > 0 ? CHUNK : 1) * CHUNK);
  return oldest;
}

DEV bool visible(int s, int t) { return s <= t && s >= oldest_seen(t); }

// A column of a tile: a query head at a position. With a budget, each position has tiles of its own.
constexpr int TOKEN_TILES = (GQA + N - 1) / N;

// The position of a tile, with a budget.
DEV int position_of(const Row &row, int tile) { return row.a + tile / TOKEN_TILES; }

struct Column {
  int t, head;  // of queries
  bool live;

  DEV Column of(const Row &row, int kv_head, int tile, int column) {
    Column c;
    if (BUDGET > 0) {
      const int i = tile % TOKEN_TILES * N + column;
      c.t = position_of(row, tile);
      c.live = c.t < row.b && i < GQA;
      c.head = kv_head * GQA + (i < GQA ? i : 0);
    } else {
      const int i = tile * N + column;
      c.t = row.a + i / GQA;
      c.live = c.t < row.b;
      c.head = kv_head * GQA + i % GQA;
    }
    return c;
  }
};
