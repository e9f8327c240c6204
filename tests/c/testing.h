/* What the C tests share: a count of failures, arrays that end where malloc's do, random bytes. */
#ifndef FASTDROP_TESTING_H
#define FASTDROP_TESTING_H

#include "fastdrop.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(a) (sizeof(a) / sizeof *(a))

extern int failures;

static inline void expect(int good, const char *what, int isa, uint64_t a, uint64_t b) {
    if (good) return;
    failures++;
    if (failures < 20)
        fprintf(stderr, "FAIL %s on %s (%llu, %llu)\n", what, fd_isa_name(isa), (unsigned long long)a,
                (unsigned long long)b);
}

static inline size_t element_bytes(int dtype) { return dtype == FD_FLOAT64 ? 8 : dtype == FD_FLOAT32 ? 4 : 2; }

/* Arrays end where malloc's do, so that the address sanitizer sees an access past the end. shift misaligns the start.
 */
typedef struct {
    unsigned char *block, *at;
} array_t;
static inline array_t array(size_t bytes, size_t shift, int fill) {
    array_t a;
    a.block = malloc(bytes + shift + 1);
    a.at = a.block + shift;
    memset(a.block, fill, bytes + shift + 1);
    a.block = realloc(a.block, bytes + shift ? bytes + shift : 1);
    a.at = a.block + shift;
    return a;
}

static inline void fill_random(unsigned char *p, size_t bytes, uint32_t state) {
    for (size_t i = 0; i < bytes; i++) {
        state = state * 1664525u + 1013904223u;
        p[i] = (unsigned char)(state >> 24);
    }
}

/* An element of any dtype, at any address. */
static inline double value_at(int dtype, const unsigned char *p, uint64_t i) {
    double wide;
    float value;
    uint16_t half;
    uint32_t bits;
    p += i * element_bytes(dtype);
    if (dtype == FD_FLOAT64) {
        memcpy(&wide, p, sizeof wide);
        return wide;
    }
    if (dtype == FD_FLOAT32) {
        memcpy(&value, p, sizeof value);
        return value;
    }
    memcpy(&half, p, sizeof half);
    if (dtype == FD_BFLOAT16) {
        bits = (uint32_t)half << 16;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                      : ldexp(fraction, -24);
    return half >> 15 ? -magnitude : magnitude;
}

/* Numbers from -2 to 2, none of them small. odd: also infinities and NaN. */
static inline void fill_numbers(int dtype, unsigned char *p, uint64_t n, uint32_t state, int odd) {
    for (uint64_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        uint32_t sign = state & 1u << 31, exponent = 124 + (state >> 28 & 3), fraction = state >> 5 & 0x7FFFFF;
        if (odd && state % 61 == 0) exponent = 255, fraction = state >> 20 & 1 ? 0 : 0x400000;
        uint32_t bits = sign | exponent << 23 | fraction;
        uint16_t half = (uint16_t)(bits >> 16);
        float value;
        memcpy(&value, &bits, sizeof value);
        double wide = value;
        if (dtype == FD_FLOAT16)
            half = (uint16_t)(sign >> 16 | (exponent == 255 ? 31 : exponent - 112) << 10 | fraction >> 13);
        size_t bytes = element_bytes(dtype);
        memcpy(p + i * bytes,
               dtype == FD_FLOAT64   ? (void *)&wide
               : dtype == FD_FLOAT32 ? (void *)&value
                                     : &half,
               bytes);
    }
}

static inline unsigned bit_of(const unsigned char *words, uint64_t i) { return words[i / 8] >> i % 8 & 1; }

/* Ways through memory, whatever the size of the output: by ordinary stores, or around the cache by so many pages and
 * lines. */
static inline void go_by_ordinary_stores(void) {
    expect(fd_set_memory(UINT64_MAX, 1, 8, 4096, 64) == FD_OK, "policy", 0, 0, 0);
}
static inline void go_around_cache(int pages, int lines) {
    expect(fd_set_memory(0, pages, lines, 4096, 64) == FD_OK, "policy", 0, (uint64_t)pages, (uint64_t)lines);
}

/* cells_test.c: kept rows and columns of a matrix, under an instruction set. */
void check_kept_cells(int isa);

/* fused_test.c: the fused primitives under an instruction set; what they refuse. */
void check_fused(int isa);
void check_fused_refusals(void);

/* attention_test.c: the primitives of attention under an instruction set; what they refuse. */
void check_attention(int isa);
void check_attention_refusals(void);

/* vector_math_test.c: exp, tanh and the normal distribution under an instruction set, at every stride-th float. */
void check_vector_math(int isa, uint32_t stride);

#endif
