/* Packing to 8 or 4 bits and back; see packed.h. */

#include "packed.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "pool.h"
#include "rowblas.h"

enum { NOT_A_NUMBER = 0x7e00, LARGEST = 0x7bff, SIGN = 0x8000 };

static inline float half_to_float(uint16_t half)
{
    union {
        uint32_t bits;
        float number;
    } u = {.bits = (uint32_t)(half & 0x7fff) << 13};
    if (u.bits >= 0x7c00u << 13)
        u.bits |= 0x7f800000u; /* infinite, or not a number */
    else
        u.number *= 0x1p112f; /* moves the exponent, and is right for subnormal numbers too */
    u.bits |= (uint32_t)(half & SIGN) << 16;
    return u.number;
}

/* The nearest half that is not below (``up``) or not above the number; what is out of range becomes the largest. */
static uint16_t float_to_half(float number, int up)
{
    union {
        float number;
        uint32_t bits;
    } u = {.number = number};
    int negative = u.bits >> 31;
    u.bits &= 0x7fffffff;
    if (!(u.number < 65504.0f))
        return (uint16_t)(LARGEST | (negative ? SIGN : 0));
    float magnitude = u.number;
    u.number *= 0x1p-112f;
    uint16_t half = (uint16_t)(u.bits >> 13); /* towards zero */
    if (half_to_float(half) > magnitude)
        half--; /* where halves are subnormal the product is, too, and was rounded */
    if (half_to_float(half) < magnitude && up != negative)
        half++;
    return (uint16_t)(half | (negative ? SIGN : 0));
}

#define WIDTH 4
#define TARGET
#define NAME(base) base##_portable
#include "packing.h"

#if defined(__x86_64__)
#define WIDTH 8
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(base) base##_avx2
#include "packing.h"
#endif

static void (*unpack)(int, struct packed, long, long, float *) = unpack_portable;
static void (*pack)(int, const float *, long, long, struct packed) = pack_portable;

void packed_for(int bits)
{
#if defined(__x86_64__)
    if (bits >= 256) {
        unpack = unpack_avx2;
        pack = pack_avx2;
    }
#else
    (void)bits;
#endif
}

static struct packed behind(struct packed start, int bits, long groups, long size)
{
    return (struct packed){start.numbers + groups * size * bits / 8, start.scales + groups, start.biases + groups};
}

void unpack_groups(int bits, struct packed from, long at, long groups, long size, float *to)
{
    unpack(bits, behind(from, bits, at, size), groups, size, to);
}

void pack_groups(int bits, const float *from, long groups, long size, struct packed to, long at)
{
    pack(bits, from, groups, size, behind(to, bits, at, size));
}

/* --- what Python calls: many vectors at once, on all cores -------------------------------------------------------- */

enum { PIECE_NUMBERS = 64 * 1024 };

struct conversion {
    int32_t bits, unpacks;
    int64_t groups, size;
    float *floats;
    struct packed packed;
};

static long groups_per_piece(const struct conversion *c)
{
    return c->size < PIECE_NUMBERS ? PIECE_NUMBERS / c->size : 1;
}

static void run_piece(const void *data, long number)
{
    const struct conversion *c = data;
    long step = groups_per_piece(c), from = number * step;
    long count = c->groups - from < step ? c->groups - from : step;
    if (c->unpacks)
        unpack_groups(c->bits, c->packed, from, count, c->size, c->floats + from * c->size);
    else
        pack_groups(c->bits, c->floats + from * c->size, count, c->size, c->packed, from);
}

EXPORT void millpond_convert(const struct conversion *c)
{
    long step = groups_per_piece(c), pieces = (c->groups + step - 1) / step;
    if (pieces > 1 && pool_claim()) {
        pool_run(run_piece, c, pieces, 1);
        return;
    }
    for (long number = 0; number < pieces; number++)
        run_piece(c, number);
}
