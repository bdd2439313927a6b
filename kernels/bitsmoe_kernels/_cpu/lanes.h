// Sixteen float32 lanes, alike on every instruction set: AVX-512, AVX2 with FMA, or plain loops that the compiler turns
// into NEON. Every operation rounds once per lane, and `sum` adds in one order, so results are the same bits everywhere.
#ifndef BITSMOE_LANES_H
#define BITSMOE_LANES_H
#include <stdint.h>
#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands within its own header for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace {

constexpr int64_t WIDTH = 16;

#if defined(__AVX512F__)
struct V {
    __m512 v;
};
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }
inline V fill(float x) { return {_mm512_set1_ps(x)}; }
inline V operator+(V x, V y) { return {_mm512_add_ps(x.v, y.v)}; }
inline V operator-(V x, V y) { return {_mm512_sub_ps(x.v, y.v)}; }
inline V operator*(V x, V y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline V operator/(V x, V y) { return {_mm512_div_ps(x.v, y.v)}; }
inline V fused(V x, V y, V z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
inline V fused_minus(V x, V y, V z) { return {_mm512_fnmadd_ps(x.v, y.v, z.v)}; }
inline V least(V x, V y) { return {_mm512_min_ps(x.v, y.v)}; }
inline V most(V x, V y) { return {_mm512_max_ps(x.v, y.v)}; }
inline V where_positive(V x, V y) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), y.v)};
}
inline V unless_zero(V x, V y) {
    return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), x.v)};
}
inline void store_bytes(uint8_t* p, V x) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
inline V load_bytes(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline __m256 fold(V x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x.v),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)));
}
#elif defined(__AVX2__)
struct V {
    __m256 v[2];
};
inline V load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void store(float* p, V x) {
    _mm256_storeu_ps(p, x.v[0]);
    _mm256_storeu_ps(p + 8, x.v[1]);
}
inline V fill(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline V operator+(V x, V y) { return {{_mm256_add_ps(x.v[0], y.v[0]), _mm256_add_ps(x.v[1], y.v[1])}}; }
inline V operator-(V x, V y) { return {{_mm256_sub_ps(x.v[0], y.v[0]), _mm256_sub_ps(x.v[1], y.v[1])}}; }
inline V operator*(V x, V y) { return {{_mm256_mul_ps(x.v[0], y.v[0]), _mm256_mul_ps(x.v[1], y.v[1])}}; }
inline V operator/(V x, V y) { return {{_mm256_div_ps(x.v[0], y.v[0]), _mm256_div_ps(x.v[1], y.v[1])}}; }
inline V fused(V x, V y, V z) {
    return {{_mm256_fmadd_ps(x.v[0], y.v[0], z.v[0]), _mm256_fmadd_ps(x.v[1], y.v[1], z.v[1])}};
}
inline V fused_minus(V x, V y, V z) {
    return {{_mm256_fnmadd_ps(x.v[0], y.v[0], z.v[0]), _mm256_fnmadd_ps(x.v[1], y.v[1], z.v[1])}};
}
inline V least(V x, V y) { return {{_mm256_min_ps(x.v[0], y.v[0]), _mm256_min_ps(x.v[1], y.v[1])}}; }
inline V most(V x, V y) { return {{_mm256_max_ps(x.v[0], y.v[0]), _mm256_max_ps(x.v[1], y.v[1])}}; }
inline __m256 where_positive(__m256 x, __m256 y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ), y);
}
inline V where_positive(V x, V y) { return {{where_positive(x.v[0], y.v[0]), where_positive(x.v[1], y.v[1])}}; }
inline __m256 unless_zero(__m256 x, __m256 y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
inline V unless_zero(V x, V y) { return {{unless_zero(x.v[0], y.v[0]), unless_zero(x.v[1], y.v[1])}}; }
inline void store_bytes(uint8_t* p, V x) {
    const __m256i a = _mm256_cvtps_epi32(x.v[0]), b = _mm256_cvtps_epi32(x.v[1]);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline V load_bytes(const uint8_t* p) {
    return {{_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
             _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))}};
}
inline __m256 fold(V x) { return _mm256_add_ps(x.v[0], x.v[1]); }
#else
struct V {
    float v[WIDTH];
};
#define EACH(expression)                                   \
    V out;                                                 \
    for (int i = 0; i < WIDTH; i++) out.v[i] = expression; \
    return out
inline V load(const float* p) { EACH(p[i]); }
inline void store(float* p, V x) {
    for (int i = 0; i < WIDTH; i++) p[i] = x.v[i];
}
inline V fill(float x) { EACH(x); }
inline V operator+(V x, V y) { EACH(x.v[i] + y.v[i]); }
inline V operator-(V x, V y) { EACH(x.v[i] - y.v[i]); }
inline V operator*(V x, V y) { EACH(x.v[i] * y.v[i]); }
inline V operator/(V x, V y) { EACH(x.v[i] / y.v[i]); }
inline V fused(V x, V y, V z) { EACH(__builtin_fmaf(x.v[i], y.v[i], z.v[i])); }
inline V fused_minus(V x, V y, V z) { EACH(__builtin_fmaf(-x.v[i], y.v[i], z.v[i])); }
inline V least(V x, V y) { EACH(x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
inline V most(V x, V y) { EACH(x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
inline V where_positive(V x, V y) { EACH(x.v[i] > 0 ? y.v[i] : 0.0f); }
inline V unless_zero(V x, V y) { EACH(x.v[i] != 0 ? x.v[i] : y.v[i]); }
inline void store_bytes(uint8_t* p, V x) {
    for (int i = 0; i < WIDTH; i++) p[i] = (uint8_t)x.v[i];
}
inline V load_bytes(const uint8_t* p) { EACH((float)p[i]); }
inline float sum(V x) {
    for (int step = WIDTH / 2; step; step /= 2)
        for (int i = 0; i < step; i++) x.v[i] += x.v[i + step];
    return x.v[0];
}
#undef EACH
#endif

#if defined(__AVX2__)
inline float sum(V x) {
    const __m256 eight = fold(x);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#endif

}  // namespace
#endif
