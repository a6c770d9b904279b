// What the AMX instructions of dot_amx.h do, for machines without them.
struct TileEmulation {
  int8_t a[16][64];
  uint8_t b[16][64];
  int32_t c[16][16];
};
static thread_local TileEmulation tiles[8];
static void tile_zero(int t) { __builtin_memset(tiles[t].c, 0, sizeof tiles[t].c); }
static void tile_load_a(int t, const void *p) { __builtin_memcpy(tiles[t].a, p, 1024); }
static void tile_load_b(int t, const void *p) { __builtin_memcpy(tiles[t].b, p, 1024); }
static void tile_multiply(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++)
      for (int k = 0; k < 64; k++)
        tiles[c].c[m][n] += (int)tiles[a].a[m][k] * (int)tiles[b].b[k / 4][4 * n + k % 4];
}
static void tile_store(int t, void *p) { __builtin_memcpy(p, tiles[t].c, 1024); }
static void begin() {}
static void end() {}
