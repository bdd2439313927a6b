// Dot products with AVX-512 VNNI. Included inside an unnamed namespace.

template <int BITS, int WIDTH, int TOKENS, int ROWS>
inline void block_512(const uint8_t* w, int64_t step_stride, int steps, const int8_t* const* acts, int64_t row_stride,
                      int32_t* const* out, int64_t out_row) {
    constexpr int FIELDS = 8 / BITS;
    const __m512i mask = _mm512_set1_epi8((char)((1 << BITS) - 1));
    __m512i sum[WIDTH][TOKENS][ROWS];
    for (int s = 0; s < WIDTH; s++)
        for (int t = 0; t < TOKENS; t++)
            for (int r = 0; r < ROWS; r++) sum[s][t][r] = _mm512_setzero_si512();
    for (int step = 0; step < steps; step++, w += step_stride) {
        __m512i word[WIDTH];
#pragma GCC unroll 4
        for (int s = 0; s < WIDTH; s++) {
            word[s] = _mm512_loadu_si512(w + s * STEP_BYTES);
            _mm_prefetch((const char*)w + 8192 + s * STEP_BYTES, _MM_HINT_T1);
            _mm_prefetch((const char*)w + 1024 + s * STEP_BYTES, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int f = 0; f < FIELDS; f++) {
#pragma GCC unroll 4
            for (int s = 0; s < WIDTH; s++) {
                __m512i code = word[s];
                if (BITS < 8) code = _mm512_and_si512(f ? _mm512_srli_epi16(code, f * BITS) : code, mask);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) {
                        int32_t four;
                        memcpy(&four, acts[t] + r * row_stride + (step * FIELDS + f) * 4, 4);
                        sum[s][t][r] = _mm512_dpbusd_epi32(sum[s][t][r], code, _mm512_set1_epi32(four));
                    }
            }
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++)
            for (int s = 0; s < WIDTH; s++) _mm512_storeu_si512(out[t] + r * out_row + s * LANES, sum[s][t][r]);
}

template <int BITS, int ROWS>
inline void dots_512(const uint8_t* w, int strips, int steps, const int8_t* acts, int64_t token_stride,
                     int64_t row_stride, int tokens, int32_t* out) {
    const int64_t step_stride = strips * STEP_BYTES, out_row = strips * LANES, out_token = ROWS * out_row;
    const int8_t* a[4];
    int32_t* o[4];
    int t = 0;
    for (; t + 4 <= tokens; t += 4)
        for (int s = 0; s < strips; s++) {
            for (int i = 0; i < 4; i++) {
                a[i] = acts + (t + i) * token_stride;
                o[i] = out + (t + i) * out_token + s * LANES;
            }
            block_512<BITS, 1, 4, ROWS>(w + s * STEP_BYTES, step_stride, steps, a, row_stride, o, out_row);
        }
    for (; t < tokens; t++) {
        a[0] = acts + t * token_stride;
        o[0] = out + t * out_token;
        switch (strips) {
            case 4: block_512<BITS, 4, 1, ROWS>(w, step_stride, steps, a, row_stride, o, out_row); break;
            case 3: block_512<BITS, 3, 1, ROWS>(w, step_stride, steps, a, row_stride, o, out_row); break;
            case 2: block_512<BITS, 2, 1, ROWS>(w, step_stride, steps, a, row_stride, o, out_row); break;
            default: block_512<BITS, 1, 1, ROWS>(w, step_stride, steps, a, row_stride, o, out_row);
        }
    }
}

template <int ROWS>
inline void vector_dots(const uint8_t* w, int strips, const Run& run, const int8_t* acts, int64_t token_stride,
                        int64_t row_stride, int tokens, int32_t* out) {
    switch (run.bits) {
        case 1: dots_512<1, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out); break;
        case 2: dots_512<2, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out); break;
        case 4: dots_512<4, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out); break;
        default: dots_512<8, ROWS>(w, strips, run.steps, acts, token_stride, row_stride, tokens, out);
    }
}

inline __m512 widen_512(const uint16_t* w, int kind) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)w);
    return kind ? _mm512_cvtph_ps(v) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

template <int TOKENS>
inline void dense_512(const uint16_t* w, int kind, int64_t K, const float* const* x, float* y, int64_t y_stride) {
    __m512 sum[TOKENS][2];
    for (int t = 0; t < TOKENS; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 2 <= K; k += 2)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const __m512 v = widen_512(w + (k + i) * LANES, kind);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++)
                sum[t][i] = _mm512_fmadd_ps(v, _mm512_set1_ps(x[t][k + i]), sum[t][i]);
        }
    if (k < K)
        for (int t = 0; t < TOKENS; t++)
            sum[t][0] = _mm512_fmadd_ps(widen_512(w + k * LANES, kind), _mm512_set1_ps(x[t][k]), sum[t][0]);
    for (int t = 0; t < TOKENS; t++) _mm512_storeu_ps(y + t * y_stride, _mm512_add_ps(sum[t][0], sum[t][1]));
}

inline void dense_strip(const uint16_t* w, int kind, int64_t K, const float* const* x, int tokens, float* y,
                        int64_t y_stride) {
    int t = 0;
    for (; t + 8 <= tokens; t += 8) dense_512<8>(w, kind, K, x + t, y + t * y_stride, y_stride);
    for (; t < tokens; t++) dense_512<1>(w, kind, K, x + t, y + t * y_stride, y_stride);
}
