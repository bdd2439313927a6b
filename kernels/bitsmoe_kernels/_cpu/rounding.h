// Rounding of factors F [K, N], compiled once for each instruction set: error feedback, rows alone, coordinate descent.
// What is computed, and in which words, is that of `offline_quant/rounding/error_feedback.py`; n experts at once.
//
// Every value follows from a fixed order of operations: sums over rows go from the first row on with one fused
// multiply-add each, sums over columns go over sixteen lanes. So the instruction set, the number of threads and the
// sizes of blocks change no bit. Columns are filled up with zeros to whole panels; zeros change no sum.
//
// Nothing of the C++ library is used here, see engine.h.
#include <math.h>
#include <omp.h>
#include <string.h>

#include "lanes.h"
#include "rounding_call.h"

namespace {

constexpr int64_t DEPTH = 128;  // rows whose products stay in the first cache
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 1;
#endif
constexpr int CANDIDATES = 4, SCALE_STEPS = 3;
constexpr float CANDIDATE[CANDIDATES] = {0.7f, 0.85f, 1.0f, 1.2f};
constexpr float NO_FRACTION = 12582912.0f;  // 1.5 * 2^23: sums with it have no room for a fraction
constexpr float TINY = 1e-30f;

// Nearest float16, halves to even, as float32; infinite from 65520 on.
inline float to_half_and_back(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = u & 0x80000000u, magnitude = u & 0x7FFFFFFFu;
    float out;
    if (magnitude > 0x7F800000u) return x;
    if (magnitude >= 0x477FF000u) {
        u = sign | 0x7F800000u;
        memcpy(&out, &u, 4);
        return out;
    }
    if (magnitude < 0x38800000u) {  // below 2^-14 the grid is that of 2^-24
        memcpy(&out, &magnitude, 4);
        out = (out + 0.5f) - 0.5f;
        return sign ? -out : out;
    }
    u = (u + 0xFFFu + (u >> 13 & 1)) & 0xFFFFE000u;
    memcpy(&out, &u, 4);
    return out;
}

// One expert at work. Rows are `columns` long, which are whole panels.
struct Work {
    int64_t columns;
    float *c, *weight, *half, *power;  // of columns: scale, its square; levels where widths run along columns
    float* block;                      // [ROWS][columns], rows whose turn it is
    float* handed;                     // [panels][K][PANEL], what every finished row hands on
    float* across;                     // [K][ROWS], what of it each row of the block takes
    float *v, *product, *step;         // of one row
    uint8_t* codes;                    // of one row
    double total;                      // of the rows' errors
};

inline Work work_at(float* at, int64_t K, int64_t N) {
    Work w;
    w.columns = panels_of(N) * PANEL;
    w.c = at, at += w.columns;
    w.weight = at, at += w.columns;
    w.half = at, at += w.columns;
    w.power = at, at += w.columns;
    w.v = at, at += w.columns;
    w.product = at, at += w.columns;
    w.step = at, at += w.columns;
    w.block = at, at += w.columns * ROWS;
    w.handed = at, at += w.columns * K;
    w.across = at, at += ROWS * K;
    w.codes = (uint8_t*)at;
    w.total = 0;
    return w;
}

inline void copy_padded(float* to, const float* from, int64_t N, int64_t columns) {
    memcpy(to, from, N * sizeof(float));
    memset(to + N, 0, (columns - N) * sizeof(float));
}

// A row's levels: the largest one, of the whole row or of each column.
template <bool OF_COLUMNS>
struct Levels {
    const float* halves;
    V half;
    inline V at(int64_t i) const { return OF_COLUMNS ? load(halves + i) : half; }
};

// Nearest level of x among -half, ..., half; a code of 0 where x is not a number.
inline V nearest(V x, V half) {
    const V level = ((x + half) + fill(NO_FRACTION)) - fill(NO_FRACTION) - half;
    return least(most(level, fill(0.0f) - half), half);
}

// The best scale of one row against the column scales, by alternating least squares from several starts.
template <int COUNT, bool OF_COLUMNS>
float best_scale(const Work& w, const float* row, Levels<OF_COLUMNS> levels, float power) {
    constexpr bool ROUGH = COUNT == 1;
    V energy = fill(0), suited = fill(0);
    for (int64_t i = 0; i < w.columns; i += WIDTH) {
        const V c = load(w.c + i), weight = load(w.weight + i), v = where_positive(c, load(row + i) / c);
        const V product = weight * v;
        store(w.v + i, v);
        store(w.product + i, product);
        energy = fused(product, v, energy);
        suited = fused(weight, OF_COLUMNS ? load(w.power + i) : fill(power), suited);
    }
    float bound = sum(suited);
    const float start = sqrtf(sum(energy) / (bound > TINY ? bound : TINY));
    float a[COUNT], error[COUNT];
    for (int k = 0; k < COUNT; k++) a[k] = ROUGH ? start : start * CANDIDATE[k];
    for (int turn = 0; turn < (ROUGH ? 1 : SCALE_STEPS); turn++) {
        V scale[COUNT], matched[COUNT], square[COUNT];
        for (int k = 0; k < COUNT; k++) {
            scale[k] = fill(a[k] == 0 ? INFINITY : a[k]);
            matched[k] = square[k] = fill(0);
        }
        for (int64_t i = 0; i < w.columns; i += WIDTH) {
            const V v = load(w.v + i), product = load(w.product + i), weight = load(w.weight + i), half = levels.at(i);
#pragma GCC unroll 4
            for (int k = 0; k < COUNT; k++) {
                const V level = nearest(v / scale[k], half);
                matched[k] = fused(product, level, matched[k]);
                square[k] = fused(weight, level * level, square[k]);
            }
        }
        for (int k = 0; k < COUNT; k++) {
            const float below = sum(square[k]);
            a[k] = sum(matched[k]) / (below > TINY ? below : TINY);
        }
    }
    for (int k = 0; k < COUNT; k++) a[k] = to_half_and_back(a[k]);
    if (ROUGH) return a[0];
    V scale[COUNT], value[COUNT], lost[COUNT];
    for (int k = 0; k < COUNT; k++) {
        value[k] = fill(a[k]);
        scale[k] = fill(a[k] == 0 ? INFINITY : a[k]);
        lost[k] = fill(0);
    }
    for (int64_t i = 0; i < w.columns; i += WIDTH) {
        const V v = load(w.v + i), weight = load(w.weight + i), half = levels.at(i);
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) {
            const V off = fused_minus(value[k], nearest(v / scale[k], half), v);
            lost[k] = fused(weight, off * off, lost[k]);
        }
    }
    int best = 0;
    for (int k = 0; k < COUNT; k++) {
        error[k] = sum(lost[k]);
        if (error[k] < error[best]) best = k;
    }
    return a[best];
}

