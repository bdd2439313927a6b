// Runs calls of the CPU kernels from a file and compares their results bit by bit: `test_cpu_neon.py` writes the file.
//
//     driver FILE ISA THREADS
//
// The file is a sequence of calls. Each is nine int64 (bytes of the layer, hidden size, tokens, top_k, dtype, bytes of an
// id, experts in the map or -1, tokens of a pass, bytes of an activation), then layer, x, ids, routing weights, map and
// the expected result. Prints the number of calls; exits with 1 at the first other result.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layout.h"

extern "C" int bitsmoe_has(int isa);
extern "C" int bitsmoe_forward(int isa, const Call* call, int64_t chunk, int threads);

static void* take(FILE* file, int64_t bytes) {
    void* memory = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64 + 64);
    if (!memory || fread(memory, 1, (size_t)bytes, file) != (size_t)bytes) {
        fprintf(stderr, "the file ends too early\n");
        exit(2);
    }
    return memory;
}

int main(int count, char** arguments) {
    if (count != 4) return 2;
    FILE* file = fopen(arguments[1], "rb");
    const int isa = atoi(arguments[2]), threads = atoi(arguments[3]);
    if (!file || !bitsmoe_has(isa)) {
        fprintf(stderr, file ? "this processor has not got the instruction set\n" : "no file\n");
        return 2;
    }
    int64_t head[9];
    int calls = 0;
    for (; fread(head, sizeof head, 1, file) == 1; calls++) {
        const int64_t slots = head[2] * head[3], bytes = head[2] * head[1] * head[8];
        Call call;
        call.layer = (const uint8_t*)take(file, head[0]);
        call.x = take(file, bytes);
        call.ids = take(file, slots * head[5]);
        call.weights = (const float*)take(file, slots * 4);
        call.map = head[6] < 0 ? nullptr : (const int32_t*)take(file, head[6] * 4);
        call.map_size = head[6] < 0 ? 0 : head[6];
        call.tokens = head[2];
        call.top_k = head[3];
        call.dtype = head[4];
        call.id_bytes = head[5];
        const uint8_t* want = (const uint8_t*)take(file, bytes);
        uint8_t* got = (uint8_t*)malloc((size_t)bytes);
        call.out = got;
        const int status = bitsmoe_forward(isa, &call, head[7], threads);
        int64_t at = 0;
        while (!status && at < bytes && got[at] == want[at]) at++;
        if (status || at < bytes) {
            fprintf(stderr, "call %d: status %d, byte %lld of %lld is another\n", calls, status, (long long)at,
                    (long long)bytes);
            return 1;
        }
        const void* taken[] = {call.layer, call.x, call.ids, call.weights, call.map, want, got};
        for (const void* p : taken) free((void*)p);
    }
    printf("%d\n", calls);
    return 0;
}
