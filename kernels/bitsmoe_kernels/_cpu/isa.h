// The instruction sets, by the numbers that `library.py` has for them, and what each offers.
#ifndef BITSMOE_ISA_H
#define BITSMOE_ISA_H
#include <stdint.h>

enum Isa { AVX2 = 1, AVX512 = 2, AMX = 3, NEON = 4 };

struct Call;
typedef int Forward(const Call*, int64_t chunk, uint8_t** memory, int64_t* memory_bytes, int max_threads);

Forward forward_avx2, forward_avx512, forward_amx, forward_neon;

struct Rounding;
typedef void Round(int kind, const Rounding*, int threads);
Round round_avx2, round_avx512, round_neon;

bool amx_granted();  // by the kernel, to this process
#endif