// block -= across^T handed over the first `rows` of `stride` rows, for some panels. `across` is [rows][ROWS], `handed`
// [panels][stride][PANEL], a row of the block `columns` long.
void subtract_products(float* block, int64_t columns, const float* across, const float* handed, int64_t stride,
                       int64_t rows, int64_t first_panel, int64_t last_panel) {
    for (int64_t p = first_panel; p < last_panel; p++)
        for (int64_t from = 0; from < rows; from += DEPTH) {
            const int64_t depth = rows - from < DEPTH ? rows - from : DEPTH;
            for (int64_t r = 0; r < ROWS; r += TILE_ROWS)
                for (int64_t column = 0; column < PANEL; column += TILE_VECTORS * WIDTH) {
                    const float* b = handed + (p * stride + from) * PANEL + column;
                    const float* a = across + from * ROWS + r;
                    float* to = block + r * columns + p * PANEL + column;
                    V sums[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
                    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
                        for (int k = 0; k < TILE_VECTORS; k++) sums[i][k] = load(to + i * columns + k * WIDTH);
                    for (int64_t j = 0; j < depth; j++, a += ROWS, b += PANEL) {
                        V right[TILE_VECTORS];
#pragma GCC unroll 4
                        for (int k = 0; k < TILE_VECTORS; k++) right[k] = load(b + k * WIDTH);
#pragma GCC unroll 8
                        for (int i = 0; i < TILE_ROWS; i++) {
                            const V left = fill(a[i]);
#pragma GCC unroll 4
                            for (int k = 0; k < TILE_VECTORS; k++) sums[i][k] = fused_minus(left, right[k], sums[i][k]);
                        }
                    }
#pragma GCC unroll 8
                    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
                        for (int k = 0; k < TILE_VECTORS; k++) store(to + i * columns + k * WIDTH, sums[i][k]);
                }
        }
}

// Row r of the block takes what the rows before it in the block, which begins at `start`, hand on.
inline float* finish_row(const Work& w, int64_t K, int64_t start, int64_t r) {
    float* row = w.block + r * w.columns;
    for (int64_t p = 0; p < w.columns / PANEL; p++) {
        const float* b = w.handed + (p * K + start) * PANEL;
        const float* a = w.across + start * ROWS + r;
        V x = load(row + p * PANEL), y = load(row + p * PANEL + WIDTH), z = load(row + p * PANEL + 2 * WIDTH);
        for (int64_t j = 0; j < r; j++, a += ROWS, b += PANEL) {
            const V left = fill(*a);
            x = fused_minus(left, load(b), x);
            y = fused_minus(left, load(b + WIDTH), y);
            z = fused_minus(left, load(b + 2 * WIDTH), z);
        }
        store(row + p * PANEL, x);
        store(row + p * PANEL + WIDTH, y);
        store(row + p * PANEL + 2 * WIDTH, z);
    }
    return row;
}

inline float norm_of(const float* row, int64_t columns) {
    V norm = fill(0);
    for (int64_t i = 0; i < columns; i += WIDTH) norm = fused(load(row + i), load(row + i), norm);
    return sum(norm);
}

// Rounds row k of an expert. What is left over of it, over `share`, goes to `to`; returns the sum of its squares.
template <bool OF_COLUMNS>
float round_row(const Work& w, const Rounding& call, int64_t e, int64_t k, const float* row, float share, float* to,
                int64_t panel_stride) {
    const int64_t at = e * call.K + k;
    const float width = OF_COLUMNS ? 1.0f : call.half[at];
    const Levels<OF_COLUMNS> levels = {w.half, fill(width)};
    float a = 0;
    if (width != 0) {
        const float power = OF_COLUMNS ? 0.0f : call.power[at];
        a = call.rough ? best_scale<1>(w, row, levels, power) : best_scale<CANDIDATES>(w, row, levels, power);
    }
    V norm = fill(0), lost = fill(0);
    for (int64_t i = 0; i < w.columns; i += WIDTH) {
        const V x = load(row + i), step = fill(a) * load(w.c + i), half = levels.at(i);
        const V level = nearest(x / unless_zero(step, fill(INFINITY)), half);
        const V left = (x - step * level) / fill(share);
        store_bytes(w.codes + i, level + half);
        store(to + i / PANEL * panel_stride + i % PANEL, left);
        norm = fused(x, x, norm);
        lost = fused(left, left, lost);
    }
    call.a[at] = a;
    call.norms[at] = sum(norm);
    memcpy(call.codes + at * call.N, w.codes, call.N);
    return sum(lost);
}

// Rounds row k of an expert again, against what all other rows leave over. `gradient` is that of the row by now; its
// moves go to the row's place among those handed on. Returns the error that the row had less what the move takes off.
template <bool OF_COLUMNS>
double move_row(const Work& w, const Rounding& call, int64_t e, int64_t k, const float* gradient) {
    const int64_t at = e * call.K + k;
    const Levels<OF_COLUMNS> levels = {w.half, fill(OF_COLUMNS ? 1.0f : call.half[at])};
    const V a = fill(call.a[at]), own = fill(call.matrix[at * call.K + k]), two = fill(2);
    float *factor = w.v, *before = w.product, *to = w.handed + k * PANEL;
    copy_padded(factor, call.F + at * call.N, call.N, w.columns);
    copy_padded(before, call.left + at * call.N, call.N, w.columns);
    memcpy(w.codes, call.codes + at * call.N, call.N);
    memset(w.codes + call.N, 0, w.columns - call.N);
    V error = fill(0), gain = fill(0);
    for (int64_t i = 0; i < w.columns; i += WIDTH) {
        const V half = levels.at(i), step = a * load(w.c + i), g = load(gradient + i);
        const V value = step * (load_bytes(w.codes + i) - half);
        const V target = value + g / own;
        const V level = nearest(target / unless_zero(step, fill(INFINITY)), half);
        const V move = step * level - value;
        store_bytes(w.codes + i, level + half);
        store(to + i / PANEL * call.K * PANEL + i % PANEL, move);
        error = fused(load(factor + i) - value, load(before + i), error);
        gain = fused(two * g - own * move, move, gain);
    }
    memcpy(call.codes + at * call.N, w.codes, call.N);
    return (double)sum(error) - (double)sum(gain);
}

inline void load_columns(const Work& w, const Rounding& call, int64_t e) {
    copy_padded(w.c, call.c + e * call.N, call.N, w.columns);
    for (int64_t i = 0; i < w.columns; i++) w.weight[i] = w.c[i] * w.c[i];
    if (!call.of_columns) return;
    // Codes of the columns that fill up a panel are 0, whatever is divided there.
    copy_padded(w.half, call.half + e * call.N, call.N, w.columns);
    if (call.power) copy_padded(w.power, call.power + e * call.N, call.N, w.columns);
}

// The rows of the next block as they are given, and what they take of the rows before them.
void prepare_block(const Work& w, const Rounding& call, int64_t e, int64_t start, const float* given, bool transposed) {
    const int64_t K = call.K, rows = K - start < ROWS ? K - start : ROWS;
    const float* matrix = call.matrix + e * K * K;
    for (int64_t r = 0; r < rows; r++)
        copy_padded(w.block + r * w.columns, given + (e * K + start + r) * call.N, call.N, w.columns);
    if (rows < ROWS) {
        memset(w.block + rows * w.columns, 0, (ROWS - rows) * w.columns * sizeof(float));
        memset(w.across, 0, K * ROWS * sizeof(float));
    }
    if (transposed) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < start + rows; j++) w.across[j * ROWS + r] = matrix[(start + r) * K + j];
    } else {
        for (int64_t j = 0; j < start + rows; j++)
            memcpy(w.across + j * ROWS, matrix + j * K + start, rows * sizeof(float));
    }
}

