// How the pages of a step's generated tokens are chosen: work for the threads, and the best of all.
#pragma once
#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "plan.h"

namespace kivi {
namespace {

// The choice of one token for one kv head.
struct Choosing {
  Unit unit;         // of the token: all heads of the kv head, all pages that it may choose of
  int32_t *blocks;   // where its list goes
  float *estimates;  // where parts leave theirs; null: it is not shared out
  int left;          // parts that are not done
};

struct ChoosingPart {
  int64_t tile, block_lo, block_hi;
};

// Its memory is kept from call to call.
struct ChoosingPlan {
  std::vector<Choosing> tiles;
  std::vector<ChoosingPart> parts;
  std::vector<float> estimates;
};

constexpr int64_t kLeastPages = 32;  // of a part

// An odd number of cache lines: estimates of one page, so far apart, do not get in each other's way.
int64_t padded_pages(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// Floats of all estimates of a choice among n pages, with `together` rows together.
int64_t estimate_floats(const KiviCall &c, int64_t n, int64_t together) {
  const int64_t rows = c.num_heads / c.num_kv_heads;
  return (rows + together - 1) / together * together * estimates_of_page(c) * padded_pages(n);
}

// Lengths of the lists, and who makes them. With `whole`, each is made in one part if they are enough
// for all threads; returns whether they are.
bool plan_choosing(const Kernels &kernels, const KiviCall &c, bool whole, ChoosingPlan &plan) {
  const int64_t budget = c.token_budget / kBlock;
  plan.tiles.clear();
  plan.parts.clear();
  for (int64_t i = 0; i < c.num_rows; i++) {
    const KiviRow &row = c.rows[i];
    if (!row.generated) std::fill_n(c.selected_counts + row.q0, row.b - row.a, -1);
    for (int64_t t = row.a; row.generated && t < row.b; t++) {
      const Pages pages = pages_of(c, row, t);
      const int64_t token = row.q0 + t - row.a, whole = pages.whole - pages.first;
      c.selected_counts[token] = whole <= budget ? -1 : (int32_t)(budget + pages.end - pages.whole);
      for (int64_t h = 0; whole > budget && h < c.num_kv_heads; h++) {
        Choosing tile{};
        tile.unit.row = &row;
        tile.unit.kv_head = (int)h;
        tile.unit.g1 = (int)(c.num_heads / c.num_kv_heads);
        tile.unit.start = t;
        tile.unit.end = t + 1;
        tile.unit.block_lo = tile.unit.tile_block_lo = pages.first;
        tile.unit.block_hi = pages.whole;
        tile.unit.raw_from = pages.whole * kBlock;
        tile.blocks = c.selected + (token * c.num_kv_heads + h) * c.selected_width;
        if (pages.end > pages.whole) tile.blocks[budget] = (int32_t)pages.whole;
        plan.tiles.push_back(tile);
      }
    }
  }
  const int64_t tiles = (int64_t)plan.tiles.size();
  whole = whole && (tiles % c.threads == 0 || tiles >= 4 * c.threads);
  int64_t floats = 0;
  for (int64_t i = 0; i < tiles; i++) {
    Choosing &tile = plan.tiles[i];
    const int64_t first = tile.unit.block_lo, n = tile.unit.block_hi - first;
    const int64_t wanted = whole || c.threads == 1 ? 1 : (4 * c.threads + tiles - 1) / tiles;
    const int64_t parts = max_of(1, min_of(wanted, n / kLeastPages));
    tile.left = (int)parts;
    for (int64_t p = 0; p < parts; p++)
      plan.parts.push_back({i, first + n * p / parts, first + n * (p + 1) / parts});
    if (parts > 1) floats += estimate_floats(c, n, kernels.rows);
  }
  if ((int64_t)plan.estimates.size() < floats) plan.estimates.resize(floats);
  float *at = plan.estimates.data();
  for (Choosing &tile : plan.tiles)
    if (tile.left > 1) {
      tile.estimates = at;
      at += estimate_floats(c, tile.unit.block_hi - tile.unit.block_lo, kernels.rows);
    }
  return whole;
}

// Bytes of work space of a thread: estimates, weights and keys of one choice.
int64_t choosing_bytes(const Kernels &kernels, const KiviCall &c, const ChoosingPlan &plan) {
  int64_t most = 0;
  for (const Choosing &tile : plan.tiles)
    most = max_of(most, tile.unit.block_hi - tile.unit.block_lo);
  return 4 * (estimate_floats(c, most, kernels.rows) + padded_pages(most)) + 8 * padded_pages(most);
}

// A page's place among others: the more it weighs, then the older it is, the larger.
uint64_t place_of(float weight, int64_t page) {
  uint32_t bits;  // of floats that are not negative, they order like numbers
  std::memcpy(&bits, &weight, 4);
  return (uint64_t)bits << 32 | (uint32_t)~page;
}

// The blocks of the `count` best of n pages, the first of which is `first`, in ascending order; the
// last one is among them.
void choose_best(const float *weights, int64_t n, int64_t count, int64_t first, uint64_t *places,
                 int32_t *blocks) {
  for (int64_t i = 0; i + 1 < n; i++) places[i] = place_of(weights[i], i);
  uint64_t least = UINT64_MAX;
  if (count > 1) {
    std::nth_element(places, places + count - 2, places + n - 1, std::greater<uint64_t>());
    least = places[count - 2];
  }
  for (int64_t i = 0; i + 1 < n; i++)
    if (place_of(weights[i], i) >= least) *blocks++ = (int32_t)(first + i);
  *blocks = (int32_t)(first + n - 1);
}

// Do part `i` of the plan, and choose where it is the last one of its tile. `room` is of
// `choosing_bytes`.
void choose_part(const Kernels &kernels, const KiviCall &c, ChoosingPlan &plan, int64_t i,
                 uint8_t *room, uint8_t *scratch) {
  const ChoosingPart &part = plan.parts[i];
  Choosing &tile = plan.tiles[part.tile];
  const int64_t first = tile.unit.block_lo, n = tile.unit.block_hi - first;
  const int64_t stride = padded_pages(n);
  uint64_t *places = (uint64_t *)room;
  float *weights = (float *)(places + stride), *own = weights + stride;
  float *estimates = tile.estimates ? tile.estimates : own;
  Unit unit = tile.unit;
  unit.block_lo = part.block_lo;
  unit.block_hi = part.block_hi;
  kernels.estimate(c, unit, estimates - first * kernels.rows, stride, scratch);
  if (tile.estimates && __atomic_sub_fetch(&tile.left, 1, __ATOMIC_ACQ_REL) > 0) return;
  kernels.weigh(c, estimates, unit.g1, n, stride, weights);
  choose_best(weights, n, c.token_budget / kBlock, first, places, tile.blocks);
}

// Whether the lists of the row's tokens are ascending, and of pages that they see.
bool lists_within(const KiviCall &c, const KiviRow &row) {
  for (int64_t t = row.a; row.generated && t < row.b; t++) {
    const int64_t token = row.q0 + t - row.a, count = c.selected_counts[token];
    if (count < 0) continue;
    if (count == 0 || count > c.selected_width) return false;
    const Pages pages = pages_of(c, row, t);
    for (int64_t h = 0; h < c.num_kv_heads; h++) {
      const int32_t *list = c.selected + (token * c.num_kv_heads + h) * c.selected_width;
      int64_t least = pages.first;
      for (int64_t i = 0; i < count; least = list[i++] + 1)
        if (list[i] < least || list[i] >= pages.end) return false;
    }
  }
  return true;
}

// Pages of all kv heads that the step's generated tokens see.
int64_t pages_seen(const KiviCall &c) {
  int64_t count = 0;
  for (int64_t i = 0; i < c.num_rows; i++)
    for (int64_t t = c.rows[i].a; c.rows[i].generated && t < c.rows[i].b; t++) {
      const Pages pages = pages_of(c, c.rows[i], t);
      count += (pages.end - pages.first) * c.num_kv_heads;
    }
  return count;
}

}  // namespace
}  // namespace kivi
