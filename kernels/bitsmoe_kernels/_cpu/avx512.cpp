// The engine for AVX-512 with VNNI.
#include <immintrin.h>
#include <omp.h>
#include <string.h>

#include "isa.h"
#include "layout.h"

namespace {
#include "avx512_dots.h"

template <int ROWS>
inline void dots(const uint8_t* w, int strips, const Run& run, const int8_t* acts, int64_t token_stride,
                 int64_t row_stride, int tokens, int32_t* out) {
    vector_dots<ROWS>(w, strips, run, acts, token_stride, row_stride, tokens, out);
}

inline void enter() {}
inline void leave() {}
}  // namespace

#include "engine.h"

int forward_avx512(const Call* call, int64_t chunk, uint8_t** memory, int64_t* bytes, int threads) {
    return forward(call, chunk, memory, bytes, threads);
}
