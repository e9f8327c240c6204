/* Data of any dtype as numbers of C(t), and loops over them. Included by fused.inc.h for each type that is computed in.
 *
 * A kernel calls load_strip for its inputs, writes results to where output_strip points, and calls store_strip. For
 * data of type C(t) these are pointers into the data itself; 16-bit data is converted to and from a scratch strip.
 */

/* n numbers from element `at` on: in place or, if they are not of type C(t), converted into scratch. NULL stays NULL.
 */
INLINE const C(t) * C(load_strip)(int dtype, const void *data, uint64_t at, uint64_t n, C(t) * scratch) {
    if (!data) return NULL;
    if (dtype == FD_FLOAT16)
        f16_widen((const f16_t *)data + at, (void *)scratch, n);
    else if (dtype == FD_BFLOAT16)
        bf16_widen((const bf16_t *)data + at, (void *)scratch, n);
    else
        return (const C(t) *)data + at;
    return scratch;
}

/* Where results for element `at` on are to be written before store_strip: in place, or in scratch if they have to be
 * converted. staged: in scratch anyway, because they are read again and then go around the cache. */
INLINE C(t) * C(output_strip)(int dtype, void *data, uint64_t at, C(t) * scratch, int staged) {
    return staged || dtype == FD_FLOAT16 || dtype == FD_BFLOAT16 ? scratch : (C(t) *)data + at;
}

/* Columns j and up of a row, such as a bias or a weight. NULL stays NULL. */
INLINE const C(t) * C(from_column)(const void *row, uint64_t j) { return row ? (const C(t) *)row + j : NULL; }

/* A number at any address. */
INLINE C(t) C(load_one)(const C(t) * p) {
    C(t) one;
    memcpy(&one, p, sizeof one);
    return one;
}

INLINE void C(store_one)(C(t) * p, C(t) one) { memcpy(p, &one, sizeof one); }

/* A vector of n numbers and zeros; all of it if n is C(lanes) or more. With a constant n there is no branch. */
INLINE C(v) C(load_partial)(const C(t) * p, uint64_t n) {
    C(t) part[C(lanes)] = {0};
    if (n >= C(lanes)) return C(load)(p);
    memcpy(part, p, n * sizeof *p);
    return C(load)(part);
}

INLINE void C(store_partial)(C(t) * p, C(v) v, uint64_t n, const int stream) {
    if (n >= C(lanes) && stream) {
        C(stream)(p, v);
    } else if (n >= C(lanes)) {
        C(store)(p, v);
    } else {
        C(t) part[C(lanes)];
        C(store)(part, v);
        memcpy(p, part, n * sizeof *p);
    }
}

/* Runs BODY(left) for i = 0, C(lanes) .. n: whole vectors, where left is the constant C(lanes), then what is left. */
/* clang-format off */
#define FOR_VECTORS(n, BODY)                                                                                           \
    do {                                                                                                               \
        uint64_t i = 0;                                                                                                \
        _Pragma("GCC unroll 4")                                                                                        \
        for (; i + C(lanes) <= (n); i += C(lanes)) BODY(C(lanes))                                                      \
        if (i < (n)) BODY(((n) - i))                                                                                   \
    } while (0)
/* clang-format on */

INLINE uint64_t C(size)(int dtype) { return dtype == FD_FLOAT16 || dtype == FD_BFLOAT16 ? 2 : sizeof(C(t)); }

/* Elements until data reaches a cache line; UINT64_MAX if it never does, because an element lies across lines. */
INLINE uint64_t C(to_line)(int dtype, const void *data, uint64_t at) {
    uint64_t size = C(size)(dtype), address = (uintptr_t)data + at * size;
    return address % size ? UINT64_MAX : -address % LINE_BYTES / size;
}

/* Brings n results from where output_strip pointed to their place in data; stream: by stores around the cache. */
static void C(store_strip)(int dtype, void *data, uint64_t at, uint64_t n, const C(t) * results, int stream) {
    const uint64_t lead = stream ? min_u64(C(to_line)(dtype, data, at), n) : 0; /* until a line begins */
    if (dtype == FD_FLOAT16) {
        f16_narrow((const void *)results, (f16_t *)data + at, lead, 0);
        f16_narrow((const void *)(results + lead), (f16_t *)data + at + lead, n - lead, stream);
    } else if (dtype == FD_BFLOAT16) {
        bf16_narrow((const void *)results, (bf16_t *)data + at, lead, 0);
        bf16_narrow((const void *)(results + lead), (bf16_t *)data + at + lead, n - lead, stream);
    } else if (results != (C(t) *)data + at) {
        C(t) *to = (C(t) *)data + at;
        memcpy(to, results, lead * sizeof *to);
#define BODY(left) C(store_partial)(to + lead + i, C(load_partial)(results + lead + i, left), left, 1);
        if (stream)
            FOR_VECTORS(n - lead, BODY);
        else
            memcpy(to, results, n * sizeof *to);
#undef BODY
    }
}

INLINE C(t) C(sum_lanes)(C(v) v) {
    C(t) lanes[C(lanes)];
    C(store)(lanes, v);
    for (int n = C(lanes) / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

static void C(add)(const C(t) * x, const C(t) * y, C(t) * to, uint64_t n) {
    const uint64_t ahead = distance_ahead(0);
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        prefetch_from(x + i, ahead);                                                                                   \
        C(store_partial)(to + i, C(load_partial)(x + i, left) + C(load_partial)(y + i, left), left, 0);                \
    }
    FOR_VECTORS(n, BODY);
#undef BODY
}

static void C(mul)(const C(t) * x, const C(t) * y, C(t) * to, uint64_t n) {
#define BODY(left) C(store_partial)(to + i, C(load_partial)(x + i, left) * C(load_partial)(y + i, left), left, 0);
    FOR_VECTORS(n, BODY);
#undef BODY
}

/* to = a x. */
static void C(times)(const C(t) * x, C(t) * to, uint64_t n, C(v) a) {
#define BODY(left) C(store_partial)(to + i, C(load_partial)(x + i, left) * a, left, 0);
    FOR_VECTORS(n, BODY);
#undef BODY
}

/* UNROLL vectors at once. */
enum { C(unrolled) = UNROLL * C(lanes) };

INLINE C(vs) C(load_unrolled)(const C(t) * p) {
    C(vs) vectors;
    EACH vectors.v[k] = C(load)(p + k * C(lanes));
    return vectors;
}

INLINE void C(store_unrolled)(C(t) * p, C(vs) vectors) { EACH C(store)(p + k * C(lanes), vectors.v[k]); }
