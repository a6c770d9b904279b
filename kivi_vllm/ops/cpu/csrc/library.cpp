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
#include "within.h"

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

thread_local ChoosingPlan choosing_plan;
thread_local Plan attention_plan;

// Make the choices of a plan; false if memory was short.
bool choose_all(const KiviCall &c, ChoosingPlan &plan) {
  const int64_t bytes = choosing_bytes(*chosen, c, plan);
  bool enough = true;
  const bool ok = run((int64_t)plan.parts.size(), (int)c.threads, [&](int64_t i, uint8_t *mine) {
    if (uint8_t *own = room.get(bytes))
      choose_part(*chosen, c, plan, i, own, mine);
    else
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
  });
  return ok && enough;
}

void attend_unit(const KiviCall &c, const Plan &plan, const Unit &unit, uint8_t *mine) {
  chosen->attend(c, unit, mine);
  // Whoever does a tile's last part adds them up: a second parallel region would cost a
  // short call more than its work.
  if (unit.split && __atomic_sub_fetch(&unit.split->left, 1, __ATOMIC_ACQ_REL) == 0)
    chosen->combine(c, plan.units[unit.split->first], unit.split->count, mine);
  if (c.counted && unit.row->generated && unit.g0 == 0)
    __atomic_fetch_add(c.counted + 1, (unit.block_hi - unit.block_lo) * (unit.end - unit.start),
                       __ATOMIC_RELAXED);
}

bool attend_all(const KiviCall &c, const Plan &plan) {
  const bool ok = run((int64_t)plan.units.size(), (int)c.threads, [&](int64_t i, uint8_t *mine) {
    attend_unit(c, plan, plan.units[i], mine);
  });
  if (c.counted) *c.counted += pages_seen(c);
  return ok;
}

// Each choice of a plan, in one part, and at once the attention over what it chose: of those pages, a
// part lies in the thread's L2 then.
bool attend_in_turn(const KiviCall &c, ChoosingPlan &choosing, const Plan &plan) {
  struct Turn {
    int64_t part;        // of the plan; -1: none
    int64_t first, end;  // units
  };
  std::vector<Turn> turns;
  turns.reserve(plan.units.size());
  const int64_t units = (int64_t)plan.units.size();
  int64_t parts = 0;  // they are in the order of the units
  for (int64_t i = 0, end; i < units; i = end) {
    const int32_t *list = plan.units[i].list;
    for (end = i + 1; list && end < units && plan.units[end].list == list;) end++;
    turns.push_back({list ? parts++ : -1, i, end});
  }
  const int64_t bytes = choosing_bytes(*chosen, c, choosing);
  bool enough = true;
  const bool ok = run((int64_t)turns.size(), (int)c.threads, [&](int64_t i, uint8_t *mine) {
    const Turn &turn = turns[i];
    uint8_t *own = room.get(bytes);
    if (!own) return __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
    if (turn.part >= 0) choose_part(*chosen, c, choosing, turn.part, own, mine);
    for (int64_t k = turn.first; k < turn.end; k++) attend_unit(c, plan, plan.units[k], mine);
  });
  if (c.counted) *c.counted += pages_seen(c);
  return ok && enough;
}

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
  ChoosingPlan &plan = choosing_plan;  // this thread's, also in what the others run
  plan_choosing(*chosen, c, false, plan);
  return choose_all(c, plan) ? KIVI_OK : KIVI_NO_MEMORY;
} catch (const std::bad_alloc &) {
  return KIVI_NO_MEMORY;
}

int kivi_attend(const KiviCall *call) try {
  const KiviCall &c = *call;
  if (!all_within(c) || !all_read_pages(c)) return KIVI_BAD_PAGE;
  for (int64_t i = 0; c.selected && i < c.num_rows; i++)
    if (!lists_within(c, c.rows[i])) return KIVI_BAD_LIST;
  Plan &plan = attention_plan;
  make_plan(c, false, plan);
  return attend_all(c, plan) ? KIVI_OK : KIVI_NO_MEMORY;
} catch (const std::bad_alloc &) {
  return KIVI_NO_MEMORY;
}

// kivi_select_pages, then kivi_attend over what it chose.
int kivi_attend_selected(const KiviCall *call) try {
  const KiviCall &c = *call;
  if (!all_within(c) || !all_read_pages(c)) return KIVI_BAD_PAGE;
  ChoosingPlan &choosing = choosing_plan;
  Plan &plan = attention_plan;
  const bool whole = plan_choosing(*chosen, c, true, choosing);
  make_plan(c, whole, plan);
  const bool ok = whole ? attend_in_turn(c, choosing, plan)
                        : choose_all(c, choosing) && attend_all(c, plan);
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
