// Whether a step stays within its pools: no kernel runs on a page id that is not in its pool.
#pragma once
#include "plan.h"

namespace kivi {
namespace {

bool ids_within(const int32_t *table, int64_t stride, int64_t width, int64_t row, int64_t first,
                int64_t end, int64_t least, int64_t num_blocks) {
  if (first >= end) return true;
  if (end > width) return false;
  for (int64_t i = first; i < end; i++) {
    const int64_t id = table[row * stride + i];
    if (id < least || id >= num_blocks) return false;
  }
  return true;
}

bool raw_within(const KiviRaw &raw, int64_t row, int64_t first, int64_t end) {
  return ids_within(raw.table, raw.table_stride, raw.table_width, row, first, end, 0,
                    raw.num_blocks);
}

// The ring's pages of positions [first, end).
bool ring_within(const KiviCall &c, int64_t row, int64_t first, int64_t end) {
  return first >= end ||
         raw_within(c.ring, row, ring_entry(c, first), ring_entry(c, end - 1) + 1);
}

// The first of the row's tokens that a later step may need from the ring (residual.ring_start).
int64_t ring_written_from(const KiviCall &c, const KiviRow &row) {
  return max_of(row.a, max_of(0, row.b - (c.decode_len - 1)) / kBlock * kBlock);
}

// Entries of the block table for pages [first, end), which may be null, or must be there.
bool blocks_within(const KiviCall &c, int64_t row, int64_t first, int64_t end, bool null) {
  const int64_t k = c.pages_per_block;
  return first >= end || ids_within(c.block_table, c.block_table_stride, c.block_table_width, row,
                                    first / k, (end + k - 1) / k, null ? 0 : 1, c.num_blocks);
}

// Every page that the step of `row` may touch: no kernel runs on an id that is not in its pool.
bool pages_within(const KiviCall &c, const KiviRow &row) {
  if (row.index < 0 || row.a < 0 || row.b <= row.a || row.q0 < 0 || row.q1 - row.q0 != row.b - row.a)
    return false;
  const int64_t blocks = row.b / kBlock, start = row.a / kBlock;
  if (!blocks_within(c, row.index, 0, blocks, true)) return false;
  if (!ring_within(c, row.index, start * kBlock, row.a)) return false;
  if (!ring_within(c, row.index, ring_written_from(c, row), row.b)) return false;
  for (int64_t i = 0; i < c.num_tails; i++)
    if (!raw_within(c.tails[i], row.index, start ? start - 1 : 0, blocks)) return false;
  return !c.sink_tokens || blocks == 0 || raw_within(c.sinks, row.index, 0, 1);
}

bool all_within(const KiviCall &c) {
  for (int64_t i = 0; i < c.num_rows; i++)
    if (!pages_within(c, c.rows[i])) return false;
  return true;
}

// Whether there are pages for all that the attention of `row` reads from pages.
bool reads_pages(const KiviCall &c, const KiviRow &row) {
  const int64_t newest = reads_by_position(c, row) ? row.b - 1 : row.a;
  const int64_t end = max_of(0, newest / kBlock * kBlock - c.residual_length);
  return blocks_within(c, row.index, first_visible(c, row.a) / kBlock,
                       (end + kBlock - 1) / kBlock, false);
}

bool all_read_pages(const KiviCall &c) {
  for (int64_t i = 0; i < c.num_rows; i++)
    if (!reads_pages(c, c.rows[i])) return false;
  return true;
}

}  // namespace
}  // namespace kivi
