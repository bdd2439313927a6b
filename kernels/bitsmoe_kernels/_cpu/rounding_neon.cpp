// Rounding for NEON.
#include "rounding.h"

#include "isa.h"

void round_neon(int kind, const Rounding* call, int threads) { round_all(kind, *call, threads); }
