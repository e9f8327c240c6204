/* Runs of bits in little-endian uint32 words: copied and set at any bit position. Scalar; its cost is one step per 32
 * cells, next to nothing beside the data those cells decide. */
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

/* Writes n <= 32 - position % 32 bits into one word: keeps the bits below them, clears those above. */
static inline void write_bits(uint32_t *words, uint64_t position, unsigned n, uint32_t bits) {
    uint32_t *w = words + (position >> 5);
    unsigned shift = (unsigned)(position & 31);
    uint32_t word = (word_at(w) & low_bits(shift)) | (bits & low_bits(n)) << shift;
    memcpy(w, &word, sizeof word);
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
        unsigned room = 32 - (unsigned)(to_position & 31), step = n < room ? (unsigned)n : room;
        write_bits(to, to_position, step, read_bits(from, from_position, step));
        to_position += step;
        from_position += step;
        n -= step;
    }
}

static inline void fill_bits(uint32_t *to, uint64_t position, uint32_t bit, uint64_t n) {
    while (n) {
        unsigned room = 32 - (unsigned)(position & 31), step = n < room ? (unsigned)n : room;
        write_bits(to, position, step, bit ? ~0u : 0u);
        position += step;
        n -= step;
    }
}

#endif