// Blocks of rows of every expert in turn. Each thread takes whole experts, as long as there is one for every thread; the
// threads share the products of those that are left over by panels.
template <class Chain>
void by_blocks(const Rounding& call, const float* given, bool transposed, int threads, const Chain& chain) {
    const int64_t K = call.K, panels = panels_of(call.N), floats = floats_of(K, call.N);
    const int64_t whole = call.n / threads * threads, rest = call.n - whole;
    const int64_t shares = panels < threads ? panels : threads;
    Work works[MOST_TOGETHER];
    auto begin = [&](Work& w, int64_t e) {
        load_columns(w, call, e);
        prepare_block(w, call, e, 0, given, transposed);
    };
    auto finish_block = [&](Work& w, int64_t e, int64_t start) {
        for (int64_t k = start; k < K && k < start + ROWS; k++)
            w.total += chain(w, e, k, finish_row(w, K, start, k - start));
        if (start + ROWS < K) prepare_block(w, call, e, start + ROWS, given, transposed);
        else call.error[e] = (float)w.total;
    };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (int64_t e = 0; e < whole; e++) {
            Work w = work_at(call.memory + omp_get_thread_num() * floats, K, call.N);
            begin(w, e);
            for (int64_t start = 0; start < K; start += ROWS) {
                subtract_products(w.block, w.columns, w.across, w.handed, K, start, 0, panels);
                finish_block(w, e, start);
            }
        }
        if (rest) {
#pragma omp for schedule(static, 1)
            for (int64_t i = 0; i < rest; i++) {
                works[i] = work_at(call.memory + i * floats, K, call.N);
                begin(works[i], whole + i);
            }
            for (int64_t start = 0; start < K; start += ROWS) {
#pragma omp for schedule(static)
                for (int64_t share = 0; share < rest * shares; share++) {
                    const Work& w = works[share / shares];
                    const int64_t s = share % shares;
                    subtract_products(w.block, w.columns, w.across, w.handed, K, start, panels * s / shares,
                                      panels * (s + 1) / shares);
                }
#pragma omp for schedule(static, 1)
                for (int64_t i = 0; i < rest; i++) finish_block(works[i], whole + i, start);
            }
        }
    }
}

