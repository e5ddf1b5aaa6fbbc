// SPDX-License-Identifier: Apache-2.0
// AMX-TILE and AMX-BF16: eight tiles a thread, of which an instruction sees rows and bytes a row
// as they were configured. Whatever would fault aborts. Included by the model's immintrin.h.
#pragma once

struct TileConfig {  // what ldtilecfg reads
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_a_row[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

inline thread_local TileConfig tile_config = {};
inline thread_local Ints tiles[8][16];

inline void fault_unless(bool is_valid) {
  if (!is_valid) std::abort();
}

inline void _tile_loadconfig(const void* config) {
  std::memcpy(&tile_config, config, sizeof(tile_config));
  fault_unless(tile_config.palette == 1);
  for (int i = 0; i < 8; ++i)
    fault_unless(tile_config.rows[i] <= 16 && tile_config.bytes_a_row[i] <= 64);
  std::memset(tiles, 0, sizeof(tiles));
}
inline void _tile_release() { tile_config = {}; }

inline void _tile_zero(int tile) {
  fault_unless(tile_config.rows[tile] > 0);
  std::memset(tiles[tile], 0, sizeof(tiles[tile]));
}
inline void _tile_loadd(int tile, const void* p, int64_t stride) {
  _tile_zero(tile);
  for (int row = 0; row < tile_config.rows[tile]; ++row)
    std::memcpy(&tiles[tile][row], static_cast<const char*>(p) + row * stride,
                tile_config.bytes_a_row[tile]);
}
inline void _tile_stored(int tile, void* p, int64_t stride) {
  fault_unless(tile_config.rows[tile] > 0);
  for (int row = 0; row < tile_config.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(p) + row * stride, &tiles[tile][row],
                tile_config.bytes_a_row[tile]);
}

// sums[m][n] += a[m][k] . b[k][n] for pairs of bfloat16: even and odd elements are summed over k
// on their own, and then with what was there.
inline void _tile_dpbf16ps(int sums, int a, int b) {
  const int depth = tile_config.bytes_a_row[a] / 4;
  fault_unless(tile_config.rows[sums] > 0 && tile_config.rows[sums] == tile_config.rows[a] &&
               tile_config.bytes_a_row[sums] == tile_config.bytes_a_row[b] &&
               tile_config.rows[b] == depth && sums != a && sums != b && a != b);
  for (int m = 0; m < tile_config.rows[sums]; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < depth; ++k) {
      const __m512i x = _mm512_set1_epi32(tiles[a][m][k]), y = from_ints(tiles[b][k]);
      even = _mm512_fmadd_ps(even_elements(x), even_elements(y), even);
      odd = _mm512_fmadd_ps(odd_elements(x), odd_elements(y), odd);
    }
    tiles[sums][m] =
        reinterpret_cast<Ints>(reinterpret_cast<__m512>(tiles[sums][m]) + (even + odd));
  }
}
