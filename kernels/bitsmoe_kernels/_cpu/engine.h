// The forward pass of a layer's routed experts, compiled once for each instruction set.
//
// Activations become digits of 8 bits: ROWS of them make one fixed-point number of 15 bits (ROWS 2, for activations of
// 16 bits) or 31 bits (ROWS 4, for float32). Dot products of digits and codes are integers and exact, so results do
// not depend on the instruction set, on the number of threads or on which tokens are computed together.
//
// Before this file an instruction set defines, in an unnamed namespace,
//   dots<ROWS>(codes, strips, run, acts, row_stride, tokens, out)   integer dot products of one run
//   dense_strip(w, kind, K, x, tokens, y, y_stride)                 16 outputs of 16-bit weights
//   enter(), leave()                                                what a thread must do before and after
// Nothing of the C++ library is used here: its inline functions would be compiled for this instruction set, and the
// linker could take them for the whole program.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "layout.h"

namespace {

constexpr int64_t BLOCK = 64;  // tokens of one call of `dots`

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t up_to(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline float of_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

// float16 by integers: no instruction set has to have it.
inline float of_half(uint16_t h) {
    uint32_t magnitude = h & 0x7FFFu;
    float value = of_bits(magnitude << 13) * of_bits(0x77800000);  // 2^112 moves the exponent
    uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
    return of_bits((bits_of(value) | special) | (uint32_t)(h & 0x8000u) << 16);
}
inline uint16_t to_half(float f) {
    uint32_t u = bits_of(f), sign = u >> 16 & 0x8000u;
    u &= 0x7FFFFFFFu;
    if (u > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (u >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);
    if (u < 0x38800000u) {  // subnormal: the sum's rounding is the wanted one
        float g = of_bits(u) + 0.5f;
        return (uint16_t)(sign | (bits_of(g) - 0x3F000000u));
    }
    u += 0xC8000FFFu + (u >> 13 & 1);
    return (uint16_t)(sign | u >> 13);
}
inline float of_brain(uint16_t b) { return of_bits((uint32_t)b << 16); }
inline uint16_t to_brain(float f) {
    uint32_t u = bits_of(f);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7FFFu + (u >> 16 & 1)) >> 16);
}

// e^v, within 2 ulp; at most e^88.
inline float exponential(float v) {
    v = v > 88.0f ? 88.0f : v;
    v = v < -87.0f ? -87.0f : v;
    float shifted = v * 1.44269504f + 12582912.0f;  // the integer stands in the lowest bits
    float n = shifted - 12582912.0f;
    float r = __builtin_fmaf(n, -0.693359375f, v);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691e-4f;
    p = __builtin_fmaf(p, r, 1.3981999e-3f);
    p = __builtin_fmaf(p, r, 8.3334519e-3f);
    p = __builtin_fmaf(p, r, 4.1665795e-2f);
    p = __builtin_fmaf(p, r, 1.6666665e-1f);
    p = __builtin_fmaf(p, r, 5.0000001e-1f);
    p = __builtin_fmaf(p * r, r, r) + 1.0f;
    return of_bits(bits_of(p) + (bits_of(shifted) << 23));
}

// h = act(gate, up), or act(up); the activation by its number in expert_mlp.py
inline void gated(int64_t activation, const float* gate, const float* up, float* h, int64_t n) {
    if (activation == 1) {  // gelu by tanh, in terms of the sigmoid
        for (int64_t i = 0; i < n; i++) {
            const float g = gate[i], u = 1.59576912f * g * __builtin_fmaf(0.044715f * g, g, 1.0f);
            h[i] = g / (1.0f + exponential(-u)) * up[i];
        }
        return;
    }
    if (activation == 2) {  // swigluoai; comparisons that let NaN through
        for (int64_t i = 0; i < n; i++) {
            const float g = gate[i] > 7.0f ? 7.0f : gate[i], u = up[i] > 7.0f ? 7.0f : up[i];
            h[i] = g / (1.0f + exponential(-1.702f * g)) * ((u < -7.0f ? -7.0f : u) + 1.0f);
        }
        return;
    }
    if (activation == 3) {  // silu of clamped numbers
        for (int64_t i = 0; i < n; i++) {
            const float g = gate[i] > 10.0f ? 10.0f : gate[i], u = up[i] > 10.0f ? 10.0f : up[i];
            h[i] = g / (1.0f + exponential(-g)) * (u < -10.0f ? -10.0f : u);
        }
        return;
    }
    if (activation == 4) {  // relu2 of up alone; a comparison that lets NaN through
        for (int64_t i = 0; i < n; i++) {
            const float u = up[i] < 0.0f ? 0.0f : up[i];
            h[i] = u * u;
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) h[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// One matrix's activations of one token.
struct Acts {
    int8_t* digits;   // [ROWS][row bytes]
    float* scale;     // [MAX_RUNS]
    int32_t* centre;  // [MAX_RUNS][ROWS]: twice_half times the sum of the digits
};

// Digits of one token for one matrix: scale[c] * source[index[c]] for each component c.
template <int ROWS>
void take_acts(const uint8_t* base, const Matrix& m, const float* source, int64_t row_stride, Acts to,
               float* __restrict scratch) {
    const Run* runs = (const Run*)(base + m.run_at);
    const uint16_t* index = m.index_at < 0 ? nullptr : (const uint16_t*)(base + m.index_at);
    const float* scales = m.scale_at < 0 ? nullptr : (const float*)(base + m.scale_at);
    for (int64_t i = 0; i < m.runs; i++) {
        const Run& run = runs[i];
        const int64_t n = run.count;
        float* __restrict v = scratch;
        if (index) {
            const uint16_t* at = index + run.component;
            const float* s = scales + run.component;
            for (int64_t c = 0; c < n; c++) v[c] = source[at[c]] * s[c];
        } else {
            // The identity: padding of the last step reads nothing.
            const int64_t have = m.inputs < n ? m.inputs : n;
            memcpy(v, source, (size_t)have * sizeof(float));
            for (int64_t c = have; c < n; c++) v[c] = 0.0f;
        }
        const int64_t padded = up_to(n, ACT_ALIGN);
        for (int64_t c = n; c < padded; c++) v[c] = 0.0f;
        int32_t most = 0;
        for (int64_t c = 0; c < padded; c++) {
            int32_t magnitude = (int32_t)(bits_of(v[c]) & 0x7FFFFFFFu);
            most = magnitude > most ? magnitude : most;
        }
        const float largest = of_bits((uint32_t)most);
        // The largest digit is 127 and the others at least -128.
        const float limit = ROWS == 2 ? 32639.0f : 2130706432.0f;
        const bool finite = most < 0x7F800000;
        const bool some = finite && largest > 1e-28f;
        const float inverse = some ? limit / largest : 0.0f;
        to.scale[i] = !finite ? of_bits(0x7FC00000) : some ? 0.5f * (float)(1 << run.shift) * (largest / limit) : 0.0f;
        int32_t sums[ROWS] = {0};
        int8_t* digits = to.digits + run.act;
        if (!some) {
            for (int r = 0; r < ROWS; r++) memset(digits + r * row_stride, 0, (size_t)padded);
        } else if (ROWS == 2) {
            int8_t *low = digits, *high = digits + row_stride;
            int32_t low_sum = 0, high_sum = 0;
            for (int64_t c = 0; c < padded; c++) {
                // Adding 1.5 * 2^23 rounds to the nearest integer, even at ties, for magnitudes below 2^22.
                int32_t q = (int32_t)(bits_of(v[c] * inverse + 12582912.0f)) - 0x4B400000;
                int32_t h = (q + 128) >> 8, l = q - h * 256;
                low[c] = (int8_t)l;
                high[c] = (int8_t)h;
                low_sum += l;
                high_sum += h;
            }
            sums[0] = low_sum;
            sums[1] = high_sum;
        } else {
            for (int64_t c = 0; c < padded; c++) {
                int32_t q = (int32_t)(v[c] * inverse);  // float32 has 24 bits: nearly always an integer already
                for (int r = 0; r < ROWS; r++) {
                    int32_t l = (int32_t)(int8_t)(q & 255);
                    digits[r * row_stride + c] = (int8_t)l;
                    sums[r] += l;
                    q = (q - l) >> 8;
                }
            }
        }
        for (int r = 0; r < ROWS; r++) to.centre[i * ROWS + r] = run.twice_half * sums[r];
    }
}

// y[token][64] = one group of a matrix's outputs for at most BLOCK tokens; compensators excepted.
template <int ROWS>
void group_product(const uint8_t* base, const Matrix& m, int64_t group, const int8_t* digits, int64_t token_stride,
                   int64_t row_stride, const float* scales, const int32_t* centres, int tokens, float* y) {
    const Run* runs = (const Run*)(base + m.run_at);
    const int64_t all = ceil_div(m.outputs, LANES);
    const int strips = (int)(all - group * STRIPS < STRIPS ? all - group * STRIPS : STRIPS);
    const uint8_t* codes = base + m.codes_at + group * STRIPS * m.steps * STEP_BYTES;
    alignas(64) int32_t sums[BLOCK * ROWS * GROUP];
    const int64_t width = strips * LANES;
    for (int t = 0; t < tokens; t++)
        for (int n = 0; n < GROUP; n++) y[t * GROUP + n] = 0.0f;
    for (int64_t i = 0; i < m.runs; i++) {
        const Run& run = runs[i];
        dots<ROWS>(codes, strips, run, digits + run.act, token_stride, row_stride, tokens, sums);
        codes += (int64_t)run.steps * strips * STEP_BYTES;
        for (int t = 0; t < tokens; t++) {
            const float scale = scales[t * MAX_RUNS + i];
            const int32_t* centre = centres + (t * MAX_RUNS + i) * ROWS;
            const int32_t* s = sums + t * ROWS * width;
            float* out = y + t * GROUP;
            for (int n = 0; n < width; n++) {
                float v = (float)(2 * s[n] - centre[0]);
                float place = 1.0f;
                for (int r = 1; r < ROWS; r++) {
                    place *= 256.0f;
                    v = __builtin_fmaf((float)(2 * s[r * width + n] - centre[r]), place, v);
                }
                out[n] = __builtin_fmaf(v, scale, out[n]);
            }
        }
    }
    const float* feature = (const float*)(base + m.feature_at) + group * GROUP;
    for (int t = 0; t < tokens; t++)
        for (int n = 0; n < width; n++) y[t * GROUP + n] *= feature[n];
}

// Adds a compensator's part: y += out^T inner, where inner = in source was computed before.
void add_compensator(const uint8_t* base, const Matrix& m, int64_t group, const float* inner, float* y) {
    const int64_t padded = up_to(m.outputs, LANES);
    const uint16_t* out = (const uint16_t*)(base + m.out_at) + group * GROUP;
    const int64_t width = padded - group * GROUP < GROUP ? padded - group * GROUP : GROUP;
    for (int64_t j = 0; j < m.rank; j++)
        for (int n = 0; n < width; n++) y[n] = __builtin_fmaf(inner[j], of_half(out[j * padded + n]), y[n]);
}

void compensator_inner(const uint8_t* base, const Matrix& m, const float* source, float* inner) {
    const uint16_t* in = (const uint16_t*)(base + m.in_at);
    for (int64_t j = 0; j < m.rank; j++) {
        float part[LANES] = {0};
        const uint16_t* row = in + j * m.inputs;
        const int64_t whole = m.inputs / LANES * LANES;
        for (int64_t k = 0; k < whole; k += LANES)
            for (int64_t l = 0; l < LANES; l++)
                part[l] = __builtin_fmaf(of_half(row[k + l]), source[k + l], part[l]);
        for (int64_t k = whole; k < m.inputs; k++)
            part[k - whole] = __builtin_fmaf(of_half(row[k]), source[k], part[k - whole]);
        float sum = 0.0f;
        for (int l = 0; l < LANES; l++) sum += part[l];
        inner[j] = sum;
    }
}

// Cuts one block of memory, which stays with the calling thread for its next call.
struct Scratch {
    uint8_t* at;
    template <class T>
    T* take(int64_t n) {
        T* p = (T*)at;
        at += up_to(n * (int64_t)sizeof(T), 64);
        return p;
    }
};

struct ActStore {
    int8_t* digits;
    float* scale;
    int32_t* centre;
    float* inner;  // of compensators
    int64_t row;   // bytes of one digit's row
    int64_t ranks;
};

struct Pass {
    const uint8_t* base;
    const Layer* layer;
    const Call* call;
    int64_t first, tokens;  // of the call's
    int64_t slots, active;
    int32_t* expert_of;   // [slots], -1: skipped
    int32_t* slot_of;     // [active]: slots sorted by expert
    int32_t* start;       // [experts + 1] in slot_of
    int32_t* used;        // experts that have slots
    int64_t num_used;
    float *x, *z, *h, *partial;
    ActStore basis, gate, up, down;  // gate: of up where experts have no gate
    int64_t next[4];      // task counters, one for each phase
};

inline const Matrix* matrices(const Pass& p, int64_t at) { return (const Matrix*)(p.base + at); }

template <int ROWS>
ActStore take_store(Scratch& s, int64_t n, int64_t row, int64_t ranks) {
    ActStore a;
    a.row = row + ACT_ALIGN;  // no power of two: rows of 16 tokens would share few lines of the cache
    a.ranks = ranks;
    // Tiles of 16 tokens read past the last one.
    a.digits = s.take<int8_t>((n + LANES) * ROWS * a.row);
    a.scale = s.take<float>(n * MAX_RUNS);
    a.centre = s.take<int32_t>(n * MAX_RUNS * ROWS);
    a.inner = s.take<float>(n * ranks);
    return a;
}

// Gives every array of a pass its place in a block of memory; the bytes that it takes.
template <int ROWS>
int64_t lay_out(Pass& p, uint8_t* memory) {
    const Layer& l = *p.layer;
    Scratch s{memory};
    p.expert_of = s.take<int32_t>(p.slots);
    p.slot_of = s.take<int32_t>(p.slots);
    p.start = s.take<int32_t>(l.experts + 1);
    p.used = s.take<int32_t>(l.experts);
    p.x = s.take<float>(p.tokens * l.hidden);
    p.z = s.take<float>(p.tokens * l.basis_rows);
    p.h = s.take<float>(p.slots * l.inner);
    p.partial = s.take<float>(p.slots * l.hidden);
    if (l.basis >= 0) p.basis = take_store<ROWS>(s, p.tokens, l.basis_acts, 0);
    p.gate = take_store<ROWS>(s, p.slots, l.input_acts, l.ranks);
    if (!l.shared_acts) p.up = take_store<ROWS>(s, p.slots, l.input_acts, 0);
    p.up.ranks = l.ranks;
    p.up.inner = s.take<float>(p.slots * l.ranks);
    p.down = take_store<ROWS>(s, p.slots, l.down_acts, l.ranks);
    return s.at - memory;
}

// Which expert each slot goes to, and slots in the order of experts. As `reference.expert_of_slots`.
inline void route(Pass& p) {
    const Call& c = *p.call;
    const int64_t experts = p.layer->experts;
    const int64_t known = c.map ? c.map_size : experts;
    for (int64_t e = 0; e <= experts; e++) p.start[e] = 0;
    for (int64_t s = 0; s < p.slots; s++) {
        const int64_t at = p.first * c.top_k + s;
        int64_t id = c.id_bytes == 8 ? ((const int64_t*)c.ids)[at] : ((const int32_t*)c.ids)[at];
        int64_t e = -1;
        if (id >= 0 && id < known) {
            e = c.map ? c.map[id] : id;
            if (e >= experts) e = -1;
        }
        p.expert_of[s] = (int32_t)(e < 0 ? -1 : e);
        if (e >= 0) p.start[e + 1]++;
    }
    p.num_used = 0;
    for (int64_t e = 0; e < experts; e++) {
        if (p.start[e + 1]) p.used[p.num_used++] = (int32_t)e;
        p.start[e + 1] += p.start[e];
    }
    p.active = p.start[experts];
    for (int64_t s = 0; s < p.slots; s++)
        if (p.expert_of[s] >= 0) p.slot_of[p.start[p.expert_of[s]]++] = (int32_t)s;
    for (int64_t e = experts; e > 0; e--) p.start[e] = p.start[e - 1];
    p.start[0] = 0;
    for (int i = 0; i < 4; i++) p.next[i] = 0;
}

inline void load_row(const Call& c, int64_t token, int64_t H, float* to) {
    if (c.dtype == FLOAT32) {
        memcpy(to, (const float*)c.x + token * H, (size_t)H * sizeof(float));
        return;
    }
    const uint16_t* from = (const uint16_t*)c.x + token * H;
    if (c.dtype == BFLOAT16)
        for (int64_t i = 0; i < H; i++) to[i] = of_brain(from[i]);
    else
        for (int64_t i = 0; i < H; i++) to[i] = of_half(from[i]);
}

inline void store_part(const Call& c, int64_t at, const float* from, int64_t n) {
    if (c.dtype == FLOAT32) {
        memcpy((float*)c.out + at, from, (size_t)n * sizeof(float));
        return;
    }
    uint16_t* to = (uint16_t*)c.out + at;
    if (c.dtype == BFLOAT16)
        for (int64_t i = 0; i < n; i++) to[i] = to_brain(from[i]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = to_half(from[i]);
}

// Activations of the active slot at place i for a matrix of its expert.
template <int ROWS>
void prepare(const Pass& p, const Matrix& m, const float* coded, const float* plain, const ActStore& a, int64_t i,
             float* scratch) {
    if (m.dense_at < 0 && m.runs) {
        Acts to{a.digits + i * ROWS * a.row, a.scale + i * MAX_RUNS, a.centre + i * MAX_RUNS * ROWS};
        take_acts<ROWS>(p.base, m, coded, a.row, to, scratch);
    }
    if (m.rank) compensator_inner(p.base, m, plain, a.inner + i * a.ranks);
}

// One group of outputs for active slots [i, i + n) of one expert, without a bias. `plain`: their source rows as floats.
template <int ROWS>
void unbiased(const Pass& p, const Matrix& m, int64_t group, const ActStore& a, const ActStore& inner, int64_t i, int n,
             const float* const* plain, float* y) {
    if (m.dense_at >= 0) {
        const int64_t all = ceil_div(m.outputs, LANES);
        for (int64_t s = group * STRIPS; s < all && s < (group + 1) * STRIPS; s++) {
            const uint16_t* w = (const uint16_t*)(p.base + m.dense_at) + s * m.inputs * LANES;
            dense_strip(w, (int)m.dense_kind, m.inputs, plain, n, y + (s - group * STRIPS) * LANES, GROUP);
        }
        return;
    }
    group_product<ROWS>(p.base, m, group, a.digits + i * ROWS * a.row, ROWS * a.row, a.row, a.scale + i * MAX_RUNS,
                        a.centre + i * MAX_RUNS * ROWS, n, y);
    if (m.rank)
        for (int t = 0; t < n; t++)
            add_compensator(p.base, m, group, inner.inner + (i + t) * inner.ranks, y + t * GROUP);
}

template <int ROWS>
void product(const Pass& p, const Matrix& m, int64_t group, const ActStore& a, const ActStore& inner, int64_t i, int n,
             const float* const* plain, float* y) {
    unbiased<ROWS>(p, m, group, a, inner, i, n, plain, y);
    if (m.bias_at < 0) return;
    const float* bias = (const float*)(p.base + m.bias_at) + group * GROUP;
    const int64_t padded = up_to(m.outputs, LANES);
    const int64_t width = padded - group * GROUP < GROUP ? padded - group * GROUP : GROUP;
    for (int t = 0; t < n; t++)
        for (int64_t k = 0; k < width; k++) y[t * GROUP + k] += bias[k];
}

// Neighbouring tasks of a phase, a few at a time: their codes are one stream, which is fetched ahead of its use.
struct Tasks {
    int64_t* next;
    int64_t all, together, at, end;
    Tasks(int64_t* counter, int64_t n, int threads) : next(counter), all(n), at(0), end(0) {
        together = n / (threads * 8);
        if (together < 1) together = 1;
    }
    // The next task, or -1.
    int64_t claim() {
        if (at == end) {
            at = __atomic_fetch_add(next, together, __ATOMIC_RELAXED);
            end = at + together < all ? at + together : all;
            if (at >= all) {
                at = end = 0;
                return -1;
            }
        }
        return at++;
    }
};

template <int ROWS>
void work(Pass& p, int thread, int threads, float* scratch) {
    const Layer& l = *p.layer;
    const Call& c = *p.call;
    const int64_t H = l.hidden, I = l.inner, K = c.top_k;
    if (thread == 0) route(p);
    for (int64_t t = thread; t < p.tokens; t += threads) {
        load_row(c, p.first + t, H, p.x + t * H);
        if (l.basis >= 0) prepare<ROWS>(p, *matrices(p, l.basis), p.x + t * H, nullptr, p.basis, t, scratch);
    }
#pragma omp barrier
    alignas(64) float one[BLOCK * GROUP], two[BLOCK * GROUP];
    const float* plain[BLOCK];
    if (l.basis >= 0) {
        const Matrix& m = *matrices(p, l.basis);
        const int64_t groups = ceil_div(m.outputs, GROUP), blocks = ceil_div(p.tokens, BLOCK);
        Tasks basis_tasks(&p.next[0], groups * blocks, threads);
        for (int64_t task; (task = basis_tasks.claim()) >= 0;) {
            const int64_t g = task % groups, first = task / groups * BLOCK;
            const int n = (int)(p.tokens - first < BLOCK ? p.tokens - first : BLOCK);
            for (int t = 0; t < n; t++) plain[t] = p.x + (first + t) * H;
            product<ROWS>(p, m, g, p.basis, p.basis, first, n, plain, one);
            const int64_t width = m.outputs - g * GROUP < GROUP ? m.outputs - g * GROUP : GROUP;
            for (int t = 0; t < n; t++)
                memcpy(p.z + (first + t) * l.basis_rows + g * GROUP, one + t * GROUP, (size_t)width * sizeof(float));
        }
#pragma omp barrier
    }
    const float* source = l.input_source ? p.z : p.x;
    const int64_t source_row = l.input_source ? l.basis_rows : H;
    for (int64_t i = thread; i < p.active; i += threads) {
        const int64_t slot = p.slot_of[i], t = slot / K, e = p.expert_of[slot];
        const Matrix &first = matrices(p, l.gate < 0 ? l.up : l.gate)[e], &up = matrices(p, l.up)[e];
        prepare<ROWS>(p, first, source + t * source_row, p.x + t * H, p.gate, i, scratch);
        if (!l.shared_acts)
            prepare<ROWS>(p, up, source + t * source_row, p.x + t * H, p.up, i, scratch);
        else if (l.gate >= 0 && up.rank)
            compensator_inner(p.base, up, p.x + t * H, p.up.inner + i * p.up.ranks);
    }
#pragma omp barrier
    const int64_t inner_groups = ceil_div(I, GROUP), outer_groups = ceil_div(H, GROUP);
    Tasks input_tasks(&p.next[1], p.num_used * inner_groups, threads);
    for (int64_t task; (task = input_tasks.claim()) >= 0;) {
        const int64_t e = p.used[task / inner_groups], g = task % inner_groups;
        const int64_t width = I - g * GROUP < GROUP ? I - g * GROUP : GROUP;
        const ActStore& up_acts = l.shared_acts ? p.gate : p.up;
        const ActStore& up_inner = l.gate < 0 ? p.gate : p.up;
        for (int64_t i = p.start[e]; i < p.start[e + 1]; i += BLOCK) {
            const int n = (int)(p.start[e + 1] - i < BLOCK ? p.start[e + 1] - i : BLOCK);
            for (int t = 0; t < n; t++) plain[t] = p.x + p.slot_of[i + t] / K * H;
            if (l.gate >= 0) product<ROWS>(p, matrices(p, l.gate)[e], g, p.gate, p.gate, i, n, plain, one);
            product<ROWS>(p, matrices(p, l.up)[e], g, up_acts, up_inner, i, n, plain, two);
            for (int t = 0; t < n; t++)
                gated(l.activation, one + t * GROUP, two + t * GROUP, p.h + (i + t) * I + g * GROUP, width);
        }
    }
#pragma omp barrier
    for (int64_t i = thread; i < p.active; i += threads) {
        const Matrix& m = matrices(p, l.down)[p.expert_of[p.slot_of[i]]];
        prepare<ROWS>(p, m, p.h + i * I, p.h + i * I, p.down, i, scratch);
    }
#pragma omp barrier
    Tasks down_tasks(&p.next[2], p.num_used * outer_groups, threads);
    for (int64_t task; (task = down_tasks.claim()) >= 0;) {
        const int64_t e = p.used[task / outer_groups], g = task % outer_groups;
        const int64_t width = H - g * GROUP < GROUP ? H - g * GROUP : GROUP;
        for (int64_t i = p.start[e]; i < p.start[e + 1]; i += BLOCK) {
            const int n = (int)(p.start[e + 1] - i < BLOCK ? p.start[e + 1] - i : BLOCK);
            for (int t = 0; t < n; t++) plain[t] = p.h + (i + t) * I;
            product<ROWS>(p, matrices(p, l.down)[e], g, p.down, p.down, i, n, plain, one);
            for (int t = 0; t < n; t++)
                memcpy(p.partial + p.slot_of[i + t] * H + g * GROUP, one + t * GROUP, (size_t)width * sizeof(float));
        }
    }
#pragma omp barrier
    const int64_t piece = 512, pieces = ceil_div(H, piece);
    Tasks sum_tasks(&p.next[3], p.tokens * pieces, threads);
    for (int64_t task; (task = sum_tasks.claim()) >= 0;) {
        const int64_t t = task / pieces, at = task % pieces * piece, n = H - at < piece ? H - at : piece;
        float* sum = one;
        for (int64_t k = 0; k < n; k++) sum[k] = 0.0f;
        for (int64_t j = 0; j < K; j++) {
            const int64_t slot = t * K + j;
            if (p.expert_of[slot] < 0) continue;
            const float w = c.weights[(p.first + t) * K + j];
            const float* from = p.partial + slot * H + at;
            for (int64_t k = 0; k < n; k++) sum[k] = __builtin_fmaf(from[k], w, sum[k]);
        }
        store_part(c, (p.first + t) * H + at, sum, n);
    }
}

// Passes of at most `chunk` tokens. The memory holds what threads share, and a row of floats for each.
template <int ROWS>
int forward_rows(const Call* call, int64_t chunk, uint8_t** memory, int64_t* memory_bytes, int max_threads) {
    const Layer* l = (const Layer*)call->layer;
    int64_t widest = l->basis_acts;
    if (l->input_acts > widest) widest = l->input_acts;
    if (l->down_acts > widest) widest = l->down_acts;
    for (int64_t first = 0; first < call->tokens; first += chunk) {
        Pass p;
        memset(&p, 0, sizeof p);
        p.base = call->layer;
        p.layer = l;
        p.call = call;
        p.first = first;
        p.tokens = call->tokens - first < chunk ? call->tokens - first : chunk;
        p.slots = p.tokens * call->top_k;
        const int64_t shared = up_to(lay_out<ROWS>(p, nullptr), 64);
        const int64_t need = shared + max_threads * widest * (int64_t)sizeof(float);
        if (need > *memory_bytes) {
            free(*memory);
            *memory_bytes = 0;
            *memory = (uint8_t*)aligned_alloc(64, (size_t)up_to(need, 64));
            if (!*memory) return 1;
            *memory_bytes = need;
        }
        lay_out<ROWS>(p, *memory);
        float* private_floats = (float*)(*memory + shared);
#pragma omp parallel num_threads(max_threads)
        {
            const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
            enter();
            work<ROWS>(p, thread, threads, private_floats + thread * widest);
            leave();
        }
    }
    return 0;
}

int forward(const Call* call, int64_t chunk, uint8_t** memory, int64_t* memory_bytes, int max_threads) {
    return call->dtype == FLOAT32 ? forward_rows<4>(call, chunk, memory, memory_bytes, max_threads)
                                  : forward_rows<2>(call, chunk, memory, memory_bytes, max_threads);
}

}  // namespace
