// The engine for 64-bit ARM with the dot product instructions.
#include <arm_neon.h>
#include <omp.h>
#include <string.h>

#include "isa.h"
#include "layout.h"

namespace {

inline int8x16_t broadcast(const int8_t* a) {
    int32_t four;
    memcpy(&four, a, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// Four outputs. Codes of 8 bits would not be positive as signed bytes, so they are two of 4.
template <int BITS, int TOKENS, int ROWS>
inline void block_128(const uint8_t* w, int64_t step_stride, int steps, const int8_t* const* acts, int64_t row_stride,
                      int32_t* const* out, int64_t out_row) {
    constexpr int FIELDS = 8 / BITS;
    const uint8x16_t mask = vdupq_n_u8(BITS == 8 ? 15 : (1 << BITS) - 1);
    int32x4_t sum[TOKENS][ROWS], high_sum[TOKENS][ROWS];
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) sum[t][r] = high_sum[t][r] = vdupq_n_s32(0);
    for (int step = 0; step < steps; step++, w += step_stride) {
        const uint8x16_t word = vld1q_u8(w);
        if (BITS == 8) {
            const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(word, mask));
            const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(word, 4));
            for (int t = 0; t < TOKENS; t++)
                for (int r = 0; r < ROWS; r++) {
                    const int8x16_t a = broadcast(acts[t] + r * row_stride + step * 4);
                    sum[t][r] = vdotq_s32(sum[t][r], low, a);
                    high_sum[t][r] = vdotq_s32(high_sum[t][r], high, a);
                }
        } else {
#pragma GCC unroll 8
            for (int f = 0; f < FIELDS; f++) {
                const uint8x16_t moved = f ? vshlq_u8(word, vdupq_n_s8((int8_t)(-f * BITS))) : word;
                const int8x16_t code = vreinterpretq_s8_u8(vandq_u8(moved, mask));
                for (int t = 0; t < TOKENS; t++)
                    for (int r = 0; r < ROWS; r++)
                        sum[t][r] =
                            vdotq_s32(sum[t][r], code, broadcast(acts[t] + r * row_stride + (step * FIELDS + f) * 4));
            }
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) {
            if (BITS == 8) sum[t][r] = vmlaq_n_s32(sum[t][r], high_sum[t][r], 16);
            vst1q_s32(out[t] + r * out_row, sum[t][r]);
        }
}

template <int BITS, int ROWS>
inline void dots_128(const uint8_t* w, int strips, int steps, const int8_t* acts, int64_t token_stride,
                     int64_t row_stride, int tokens, int32_t* out) {
    constexpr int TOGETHER = 2;
    const int64_t step_stride = strips * STEP_BYTES, out_row = strips * LANES, out_token = ROWS * out_row;
    const int8_t* a[TOGETHER];
    int32_t* o[TOGETHER];
    for (int quarter = 0; quarter < 4 * strips; quarter++) {
        const uint8_t* at = w + quarter * (STEP_BYTES / 4);
        int32_t* to = out + quarter * (LANES / 4);
        int t = 0;
        for (; t + TOGETHER <= tokens; t += TOGETHER) {
            for (int i = 0; i < TOGETHER; i++) {
                a[i] = acts + (t + i) * token_stride;
                o[i] = to + (t + i) * out_token;
            }
            block_128<BITS, TOGETHER, ROWS>(at, step_stride, steps, a, row_stride, o, out_row);
        }
        for (; t < tokens; t++) {
            a[0] = acts + t * token_stride;
            o[0] = to + t * out_token;
            block_128<BITS, 1, ROWS>(at, step_stride, steps, a, row_stride, o, out_row);
        }
    }
}

template <int ROWS>
inline void dots(const uint8_t* w, int strips, const Run& run, const int8_t* acts, int64_t token_stride,
                 int64_t row_stride, int tokens, int32_t* out) {
    switch (run.bits) {
        case 1: dots_128<1, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out); break;
        case 2: dots_128<2, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out); break;
        case 4: dots_128<4, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out); break;
        default: dots_128<8, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out);
    }
}

inline float32x4_t widen_128(const uint16_t* w, int kind) {
    const uint16x4_t v = vld1_u16(w);
    return kind ? vcvt_f32_f16(vreinterpret_f16_u16(v)) : vreinterpretq_f32_u32(vshll_n_u16(v, 16));
}

inline void dense_strip(const uint16_t* w, int kind, int64_t K, const float* const* x, int tokens, float* y,
                        int64_t y_stride) {
    for (int t = 0; t < tokens; t++)
        for (int q = 0; q < 4; q++) {
            float32x4_t sum[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};
            for (int64_t k = 0; k < K; k++)
                sum[k & 1] = vfmaq_n_f32(sum[k & 1], widen_128(w + k * LANES + 4 * q, kind), x[t][k]);
            vst1q_f32(y + t * y_stride + 4 * q, vaddq_f32(sum[0], sum[1]));
        }
}

inline void enter() {}
inline void leave() {}
}  // namespace

#include "engine.h"

int forward_neon(const Call* call, int64_t chunk, uint8_t** memory, int64_t* bytes, int threads) {
    return forward(call, chunk, memory, bytes, threads);
}
