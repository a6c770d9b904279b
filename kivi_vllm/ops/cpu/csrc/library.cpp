// Entry points: check the page ids, split the work, run it on OpenMP threads.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "choose.h"

namespace kivi {

#define KIVI_DECLARE(isa) \
  namespace isa {         \
  extern const Kernels kernels; \
  }
#if defined(KIVI_HAVE_AMX)
KIVI_DECLARE(amx)
#endif
#if defined(KIVI_HAVE_AVX512_VNNI)
KIVI_DECLARE(avx512_vnni)
#endif
#if defined(KIVI_HAVE_AVX2)
KIVI_DECLARE(avx2)
#endif
KIVI_DECLARE(portable)

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  // No CPU has AVX2 without F16C, which old compilers cannot ask for.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif
#if defined(KIVI_HAVE_AMX)
bool has_amx() {
  if (!has_avx512_vnni()) return false;
#if defined(KIVI_EMULATE_AMX)
  return true;
#else
  unsigned a, b, c, d;
  const unsigned tile = 1u << 24, int8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (tile | int8)) != (tile | int8)) return false;
  // The kernel grants the tiles' registers (XTILEDATA, 18) to those who ask (ARCH_REQ_XCOMP_PERM).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif
}
#endif
bool always() { return true; }

struct Choice {
  const Kernels *kernels;
  bool (*works)();
  bool automatic;  // not where it could not be tested: on its own request only
};

// Best first.
const Choice choices[] = {
#if defined(KIVI_HAVE_AMX)
    {&amx::kernels, has_amx, false},
#endif
#if defined(KIVI_HAVE_AVX512_VNNI)
    {&avx512_vnni::kernels, has_avx512_vnni, true},
#endif
#if defined(KIVI_HAVE_AVX2)
    {&avx2::kernels, has_avx2, true},
#endif
    {&portable::kernels, always, true},
};

const Kernels *chosen = nullptr;

// A thread's scratch memory, kept between calls.
struct Scratch {
  uint8_t *data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
  uint8_t *get(int64_t wanted) {
    if (size < wanted) {
      std::free(data);
      data = (uint8_t *)std::aligned_alloc(64, (wanted + 63) / 64 * 64);
      size = data ? wanted : 0;
    }
    return data;
  }
};
thread_local Scratch scratch, room;

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

// Run f(i, scratch) for i in [0, n) on the call's threads; false if memory was short.
template <class F>
bool run(int64_t n, int threads, F f) {
  bool ok = true;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    uint8_t *mine = scratch.get(chosen->scratch_bytes);
    if (mine) chosen->begin();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; i++) {
      if (mine)
        f(i, mine);
      else
#pragma omp atomic write
        ok = false;
    }
    if (mine) chosen->end();
  }
  return ok;
}

struct Block {
  const KiviRow *row;
  int64_t block, head;
};

}  // namespace
}  // namespace kivi

using namespace kivi;

