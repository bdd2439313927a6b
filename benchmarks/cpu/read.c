// Reads memory: what bandwidth is measured with.
#include <stdint.h>

// Sum of n words.
uint64_t read_words(const uint64_t* words, int64_t n) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += words[i];
    return sum;
}
