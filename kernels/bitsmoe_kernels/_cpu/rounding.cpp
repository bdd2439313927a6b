// What Python calls to round factors and to pack codes (`rounding.py`).
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "isa.h"
#include "rounding_call.h"

namespace {

Round* round_of(int isa) {
    switch (isa) {
#if defined(__x86_64__)
        case AVX2: return round_avx2;
        case AVX512:
        case AMX: return round_avx512;
#elif defined(__aarch64__)
        case NEON: return round_neon;
#endif
    }
    return nullptr;
}

int threads_of(int threads) {
    if (threads <= 0) threads = omp_get_max_threads();
    return threads < MOST_TOGETHER ? threads : MOST_TOGETHER;
}

// One word for each column from `bits` codes of G components; row j of `words` is bit j. Returns all codes, or-ed.
template <class Word>
uint8_t pack_block(const uint8_t* codes, int64_t rows, int64_t F, int bits, Word* words) {
    constexpr int64_t COLUMNS = 64;
    uint8_t all = 0;
    for (int64_t f = 0; f < F; f += COLUMNS) {
        const int64_t columns = F - f < COLUMNS ? F - f : COLUMNS;
        Word planes[8][COLUMNS] = {};
        uint8_t seen[COLUMNS] = {};
        for (int64_t i = 0; i < rows; i++) {
            uint8_t code[COLUMNS] = {};
            memcpy(code, codes + i * F + f, columns);
            for (int64_t x = 0; x < COLUMNS; x++) seen[x] |= code[x];
            for (int j = 0; j < bits; j++)
                for (int64_t x = 0; x < COLUMNS; x++) planes[j][x] |= (Word)((Word)(code[x] >> j & 1) << i);
        }
        for (int j = 0; j < bits; j++) memcpy(words + j * F + f, planes[j], columns * sizeof(Word));
        for (int64_t x = 0; x < COLUMNS; x++) all |= seen[x];
    }
    return all;
}

template <class Word>
int64_t pack(const uint8_t* codes, int64_t C, int64_t F, const uint8_t* bits, int64_t blocks, Word* words) {
    constexpr int64_t G = 8 * sizeof(Word);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t rows = C - b * G < G ? C - b * G : G;
        if (bits[b] && pack_block(codes + b * G * F, rows, F, bits[b], words) >> bits[b]) return b;
        words += bits[b] * F;
    }
    return -1;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// Floats that `bitsmoe_round` needs in `Rounding::memory`.
API int64_t bitsmoe_rounding_floats(int kind, int64_t n, int64_t K, int64_t N, int threads) {
    threads = threads_of(threads);
    if (kind == SYSTEM) return panels_of(K) * N * PANEL + threads * ROWS * (panels_of(K) * PANEL + N);
    if (kind == LEVELS || kind == COLUMNS) return 0;
    return kind == ALONE ? threads * floats_of(1, N) : (n < threads ? n : threads) * floats_of(K, N);
}

// 0: done, 3: no such instruction set.
API int bitsmoe_round(int isa, int kind, const Rounding* call, int threads) {
    Round* round = round_of(isa);
    if (!round) return 3;
    round(kind, call, threads_of(threads));
    return 0;
}

// Codes [C, F] as bit-planes: `format/packing.py`. Words of 2 or 4 bytes, as many components to a block as a word has
// bits. Each width is at most 8. Returns the first block whose codes do not fit, else -1.
API int64_t bitsmoe_pack_codes(const uint8_t* codes, int64_t C, int64_t F, const uint8_t* bits, int64_t blocks,
                               int word_bytes, void* words) {
    if (word_bytes == 2) return pack(codes, C, F, bits, blocks, (uint16_t*)words);
    return pack(codes, C, F, bits, blocks, (uint32_t*)words);
}
