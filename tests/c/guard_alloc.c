/* An allocator for tests/fuzz_ops.py, preloaded: what posix_memalign gives, which is what torch keeps tensors in, ends
 * where a page begins that nobody may touch. So a kernel that reads or writes past the end of a tensor crashes at once.
 * What is freed must not be touched either, and addresses are used once. New memory holds GUARD_FILL, so that a result
 * that was not written can be told.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GUARD_FILL 0xA5

enum { PAGE = 4096, ALIGNMENT = 16 }; /* less than is asked for, so that ends lie close to the guard */

static const size_t REGION = (size_t)1 << 37, LARGE = (size_t)1 << 26;

extern void __libc_free(void *);
extern void *__libc_memalign(size_t, size_t);

static char *_Atomic region;
static atomic_size_t used;

static size_t pages(size_t bytes) { return (bytes + PAGE - 1) & ~(size_t)(PAGE - 1); }

/* At the start of an allocation's first page; the data begins in the second. */
typedef struct {
    size_t size, length;
    char *data;
} header_t;

static char *begin(void) {
    char *at = region;
    if (at) return at;
    at = mmap(NULL, REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return NULL;
    char *expected = NULL;
    if (!atomic_compare_exchange_strong(&region, &expected, at)) {
        munmap(at, REGION);
        at = expected;
    }
    return at;
}

int posix_memalign(void **result, size_t alignment, size_t size) {
    char *base = size < LARGE ? begin() : NULL;
    /* A page for the header, the data's pages, and the guard. */
    if (!size) size = 1;
    const size_t length = PAGE + pages(size);
    const size_t offset = base ? atomic_fetch_add(&used, length + PAGE) : REGION;
    if (offset + length + PAGE > REGION || mprotect(base + offset, length, PROT_READ | PROT_WRITE)) {
        *result = __libc_memalign(alignment, size);
        return *result ? 0 : ENOMEM;
    }
    char *end = base + offset + length;
    char *data = (char *)((uintptr_t)(end - size) & ~(uintptr_t)(ALIGNMENT - 1));
    header_t *header = (header_t *)(base + offset);
    *header = (header_t){.size = size, .length = length, .data = data};
    memset(data - 64, GUARD_FILL, (size_t)(end - data) + 64);
    *result = data;
    return 0;
}

static void report(const char *text) {
    if (write(2, text, strlen(text)) < 0) _exit(99);
    __builtin_trap();
}

void free(void *data) {
    char *base = region, *at = data;
    if (!base || at < base || at >= base + REGION) {
        __libc_free(data);
        return;
    }
    header_t *header = (header_t *)(((uintptr_t)at & ~(uintptr_t)(PAGE - 1)) - PAGE);
    if (header->data != at) report("guard_alloc: freed what was not allocated\n");
    const char *end = (char *)header + header->length;
    for (const char *p = at + header->size; p < end; p++)
        if (*(const unsigned char *)p != GUARD_FILL) report("guard_alloc: written past the end of a tensor\n");
    for (const char *p = at - 64; p < at; p++)
        if (*(const unsigned char *)p != GUARD_FILL) report("guard_alloc: written before the start of a tensor\n");
    const size_t length = header->length;
    madvise(header, length, MADV_DONTNEED);
    mprotect(header, length, PROT_NONE);
}
