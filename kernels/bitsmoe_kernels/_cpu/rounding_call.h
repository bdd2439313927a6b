// What `rounding.py` passes to the functions of rounding.h.
#ifndef BITSMOE_ROUNDING_CALL_H
#define BITSMOE_ROUNDING_CALL_H
#include <stdint.h>

// Fields for feedback, rounding alone and descent; the functions of the scales' refit say how they use them.
struct Rounding {
    int64_t n, K, N;      // experts; rows of a factor; its columns
    int64_t of_columns;   // 1: widths run along N, 0: along K
    int64_t rough;        // 1: guess scales
    const float* F;       // [n, K, N] factors
    const float* matrix;  // [n, K, K]: for feedback U, for descent the damped moments M; alone: null
    const float* half;    // largest level, 0 for 0 bits: [n, K], or [n, N] where widths run along N
    const float* power;   // mean square of levels that suit a unit Gaussian, of the same shape; descent: null
    const float* c;       // [n, N] column scales
    float* a;             // [n, K] row scales: found, but given for descent
    uint8_t* codes;       // [n, K, N]: found; descent: given and replaced
    float* norms;         // [n, K] squared norms of rows as they are rounded; descent: null
    float* error;         // [n]: feedback: found; descent: found, after all moves; alone: null
    float* left;          // [n, K, N]: alone: F less its rounded values; descent: given M (F - F^); feedback: null
    float* memory;        // [bitsmoe_rounding_floats]
};

enum RoundingKind { FEEDBACK = 0, ALONE = 1, DESCENT = 2, SYSTEM = 3, LEVELS = 4, COLUMNS = 5 };

constexpr int64_t ROWS = 32;           // of a block, which waits for all rows before it
constexpr int64_t PANEL = 48;          // columns that are kept together for the products
constexpr int64_t MOST_TOGETHER = 64;  // experts, and threads

inline int64_t panels_of(int64_t N) { return (N + PANEL - 1) / PANEL; }

// Floats of memory that one expert takes, see `Work` of rounding.h.
inline int64_t floats_of(int64_t K, int64_t N) {
    const int64_t columns = panels_of(N) * PANEL;
    return columns * (7 + ROWS + K) + ROWS * K + columns / 4;
}
#endif
