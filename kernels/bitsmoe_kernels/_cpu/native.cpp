// What Python calls (`library.py`): the choice of the instruction set, the forward pass, and packing.
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "isa.h"
#include "layout.h"

namespace {

bool has(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    switch (isa) {
        case AVX2: return avx2;
        case AVX512: return avx2 && avx512;
        case AMX: {
            unsigned a, b, c, d;
            if (!avx512) return false;
            __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
            return (d >> 24 & 1) && (d >> 25 & 1) && amx_granted();  // AMX-TILE and AMX-INT8
        }
    }
#elif defined(__aarch64__)
    if (isa == NEON) return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#endif
    return false;
}

Forward* forward_of(int isa) {
    switch (isa) {
#if defined(__x86_64__)
        case AVX2: return forward_avx2;
        case AVX512: return forward_avx512;
        case AMX: return forward_amx;
#elif defined(__aarch64__)
        case NEON: return forward_neon;
#endif
    }
    return nullptr;
}

// Bit i of a byte goes to byte i % 4, at bit `bits` * (i / 4).
struct Spread {
    uint32_t of[3][256];
    Spread() {
        for (int c = 0; c < 3; c++)
            for (int byte = 0; byte < 256; byte++) {
                uint32_t word = 0;
                for (int i = 0; i < 8; i++) word |= (uint32_t)(byte >> i & 1) << (8 * (i % 4) + (1 << c) * (i / 4));
                of[c][byte] = word;
            }
    }
};
const Spread spread;

// Buffers of a calling thread; they end with it.
struct Buffers {
    uint8_t* at = nullptr;
    int64_t bytes = 0;
    ~Buffers() { free(at); }
};
thread_local Buffers buffers;

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// Whether this processor has an instruction set.
API int bitsmoe_has(int isa) { return has(isa); }

// Computes a layer; 0: done, 1: no memory, 2: not a layer, 3: no such instruction set.
API int bitsmoe_forward(int isa, const Call* call, int64_t chunk, int threads) {
    const Layer* layer = (const Layer*)call->layer;
    if (layer->magic != LAYER_MAGIC) return 2;
    Forward* forward = forward_of(isa);
    if (!forward) return 3;
    return forward(call, chunk, &buffers.at, &buffers.bytes, threads > 0 ? threads : omp_get_max_threads());
}

// Asks the kernel for large pages; it need not grant them.
API void bitsmoe_large_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, at = (uintptr_t)start;
    const uintptr_t from = (at + page - 1) & ~(page - 1), to = (at + bytes) & ~(page - 1);
    if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

// Brings bit-planes of some units of 16 components into one run's steps.
//
//   words       the file's codes from the matrix's first row on, [rows, row_words], 2 or 4 bytes each
//   rows, halves  for each unit: the row of its lowest plane, and which 16 bits of a word; row -1: no unit
//   bits        1, 2 or 4 planes of each unit
//   columns     the matrix's outputs, `first` the column of the file that is output 0
//   run_step    steps of the matrix before the run; `matrix_steps` all of them
//   to          the matrix's codes
API void bitsmoe_pack(const void* words, int word_bytes, int64_t row_words, const int64_t* rows, const uint8_t* halves,
                      int64_t units, int bits, int64_t first, int64_t columns, int64_t run_step, int64_t matrix_steps,
                      uint8_t* to) {
    const int c = bits == 1 ? 0 : bits == 2 ? 1 : 2;
    const uint32_t* table = spread.of[c];
    const int64_t strips = (columns + LANES - 1) / LANES;
    for (int64_t strip = 0; strip < strips; strip++) {
        const int64_t group = strip / STRIPS, in_group = strip % STRIPS;
        const int64_t together = strips - group * STRIPS < STRIPS ? strips - group * STRIPS : STRIPS;
        uint8_t* base = to + group * STRIPS * matrix_steps * STEP_BYTES + in_group * STEP_BYTES;
        const int64_t stride = together * STEP_BYTES;
        for (int64_t u = 0; u < units; u++) {
            // A unit is half a step of 1 bit, one of 2 bits, two of 4 bits.
            const int64_t step = run_step + (bits == 1 ? u / 2 : bits == 2 ? u : 2 * u);
            uint8_t* step_at = base + step * stride;
            if (bits > 1 || u % 2 == 0) memset(step_at, 0, STEP_BYTES);
            if (bits == 4) memset(step_at + stride, 0, STEP_BYTES);
            if (rows[u] < 0) continue;
            for (int64_t lane = 0; lane < LANES; lane++) {
                const int64_t output = strip * LANES + lane;
                if (output >= columns) break;
                uint32_t one = 0, two = 0;
                for (int plane = 0; plane < bits; plane++) {
                    const int64_t at = (rows[u] + plane) * row_words + first + output;
                    const uint32_t word = word_bytes == 2 ? ((const uint16_t*)words)[at]
                                                          : ((const uint32_t*)words)[at] >> (16 * halves[u]) & 0xFFFFu;
                    const uint32_t low = table[word & 255], high = table[word >> 8];
                    if (bits == 1)
                        one |= (low | high << 2) << (4 * (u & 1));
                    else if (bits == 2)
                        one |= (low | high << 4) << plane;
                    else {
                        one |= low << plane;
                        two |= high << plane;
                    }
                }
                uint32_t before;
                memcpy(&before, step_at + 4 * lane, 4);
                before |= one;
                memcpy(step_at + 4 * lane, &before, 4);
                if (bits == 4) memcpy(step_at + stride + 4 * lane, &two, 4);
            }
        }
    }
}
