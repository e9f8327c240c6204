/* Runs of bits in little-endian words: read, copied and appended at any bit position. Included by kernels.inc.h.
 * Scalar, because one step per 32 cells costs next to nothing beside the work on the data of these cells. */
#ifndef FASTDROP_BITS_H
#define FASTDROP_BITS_H

#include <stdint.h>
#include <string.h>

static inline uint32_t low_bits(unsigned n) { return n >= 32 ? ~0u : (1u << n) - 1u; }

/* Words may lie at any address. */
static inline uint32_t word_at(const uint32_t *w) {
    uint32_t word;
    memcpy(&word, w, sizeof word);
    return word;
}

/* Bits position .. position+n-1 (n <= 32) as the low bits of a word; touches no word that holds none of them. */
static inline uint32_t read_bits(const uint32_t *words, uint64_t position, unsigned n) {
    const uint32_t *w = words + (position >> 5);
    unsigned shift = (unsigned)(position & 31);
    uint64_t pair = word_at(w);
    if (shift + n > 32) pair |= (uint64_t)word_at(w + 1) << 32;
    return (uint32_t)(pair >> shift) & low_bits(n);
}

/* Bits position .. position+63, from eight bytes or nine. */
static inline uint64_t read_long(const uint32_t *words, uint64_t position) {
    const unsigned char *at = (const unsigned char *)words + (position >> 3);
    unsigned shift = position & 7;
    uint64_t bits;
    memcpy(&bits, at, sizeof bits);
    return shift ? bits >> shift | (uint64_t)at[8] << (64 - shift) : bits;
}

/* Copies n bits. In the first and last word touched, bits below stay and bits above are cleared, so that a mask filled
 * from left to right ends with the zero tail that the mask format asks for. */
static inline void copy_bits(uint32_t *to, uint64_t to_position, const uint32_t *from, uint64_t from_position,
                             uint64_t n) {
    if (((to_position | from_position) & 31) == 0) {
        uint64_t whole = n >> 5;
        memcpy(to + (to_position >> 5), from + (from_position >> 5), whole * sizeof *to);
        to_position += whole << 5;
        from_position += whole << 5;
        n &= 31;
    }
    while (n) {
        unsigned shift = (unsigned)(to_position & 31), step = n < 32 - shift ? (unsigned)n : 32 - shift;
        uint32_t *w = to + (to_position >> 5);
        uint32_t word = (word_at(w) & low_bits(shift)) | read_bits(from, from_position, step) << shift;
        memcpy(w, &word, sizeof word);
        to_position += step;
        from_position += step;
        n -= step;
    }
}

/* Fills a buffer from left to right. The buffer needs eight bytes more than the bits take: every step stores a whole
 * word, because a branch on whether it is full would be hard to predict. */
typedef struct {
    unsigned char *at;
    uint64_t word; /* being filled: n bits so far, 0 above */
    unsigned n;
} writer_t;

/* Up to 64 bits; those above n are 0. */
static inline void append_bits(writer_t *w, uint64_t bits, unsigned n) {
    uint64_t word = w->word | bits << w->n, rest = bits >> 1 >> (63 - w->n);
    unsigned full = (w->n + n) / 64;
    memcpy(w->at, &word, sizeof word);
    w->at += full * sizeof word;
    w->word = full ? rest : word;
    w->n = (w->n + n) % 64;
}

/* The last word, filled or not. */
static inline void append_end(writer_t *w) { memcpy(w->at, &w->word, sizeof w->word); }

/* n times the same bit. */
static inline void append_run(writer_t *w, uint32_t bit, uint64_t n) {
    uint64_t bits = 0 - (uint64_t)bit;
    unsigned space = 64 - w->n;
    if (n > 64) {
        append_bits(w, bits >> w->n, space);
        for (n -= space; n >= 64; n -= 64, w->at += sizeof bits) memcpy(w->at, &bits, sizeof bits);
    }
    if (n) append_bits(w, bits >> (64 - n), (unsigned)n);
}

static inline void append_copy(writer_t *w, const uint32_t *from, uint64_t position, uint64_t n) {
    for (; n >= 64; n -= 64, position += 64) append_bits(w, read_long(from, position), 64);
    if (n > 32) {
        append_bits(w, read_bits(from, position, 32), 32);
        position += 32;
        n -= 32;
    }
    if (n) append_bits(w, read_bits(from, position, (unsigned)n), (unsigned)n);
}

#endif
