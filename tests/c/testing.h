/* What the C tests share: a count of failures, arrays that end where malloc's do, random bytes. */
#ifndef FASTDROP_TESTING_H
#define FASTDROP_TESTING_H

#include "fastdrop.h"

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

static inline unsigned bit_of(const unsigned char *words, uint64_t i) { return words[i / 8] >> i % 8 & 1; }

/* Ways through memory, whatever the size of the output: by ordinary stores, or around the cache by so many pages and
 * lines. */
static inline void go_by_ordinary_stores(void) {
    expect(fd_set_memory(UINT64_MAX, UINT64_MAX, 1, 8, 4096, 64) == FD_OK, "policy", 0, 0, 0);
}
static inline void go_around_cache(int pages, int lines) {
    expect(fd_set_memory(0, 0, pages, lines, 4096, 64) == FD_OK, "policy", 0, (uint64_t)pages, (uint64_t)lines);
}

/* fused_test.c: the fused primitives under an instruction set; what they refuse. */
void check_fused(int isa);
void check_fused_refusals(void);

/* vector_math_test.c: exp, tanh and the normal distribution under an instruction set, at every stride-th float. */
void check_vector_math(int isa, uint32_t stride);

#endif
