// The engine for AVX-512 with VNNI and AMX: from a few tokens of an expert on, tiles multiply.
#include <immintrin.h>
#include <omp.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "isa.h"
#include "layout.h"

namespace {
#include "avx512_dots.h"

enum { TILE_TOKENS = 16, TILE_K = 64, FEWEST = 6 };

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Codes of one strip as bytes: 64 components in each tile of 16 rows; rows past the last step are zero.
template <int BITS>
inline void unpack(const uint8_t* w, int64_t step_stride, int steps, uint8_t* to, int tiles) {
    constexpr int FIELDS = 8 / BITS;
    const __m512i mask = _mm512_set1_epi8((char)((1 << BITS) - 1));
    for (int s = 0; s < steps; s++) {
        const __m512i word = _mm512_loadu_si512(w + s * step_stride);
#pragma GCC unroll 8
        for (int f = 0; f < FIELDS; f++) {
            __m512i code = word;
            if (BITS < 8) code = _mm512_and_si512(f ? _mm512_srli_epi16(word, f * BITS) : word, mask);
            _mm512_storeu_si512(to + (s * FIELDS + f) * 64, code);
        }
    }
    for (int row = steps * FIELDS; row < tiles * 16; row++) _mm512_storeu_si512(to + row * 64, _mm512_setzero_si512());
}

constexpr int PIECE = 8;  // tiles of 64 components that are unpacked at once, of two strips: 16 KiB

inline void unpack_strip(const uint8_t* w, const Run& run, int64_t step_stride, int steps, uint8_t* to, int tiles) {
    switch (run.bits) {
        case 1: unpack<1>(w, step_stride, steps, to, tiles); break;
        case 2: unpack<2>(w, step_stride, steps, to, tiles); break;
        case 4: unpack<4>(w, step_stride, steps, to, tiles); break;
        default: unpack<8>(w, step_stride, steps, to, tiles);
    }
}

// Sums of tiles 0 to 3 (two digits of two strips) to their places.
inline void store_tiles(int32_t* out, int64_t out_token, int64_t out_row, int count, bool second, bool add) {
    alignas(64) int32_t sums[4][16 * LANES];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (second) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
    for (int i = 0; i < count; i++)
        for (int d = 0; d < (second ? 4 : 2); d++) {
            int32_t* to = out + i * out_token + d % 2 * out_row + d / 2 * LANES;
            __m512i v = _mm512_load_si512(sums[d] + i * LANES);
            if (add) v = _mm512_add_epi32(v, _mm512_loadu_si512(to));
            _mm512_storeu_si512(to, v);
        }
}

template <int ROWS>
inline void tile_dots(const uint8_t* w, int strips, const Run& run, const int8_t* acts, int64_t token_stride,
                      int64_t row_stride, int tokens, int32_t* out) {
    alignas(64) uint8_t codes[2][PIECE * 1024];
    const int fields = 8 / run.bits, tiles = (run.steps * fields + 15) / 16, steps_a_tile = 16 / fields;
    const int64_t out_row = strips * LANES, out_token = ROWS * out_row, step_stride = strips * STEP_BYTES;
    for (int s = 0; s < strips; s += 2) {
        const bool second = s + 1 < strips;
        for (int first = 0; first < tiles; first += PIECE) {
            const int n = tiles - first < PIECE ? tiles - first : PIECE;
            const int from = first * steps_a_tile;
            const int steps = run.steps - from < n * steps_a_tile ? run.steps - from : n * steps_a_tile;
            const uint8_t* at = w + s * STEP_BYTES + from * step_stride;
            unpack_strip(at, run, step_stride, steps, codes[0], n);
            if (second) unpack_strip(at + STEP_BYTES, run, step_stride, steps, codes[1], n);
            for (int t = 0; t < tokens; t += TILE_TOKENS)
                for (int r = 0; r < ROWS; r += 2) {
                    const int8_t* a = acts + t * token_stride + r * row_stride + first * TILE_K;
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                    for (int k = 0; k < n; k++) {
                        _tile_loadd(4, a + k * TILE_K, token_stride);
                        _tile_loadd(6, codes[0] + k * 1024, 64);
                        _tile_dpbsud(0, 4, 6);
                        _tile_loadd(5, a + row_stride + k * TILE_K, token_stride);
                        _tile_dpbsud(1, 5, 6);
                        if (second) {
                            _tile_loadd(7, codes[1] + k * 1024, 64);
                            _tile_dpbsud(2, 4, 7);
                            _tile_dpbsud(3, 5, 7);
                        }
                    }
                    const int count = tokens - t < TILE_TOKENS ? tokens - t : TILE_TOKENS;
                    store_tiles(out + t * out_token + r * out_row + s * LANES, out_token, out_row, count, second, first);
                }
        }
    }
}

template <int ROWS>
inline void dots(const uint8_t* w, int strips, const Run& run, const int8_t* acts, int64_t token_stride,
                 int64_t row_stride, int tokens, int32_t* out) {
    if (tokens < FEWEST)
        vector_dots<ROWS>(w, strips, run, acts, token_stride, row_stride, tokens, out);
    else
        tile_dots<ROWS>(w, strips, run, acts, token_stride, row_stride, tokens, out);
}

// Tiles of 16 rows of 64 bytes, for this thread until `leave`.
inline void enter() {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.rows[i] = 16;
        config.row_bytes[i] = 64;
    }
    _tile_loadconfig(&config);
}
inline void leave() { _tile_release(); }
}  // namespace

#include "engine.h"

bool amx_granted() {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

int forward_amx(const Call* call, int64_t chunk, uint8_t** memory, int64_t* bytes, int threads) {
    return forward(call, chunk, memory, bytes, threads);
}