// Rows in turn, each handing its error on: w_k = F_k - sum over j < k of U_jk e_j, e_k = (w_k - rounded) / U_kk.
template <bool OF_COLUMNS>
void feedback(const Rounding& call, int threads) {
    by_blocks(call, call.F, false, threads, [&](const Work& w, int64_t e, int64_t k, const float* row) -> double {
        const float share = call.matrix[(e * call.K + k) * call.K + k];
        return round_row<OF_COLUMNS>(w, call, e, k, row, share, w.handed + k * PANEL, call.K * PANEL);
    });
}

template <bool OF_COLUMNS>
void descent(const Rounding& call, int threads) {
    by_blocks(call, call.left, true, threads, [&](const Work& w, int64_t e, int64_t k, const float* row) {
        return move_row<OF_COLUMNS>(w, call, e, k, row);
    });
}

// Every row to its own best scale.
template <bool OF_COLUMNS>
void alone(const Rounding& call, int threads) {
    const int64_t pieces = (call.K + ROWS - 1) / ROWS, floats = floats_of(1, call.N);
#pragma omp parallel num_threads(threads)
    {
        const Work w = work_at(call.memory + omp_get_thread_num() * floats, 1, call.N);
        float *row = w.block, *left = w.block + w.columns;
        int64_t last = -1;
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < call.n * pieces; piece++) {
            const int64_t e = piece / pieces, start = piece % pieces * ROWS;
            if (e != last) load_columns(w, call, e);
            last = e;
            for (int64_t k = start; k < call.K && k < start + ROWS; k++) {
                const int64_t at = (e * call.K + k) * call.N;
                copy_padded(row, call.F + at, call.N, w.columns);
                round_row<OF_COLUMNS>(w, call, e, k, row, 1.0f, left, PANEL);
                memcpy(call.left + at, left, call.N * sizeof(float));
            }
        }
    }
}

