// The memory of one layer's routed experts, as `layout/cpu_layout.py` writes it and the engine reads it.
//
// All of a layer lies in one block of bytes. Offsets are in bytes from its start; -1: absent. A matrix has `outputs`
// columns in strips of 16, and four strips to a group. Its codes are one stream of 64-byte steps for each group:
// all steps of a strip's four neighbours lie together. A step holds 32 / bits components of 16 outputs: lane = output,
// and component 4 f + j of the step stands in byte j, at bit bits * f.
#ifndef BITSMOE_LAYOUT_H
#define BITSMOE_LAYOUT_H
#include <stdint.h>

constexpr int64_t LANES = 16, STRIPS = 4, GROUP = LANES * STRIPS, STEP_BYTES = 64, MAX_RUNS = 8, ACT_ALIGN = 64;

// Neighbouring steps of one width whose codes have one place value.
struct Run {
    int32_t bits;        // of a code: 1, 2, 4 or 8
    int32_t shift;       // codes count 2^shift
    int32_t steps;
    int32_t twice_half;  // twice the number that is subtracted from a code: odd where the grid has no zero
    int32_t component;   // first of the run among the matrix's components
    int32_t act;         // first byte of the run in a row of activations, a multiple of ACT_ALIGN
    int32_t count;       // components, padding included
    int32_t spare;
};

struct Matrix {
    int64_t outputs, inputs;
    int64_t runs, run_at;         // Run[runs]
    int64_t steps;                // of all runs
    int64_t index_at, scale_at;   // uint16 and float32 [components]; index -1: the identity, scale -1: ones
    int64_t feature_at;           // float32 [strips of 16]
    int64_t codes_at;
    int64_t dense_at, dense_kind; // 16-bit weights [strips][inputs][16]; 0: bfloat16, 1: float16
    int64_t rank, in_at, out_at;  // compensator: float16 [rank][inputs] and [rank][strips of 16]
    int64_t bias_at;              // float32 [strips of 16]; -1
};

constexpr int64_t LAYER_MAGIC = 0x35554350;  // changes with this file

struct Layer {
    int64_t magic, bytes;
    int64_t experts, hidden, inner;
    int64_t basis, basis_rows;               // offsets of Matrix; -1
    int64_t gate, up, down;                  // offsets of Matrix[experts]; gate -1: experts have none
    int64_t input_source;                    // 0: gate and up contract x, 1: z = basis x
    int64_t shared_acts;                     // 1: all inputs of an expert contract the same activations
    int64_t basis_acts, input_acts, down_acts;  // bytes of a row of activations, the largest of all matrices
    int64_t ranks;                           // of compensators, the largest of all matrices
    int64_t activation;                      // its number in expert_mlp.py
};

enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

struct Call {
    const uint8_t* layer;
    const void* x;            // [tokens, hidden], contiguous
    const void* ids;          // [tokens, top_k], int32 or int64
    const float* weights;     // [tokens, top_k]
    const int32_t* map;       // [map_size] or null
    void* out;                // [tokens, hidden]
    int64_t tokens, top_k, dtype, id_bytes, map_size;
};
#endif
