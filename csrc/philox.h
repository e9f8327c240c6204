/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the mask's
 * counter rule: the counter that gives certain bit planes of a mask word. Included by dispatch.c, for fd_philox4x32_10,
 * and by kernels.inc.h, for the constants: draw.inc.h has the vector form, which follows this one step by step. */
#ifndef FASTDROP_PHILOX_H
#define FASTDROP_PHILOX_H

#include <stdint.h>

enum { PHILOX_ROUNDS = 10 };
#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u /* golden ratio */
#define PHILOX_W1 0xBB67AE85u /* sqrt(3) - 1 */

/* Second counter word: high half of the index, the domain that keeps mask bits, Gaussian noise and other libraries' use
 * of the same key apart, and for mask bits the group of four bit planes. */
#define MASK_DOMAIN (1u << 27)
#define NOISE_DOMAIN (2u << 27)
#define GROUP_SHIFT 29
enum { GROUPS = 8, PLANES_PER_GROUP = 4 };

static inline uint32_t mul_high(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }

static inline void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        uint32_t n0 = mul_high(PHILOX_M1, c2) ^ c1 ^ k0, n2 = mul_high(PHILOX_M0, c0) ^ c3 ^ k1;
        c1 = PHILOX_M1 * c2;
        c3 = PHILOX_M0 * c0;
        c0 = n0;
        c2 = n2;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

#endif
