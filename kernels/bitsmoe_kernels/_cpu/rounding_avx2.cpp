// Rounding for AVX2 with FMA.
#include "rounding.h"

#include "isa.h"

void round_avx2(int kind, const Rounding* call, int threads) { round_all(kind, *call, threads); }