#pragma GCC visibility push(default)
extern "C" {

// Use the named instruction set, or the best for a null name. Returns the name in use, or null if
// this machine or this build does not have it.
const char *kivi_select(const char *name) {
  for (const Choice &choice : choices) {
    if (name && std::strcmp(name, choice.kernels->name) != 0) continue;
    if (!name && !choice.automatic) continue;
    if (!choice.works()) {
      if (name) return nullptr;
      continue;
    }
    chosen = choice.kernels;
    return chosen->name;
  }
  return nullptr;
}

// Names of the instruction sets of this build that this machine has, best first, after one another
// with a space; at most `size` bytes.
void kivi_available(char *names, int64_t size) {
  names[0] = 0;
  for (const Choice &choice : choices)
    if (choice.works() && std::strlen(names) + std::strlen(choice.kernels->name) + 2 < (size_t)size) {
      if (names[0]) std::strcat(names, " ");
      std::strcat(names, choice.kernels->name);
    }
}

// Whether calls run on more than one thread: not if the compiler's OpenMP is not torch's.
int kivi_parallel() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

// The fields of all structs, and the structs' sizes, up to a null name.
const KiviField *kivi_fields() {
#define FIELD(type, name) {#type "." #name, offsetof(type, name)},
#define STRUCT(type) {#type, sizeof(type)},
  static const KiviField fields[] = {KIVI_FIELDS(FIELD) KIVI_STRUCTS(STRUCT){nullptr, 0}};
#undef FIELD
#undef STRUCT
  return fields;
}

int kivi_store_blocks(const KiviCall *call) try {
  const KiviCall &c = *call;
  if (!all_within(c)) return KIVI_BAD_PAGE;
  std::vector<Block> blocks;
  for (int64_t i = 0; i < c.num_rows; i++)
    for (int64_t block = c.rows[i].a / kBlock; block < c.rows[i].b / kBlock; block++)
      for (int64_t h = 0; h < c.num_kv_heads; h++) blocks.push_back({&c.rows[i], block, h});
  if (blocks.empty()) return KIVI_OK;
  const bool ok = run((int64_t)blocks.size(), (int)c.threads, [&](int64_t i, uint8_t *mine) {
    chosen->encode(c, *blocks[i].row, blocks[i].block, blocks[i].head, mine);
  });
  return ok ? KIVI_OK : KIVI_NO_MEMORY;
} catch (const std::bad_alloc &) {
  return KIVI_NO_MEMORY;
}

int kivi_select_pages(const KiviCall *call) try {
  const KiviCall &c = *call;
  if (!all_within(c) || !all_read_pages(c)) return KIVI_BAD_PAGE;
  thread_local ChoosingPlan kept;
  ChoosingPlan &plan = kept;
  plan_choosing(*chosen, c, plan);
  const int64_t bytes = choosing_bytes(*chosen, c, plan);
  bool enough = true;
  const bool ok = run((int64_t)plan.parts.size(), (int)c.threads, [&](int64_t i, uint8_t *mine) {
    if (uint8_t *own = room.get(bytes))
      choose_part(*chosen, c, plan, i, own, mine);
    else
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
  });
  return ok && enough ? KIVI_OK : KIVI_NO_MEMORY;
} catch (const std::bad_alloc &) {
  return KIVI_NO_MEMORY;
}

int kivi_attend(const KiviCall *call) try {
  const KiviCall &c = *call;
  if (!all_within(c) || !all_read_pages(c)) return KIVI_BAD_PAGE;
  for (int64_t i = 0; c.selected && i < c.num_rows; i++)
    if (!lists_within(c, c.rows[i])) return KIVI_BAD_LIST;
  thread_local Plan kept;
  Plan &plan = kept;  // this thread's, also in what the others run
  make_plan(c, plan);
  const bool ok = run((int64_t)plan.units.size(), (int)c.threads, [&](int64_t i, uint8_t *mine) {
    const Unit &unit = plan.units[i];
    chosen->attend(c, unit, mine);
    // Whoever does a tile's last part adds them up: a second parallel region would cost a
    // short call more than its work.
    if (unit.split && __atomic_sub_fetch(&unit.split->left, 1, __ATOMIC_ACQ_REL) == 0)
      chosen->combine(c, plan.units[unit.split->first], unit.split->count, mine);
    if (c.counted && unit.row->generated && unit.g0 == 0)
      __atomic_fetch_add(c.counted + 1, (unit.block_hi - unit.block_lo) * (unit.end - unit.start),
                         __ATOMIC_RELAXED);
  });
  if (c.counted) *c.counted += pages_seen(c);
  return ok ? KIVI_OK : KIVI_NO_MEMORY;
} catch (const std::bad_alloc &) {
  return KIVI_NO_MEMORY;
}

int kivi_store_ring(const KiviCall *call) {
  const KiviCall &c = *call;
  if (!all_within(c)) return KIVI_BAD_PAGE;
  const int64_t bytes = c.head_size * (c.dtype == KIVI_FP32 ? 4 : 2);
  for (int64_t i = 0; i < c.num_rows; i++) {
    const KiviRow &row = c.rows[i];
    for (int64_t s = ring_written_from(c, row); s < row.b; s++) {
      const int64_t token = row.q0 + s - row.a;
      const int64_t id = c.ring.table[row.index * c.ring.table_stride + ring_entry(c, s)];
      uint8_t *to = c.ring.data + id * c.ring.block_stride + ring_slot(c, s) * c.ring.token_stride;
      const uint8_t *k = c.key.data + token * c.key.token_stride;
      const uint8_t *v = c.value.data + token * c.value.token_stride;
      for (int64_t h = 0; h < c.num_kv_heads; h++) {
        std::memcpy(to + h * c.ring.head_stride, k + h * c.key.head_stride, bytes);
        std::memcpy(to + h * c.ring.head_stride + bytes, v + h * c.value.head_stride, bytes);
      }
    }
  }
  return KIVI_OK;
}
}