// Sixteen values of a row that may end before: zeros beyond.
inline V load_some(const float* p, int64_t count) {
    if (count >= WIDTH) return load(p);
    float padded[WIDTH] = {};
    memcpy(padded, p, count * sizeof(float));
    return load(padded);
}
inline V load_some(const uint8_t* p, int64_t count) {
    if (count >= WIDTH) return load_bytes(p);
    uint8_t padded[WIDTH] = {};
    memcpy(padded, p, count);
    return load_bytes(padded);
}
inline void store_some(float* p, V x, int64_t count) {
    if (count >= WIDTH) return store(p, x);
    float padded[WIDTH];
    store(padded, x);
    memcpy(p, padded, count * sizeof(float));
}

// Levels of sixteen codes from column i of row k on: code - half, and 0 beyond the row's end.
inline V levels_of(const Rounding& call, int64_t e, int64_t k, int64_t i) {
    const int64_t left = call.N - i;
    const V code = load_some(call.codes + (e * call.K + k) * call.N + i, left);
    if (call.of_columns) return code - load_some(call.half + e * call.N + i, left);
    const V half = fill(call.half[e * call.K + k]);
    float kept[WIDTH];
    if (left >= WIDTH) return code - half;
    store(kept, code - half);
    return load_some(kept, left);
}

// The system that the best row scales solve for given codes and c, with A = level c: `left` [n, K, K] is M (A A^T), entry
// by entry, its lower triangle; `norms` [n, K] the sums of A F over columns, F here being M F.
void scale_system(const Rounding& call, int threads) {
    const int64_t K = call.K, N = call.N, columns = panels_of(K) * PANEL, panels = panels_of(K);
    float* handed = call.memory;  // [panels][N][PANEL], rows of A as columns
    float* own = handed + panels * N * PANEL;
    const int64_t own_floats = ROWS * (columns + N);
#pragma omp parallel num_threads(threads)
    {
        float* block = own + omp_get_thread_num() * own_floats;
        float* across = block + ROWS * columns;
        for (int64_t e = 0; e < call.n; e++) {
#pragma omp for schedule(static)
            for (int64_t p = 0; p < panels; p++) {
                float* panel = handed + p * N * PANEL;
                if (K - p * PANEL < PANEL) memset(panel, 0, N * PANEL * sizeof(float));
                for (int64_t k = p * PANEL; k < K && k < (p + 1) * PANEL; k++) {
                    V right = fill(0);
                    for (int64_t i = 0; i < N; i += WIDTH) {
                        const V A = levels_of(call, e, k, i) * load_some(call.c + e * N + i, N - i);
                        right = fused(A, load_some(call.F + (e * K + k) * N + i, N - i), right);
                        float values[WIDTH];
                        store(values, A);
                        const int64_t count = N - i < WIDTH ? N - i : WIDTH;
                        for (int64_t x = 0; x < count; x++) panel[(i + x) * PANEL + k - p * PANEL] = values[x];
                    }
                    call.norms[e * K + k] = sum(right);
                }
            }
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < (K + ROWS - 1) / ROWS; part++) {
                const int64_t start = (K - 1) / ROWS * ROWS - part * ROWS;  // the longest rows first
                const int64_t rows = K - start < ROWS ? K - start : ROWS, last = (start + rows - 1) / PANEL + 1;
                memset(block, 0, ROWS * columns * sizeof(float));
                for (int64_t r = 0; r < ROWS; r++) {
                    const int64_t k = start + r;
                    const float* from = handed + k / PANEL * N * PANEL + k % PANEL;
                    for (int64_t i = 0; i < N; i++) across[i * ROWS + r] = r < rows ? from[i * PANEL] : 0.0f;
                }
                subtract_products(block, columns, across, handed, N, N, 0, last);
                for (int64_t r = 0; r < rows; r++) {
                    const float* moments = call.matrix + (e * K + start + r) * K;
                    float* to = call.left + (e * K + start + r) * K;
                    for (int64_t j = 0; j <= start + r; j++) to[j] = -block[r * columns + j] * moments[j];
                }
            }
        }
    }
}

