// How a step is split into units, and the pages of long sequences into parts.
#pragma once
#include <cstdint>
#include <vector>

#include "units.h"

namespace kivi {
namespace {

int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Work of a unit, in full-precision tokens times rows.
int64_t cost_of(const Unit &u) {
  const int64_t rows = rows_of(u);
  return (u.block_hi - u.block_lo) * kBlock * (rows + 1) / 2 + (u.raw_hi - u.raw_lo + u.sink_hi - u.sink_lo) * (rows + 4) +
         64;
}

// Whether tokens of the row follow F of their own positions, not all of the first one's.
bool reads_by_position(const KiviCall &c, const KiviRow &row) {
  return c.per_position || row.b - row.a <= c.decode_len;
}

// Whether a token reads the blocks of a list.
bool has_list(const KiviCall &c, const KiviRow &row, int64_t t) {
  return c.selected && row.generated && c.selected_counts[row.q0 + t - row.a] >= 0;
}

// Its memory is kept from call to call.
struct Plan {
  std::vector<Unit> tiles, units;
  std::vector<Split> splits;
  std::vector<float> partials;
};

void add_tiles(const KiviCall &c, const KiviRow &row, std::vector<Unit> &units) {
  const int64_t group = c.num_heads / c.num_kv_heads;
  const int64_t most = most_rows(c.head_size), per_tile = max_of(1, most / group);
  const bool per_position = reads_by_position(c, row);
  for (int64_t start = row.a; start < row.b;) {
    int64_t end = min_of(min_of(row.b, (start / kBlock + 1) * kBlock), start + per_tile);
    const bool listed = has_list(c, row, start);  // of its own, so it is alone
    for (int64_t t = start + 1; row.generated && t < end; t++)
      if (listed || has_list(c, row, t)) end = t;
    const int64_t seen = (per_position ? start : row.a) / kBlock * kBlock - c.residual_length;
    Unit u{};
    u.row = &row;
    u.start = start;
    u.end = end;
    u.raw_from = max_of(0, seen);
    const int64_t oldest = first_visible(c, start);
    if (is_raw(c)) {  // pages are read like the tokens that are not in pages
      u.raw_lo = oldest;
    } else {
      u.block_lo = u.tile_block_lo = oldest / kBlock;
      u.block_hi = max_of(u.block_lo, (u.raw_from + kBlock - 1) / kBlock);
      u.raw_lo = max_of(u.raw_from, oldest);
      u.sink_lo = oldest;
      u.sink_hi = u.raw_from > 0 ? max_of(oldest, c.sink_tokens) : oldest;
    }
    u.raw_hi = end;
    if (c.last_visible)
      for (int64_t t = start; t < end; t++) u.raw_hi = max_of(u.raw_hi, last_visible(c, row, t) + 1);
    for (int64_t h = 0; h < c.num_kv_heads; h++)
      for (int64_t g = 0; g < group; g += most) {
        u.kv_head = (int)h;
        u.g0 = (int)g;
        u.g1 = (int)min_of(group, g + most);
        if (listed) {
          const int64_t token = row.q0 + start - row.a;
          u.list = c.selected + (token * c.num_kv_heads + h) * c.selected_width;
          u.block_lo = u.tile_block_lo = 0;
          u.block_hi = c.selected_counts[token];
        }
        units.push_back(u);
      }
    start = end;
  }
}

// Cost of a part besides its pages and tokens, in the measure of `cost_of`.
constexpr int64_t kPartCost = 320;

// How many parts of each of `tiles` equal tiles take the least time; about four a thread at most.
int64_t parts_of_equal(int64_t tiles, int64_t cost, int64_t threads) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t parts = 1; tiles * (parts - 1) <= 4 * threads && parts <= 4 * threads; parts++) {
    const int64_t turns = (tiles * parts + threads - 1) / threads;
    const int64_t time = turns * (cost / parts + kPartCost);
    if (time < least) best = parts, least = time;
  }
  return best;
}

// Split the tiles' pages so that every thread has work, down to four pages a part; but not those that
// read a list, if `whole_lists`.
void make_plan(const KiviCall &c, bool whole_lists, Plan &plan) {
  plan.tiles.clear();
  plan.units.clear();
  plan.splits.clear();
  for (int64_t i = 0; i < c.num_rows; i++) add_tiles(c, c.rows[i], plan.tiles);
  int64_t total = 0, largest = 0;
  for (const Unit &u : plan.tiles) {
    total += cost_of(u);
    largest = max_of(largest, cost_of(u));
  }
  const int64_t count = (int64_t)plan.tiles.size();
  const bool equal = total == largest * count;  // the heads of one sequence are
  const int64_t equal_parts = equal ? parts_of_equal(count, largest, c.threads) : 1;
  const int64_t most = total / (4 * c.threads) + 1;
  int64_t floats = 0;
  for (const Unit &u : plan.tiles) {
    const int64_t blocks = u.block_hi - u.block_lo;
    const int64_t wanted = c.threads == 1 ? 1 : equal ? equal_parts : (cost_of(u) + most - 1) / most;
    const int64_t parts = whole_lists && u.list ? 1 : min_of(wanted, max_of(1, blocks / 4));
    if (parts <= 1) {
      plan.units.push_back(u);
      continue;
    }
    plan.splits.push_back({(int64_t)plan.units.size(), (int)parts, (int)parts});
    for (int64_t p = 0; p < parts; p++) {
      Unit part = u;
      part.block_lo = u.block_lo + blocks * p / parts;
      part.block_hi = u.block_lo + blocks * (p + 1) / parts;
      if (p + 1 < parts) {  // the last part reads the raw tokens
        part.raw_hi = part.raw_lo;
        part.sink_hi = part.sink_lo;
      }
      plan.units.push_back(part);
    }
    floats += parts * partial_floats(u, c.head_size);
  }
  if ((int64_t)plan.partials.size() < floats) plan.partials.resize(floats);
  float *at = plan.partials.data();
  for (Split &split : plan.splits)
    for (int p = 0; p < split.count; p++) {
      Unit &part = plan.units[split.first + p];
      part.split = &split;
      part.partial = at;
      at += partial_floats(part, c.head_size);
    }
}

}  // namespace
}  // namespace kivi
