// Rounding for AVX-512.
#include "rounding.h"

#include "isa.h"

void round_avx512(int kind, const Rounding* call, int threads) { round_all(kind, *call, threads); }
