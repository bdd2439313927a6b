// The engine for AVX2 with FMA and F16C.
#include <immintrin.h>
#include <omp.h>
#include <string.h>

#include "isa.h"
#include "layout.h"

namespace {

inline __m256i broadcast(const int8_t* a) {
    int32_t four;
    memcpy(&four, a, 4);
    return _mm256_set1_epi32(four);
}

// Eight outputs. Products of a code of at most 4 bits and a digit, summed in pairs over all fields of a step, stay
// below 2^15: 8 fields of 1 bit give 2048, 4 of 2 bits 3072, 2 of 4 bits 7680. Codes of 8 bits are two of 4.
template <int BITS, int TOKENS, int ROWS>
inline void block_256(const uint8_t* w, int64_t step_stride, int steps, const int8_t* const* acts, int64_t row_stride,
                      int32_t* const* out, int64_t out_row) {
    constexpr int FIELDS = 8 / BITS;
    const __m256i mask = _mm256_set1_epi8((char)(BITS == 8 ? 15 : (1 << BITS) - 1));
    const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
    __m256i sum[TOKENS][ROWS];
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) sum[t][r] = _mm256_setzero_si256();
    for (int step = 0; step < steps; step++, w += step_stride) {
        const __m256i word = _mm256_loadu_si256((const __m256i*)w);
        _mm_prefetch((const char*)w + 4096, _MM_HINT_T0);
        if (BITS == 8) {
            const __m256i low = _mm256_and_si256(word, mask), high = _mm256_and_si256(_mm256_srli_epi16(word, 4), mask);
            for (int t = 0; t < TOKENS; t++)
                for (int r = 0; r < ROWS; r++) {
                    const __m256i a = broadcast(acts[t] + r * row_stride + step * 4);
                    sum[t][r] = _mm256_add_epi32(sum[t][r], _mm256_madd_epi16(_mm256_maddubs_epi16(low, a), ones));
                    sum[t][r] = _mm256_add_epi32(sum[t][r], _mm256_madd_epi16(_mm256_maddubs_epi16(high, a), sixteens));
                }
        } else {
            __m256i pairs[TOKENS][ROWS];
#pragma GCC unroll 8
            for (int f = 0; f < FIELDS; f++) {
                const __m256i code = _mm256_and_si256(f ? _mm256_srli_epi16(word, f * BITS) : word, mask);
                for (int t = 0; t < TOKENS; t++)
                    for (int r = 0; r < ROWS; r++) {
                        const __m256i a = broadcast(acts[t] + r * row_stride + (step * FIELDS + f) * 4);
                        const __m256i product = _mm256_maddubs_epi16(code, a);
                        pairs[t][r] = f ? _mm256_add_epi16(pairs[t][r], product) : product;
                    }
            }
            for (int t = 0; t < TOKENS; t++)
                for (int r = 0; r < ROWS; r++)
                    sum[t][r] = _mm256_add_epi32(sum[t][r], _mm256_madd_epi16(pairs[t][r], ones));
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) _mm256_storeu_si256((__m256i*)(out[t] + r * out_row), sum[t][r]);
}

template <int BITS, int ROWS>
inline void dots_256(const uint8_t* w, int strips, int steps, const int8_t* acts, int64_t token_stride,
                     int64_t row_stride, int tokens, int32_t* out) {
    constexpr int TOGETHER = ROWS == 2 ? 2 : 1;
    const int64_t step_stride = strips * STEP_BYTES, out_row = strips * LANES, out_token = ROWS * out_row;
    const int8_t* a[TOGETHER];
    int32_t* o[TOGETHER];
    for (int half = 0; half < 2 * strips; half++) {
        const uint8_t* at = w + half * (STEP_BYTES / 2);
        int32_t* to = out + half * (LANES / 2);
        int t = 0;
        for (; t + TOGETHER <= tokens; t += TOGETHER) {
            for (int i = 0; i < TOGETHER; i++) {
                a[i] = acts + (t + i) * token_stride;
                o[i] = to + (t + i) * out_token;
            }
            block_256<BITS, TOGETHER, ROWS>(at, step_stride, steps, a, row_stride, o, out_row);
        }
        for (; t < tokens; t++) {
            a[0] = acts + t * token_stride;
            o[0] = to + t * out_token;
            block_256<BITS, 1, ROWS>(at, step_stride, steps, a, row_stride, o, out_row);
        }
    }
}

template <int ROWS>
inline void dots(const uint8_t* w, int strips, const Run& run, const int8_t* acts, int64_t token_stride,
                 int64_t row_stride, int tokens, int32_t* out) {
    switch (run.bits) {
        case 1: dots_256<1, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out); break;
        case 2: dots_256<2, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out); break;
        case 4: dots_256<4, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out); break;
        default: dots_256<8, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out);
    }
}

inline __m256 widen_256(const uint16_t* w, int kind) {
    const __m128i v = _mm_loadu_si128((const __m128i*)w);
    return kind ? _mm256_cvtph_ps(v) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

inline void dense_strip(const uint16_t* w, int kind, int64_t K, const float* const* x, int tokens, float* y,
                        int64_t y_stride) {
    for (int t = 0; t < tokens; t++) {
        // Even and odd inputs apart, as with AVX-512, so that both give the same bits.
        __m256 sum[2][2];
        for (int i = 0; i < 2; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
        for (int64_t k = 0; k < K; k++)
            for (int h = 0; h < 2; h++)
                sum[k & 1][h] = _mm256_fmadd_ps(widen_256(w + k * LANES + 8 * h, kind), _mm256_set1_ps(x[t][k]),
                                                sum[k & 1][h]);
        for (int h = 0; h < 2; h++) _mm256_storeu_ps(y + t * y_stride + 8 * h, _mm256_add_ps(sum[0][h], sum[1][h]));
    }
}

inline void enter() {}
inline void leave() {}
}  // namespace

#include "engine.h"

int forward_avx2(const Call* call, int64_t chunk, uint8_t** memory, int64_t* bytes, int threads) {
    return forward(call, chunk, memory, bytes, threads);
}