// A = level a [n, K, N], to `left`.
void scaled_levels(const Rounding& call, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < call.n * call.K; row++)
        for (int64_t i = 0; i < call.N; i += WIDTH)
            store_some(call.left + row * call.N + i, levels_of(call, row / call.K, row % call.K, i) * fill(call.a[row]),
                       call.N - i);
}

// The best column scales for given codes and a, with A = level a: given M A in `left` and M F in F. New scales go to
// `norms` [n, N], M (F - F^) to `left`.
void column_scales(const Rounding& call, int threads) {
    constexpr int64_t TOGETHER = 12 * WIDTH;
    const int64_t K = call.K, N = call.N, pieces = (N + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t piece = 0; piece < call.n * pieces; piece++) {
        const int64_t e = piece / pieces, start = piece % pieces * TOGETHER;
        const int64_t end = N - start < TOGETHER ? N : start + TOGETHER;
        V power[12], crossed[12];
        for (int v = 0; v < 12; v++) power[v] = crossed[v] = fill(0);
        for (int64_t k = 0; k < K; k++) {
            const V a = fill(call.a[e * K + k]);
            const int64_t row = (e * K + k) * N;
            for (int64_t i = start, v = 0; i < end; i += WIDTH, v++) {
                const V A = levels_of(call, e, k, i) * a;
                power[v] = fused(A, load_some(call.left + row + i, N - i), power[v]);
                crossed[v] = fused(A, load_some(call.F + row + i, N - i), crossed[v]);
            }
        }
        for (int64_t i = start, v = 0; i < end; i += WIDTH, v++) {
            float below[WIDTH], above[WIDTH];
            store(below, power[v]);
            store(above, crossed[v]);
            for (int64_t x = 0; x < WIDTH && i + x < N; x++) {
                const float found = below[x] > 0 ? above[x] / (below[x] > TINY ? below[x] : TINY) : call.c[e * N + i + x];
                call.norms[e * N + i + x] = to_half_and_back(found);
            }
        }
        for (int64_t k = 0; k < K; k++) {
            const int64_t row = (e * K + k) * N;
            for (int64_t i = start; i < end; i += WIDTH) {
                const V c = load_some(call.norms + e * N + i, N - i);
                const V MA = load_some(call.left + row + i, N - i);
                store_some(call.left + row + i, fused_minus(MA, c, load_some(call.F + row + i, N - i)), N - i);
            }
        }
    }
}

inline void round_all(int kind, const Rounding& call, int threads) {
    if (kind == FEEDBACK) call.of_columns ? feedback<true>(call, threads) : feedback<false>(call, threads);
    if (kind == ALONE) call.of_columns ? alone<true>(call, threads) : alone<false>(call, threads);
    if (kind == DESCENT) call.of_columns ? descent<true>(call, threads) : descent<false>(call, threads);
    if (kind == SYSTEM) scale_system(call, threads);
    if (kind == LEVELS) scaled_levels(call, threads);
    if (kind == COLUMNS) column_scales(call, threads);
}

}  // namespace
