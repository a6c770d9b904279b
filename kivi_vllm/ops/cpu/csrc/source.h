// Where the K and V of a request's positions lie: the one place that knows what is kept where.

struct Source {
  const KiviCall &c;
  const KiviRow &row;
  int64_t head, bytes, block_start;
  int64_t from_pages;  // positions below are read from pages: kivi_raw's, which hold tokens verbatim
  int64_t from_sinks;  // positions below are read from the sinks' page
  Source(const KiviCall &call, const KiviRow &r, int64_t kv_head, int64_t raw_from)
      : c(call), row(r), head(kv_head), bytes(call.head_size * dtype_bytes(call.dtype)),
        block_start(r.a / kBlock * kBlock), from_pages(is_raw(call) ? raw_from : 0),
        from_sinks(raw_from > 0 ? call.sink_tokens : 0) {}

  // Tokens that lie one after the other.
  struct Run {
    const uint8_t *k, *v;
    int64_t k_stride, v_stride, count;
  };

  static INLINE uint8_t *token(const KiviRaw &raw, int64_t index, int64_t entry, int64_t head,
                               int64_t slot) {
    const int64_t id = raw.table[index * raw.table_stride + entry];
    return raw.data + id * raw.block_stride + head * raw.head_stride + slot * raw.token_stride;
  }

  // The tokens from position `s` on.
  INLINE Run find(int64_t s) const {
    if (s < from_sinks) {
      const uint8_t *k = token(c.sinks, row.index, 0, head, s);
      return {k, k + bytes, c.sinks.token_stride, c.sinks.token_stride, from_sinks - s};
    }
    if (s < from_pages) {  // [K, V][128][head_size]
      const int64_t in = s % kBlock;
      const uint8_t *page = page_of(c, row, head, s / kBlock);
      return {page + in * bytes, page + (kBlock + in) * bytes, bytes, bytes,
              min_of(kBlock - in, from_pages - s)};
    }
    if (s >= row.a) {  // the step's own
      const int64_t at = row.q0 + s - row.a;
      return {c.key.data + at * c.key.token_stride + head * c.key.head_stride,
              c.value.data + at * c.value.token_stride + head * c.value.head_stride,
              c.key.token_stride, c.value.token_stride, row.b - s};
    }
    if (s >= block_start) {
      const int64_t slot = ring_slot(c, s);
      const uint8_t *k = token(c.ring, row.index, ring_entry(c, s), head, slot);
      return {k, k + bytes, c.ring.token_stride, c.ring.token_stride,
              min_of(c.ring.page_tokens - slot, row.a - s)};
    }
    const int64_t tokens = c.tails->page_tokens;
    const int64_t at = s - (block_start - c.residual_length), slot = at % tokens;
    const KiviRaw &tail = c.tails[at / tokens];
    const uint8_t *k = token(tail, row.index, block_start / kBlock - 1, head, slot);
    return {k, k + bytes, tail.token_stride, tail.token_stride,
            min_of(tokens - slot, block_start - s)};
  }

  // Addresses of n tokens.
  void find(int64_t s, int n, const uint8_t **k, const uint8_t **v) const {
    for (int j = 0; j < n;) {
      const Run run = find(s + j);
      const int m = (int)min_of<int64_t>(run.count, n - j);
      for (int i = 0; i < m; i++, j++) {
        k[j] = run.k + i * run.k_stride;
        v[j] = run.v + i * run.v_stride;
      }
    }
  }
};

// Fetch a token's K and V into L2 (see Stream).
static INLINE void fetch_token(const uint8_t *k, const uint8_t *v, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(k + i, 0, 2);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(v + i, 0, 2);
}

// Full-precision tokens [at, end), fetched while the pages before them are computed: that leaves time
// for it, and computing tokens does not.
struct TokensAhead {
  const Source &source;
  int64_t at, end;
  int each;  // that `fetch` fetches
  Source::Run run;

  void fetch() {
    for (int n = 0; n < each && at < end; n++, at++, run.count--) {
      if (run.count == 0) run = source.find(at);
      fetch_token(run.k, run.v, source.bytes);
      run.k += run.k_stride;
      run.v += run.v_stride;
    }
  }
};
