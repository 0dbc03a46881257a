/* Products with weights of up to eight bits in whole numbers, for x86 with AVX-512 and VNNI.
 *
 * A vector is taken in pieces of one group each: whole numbers of 16 bits times a scale, in two planes of bytes. So a
 * piece's products with the numbers of a group are exact, and what is rounded is a vector's number to half a unit in
 * 32512 of the largest beside it. That is twice as fast as float32 where products are bound by arithmetic, and takes
 * fewer instructions for each weight where they are bound by memory. A result does not depend on how many rows there are.
 *
 * The numbers of sixteen outputs are turned so that each of them has a lane, with four inputs in it. Inputs go in the order
 * in which bytes have them: of p numbers in a byte all first ones of four bytes come before all second ones. */

#include "whole_rows.h"

/* Groups come in fours. */
static long padded(long groups) { return (groups + 3) / 4 * 4; }

/* Numbers of one byte; those of other widths are given a byte each first. */
static int in_byte(int format)
{
    int bits = bits_of(format);
    return bits == 1 || bits == 2 || bits == 4 ? 8 / bits : 1;
}

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "common.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, LARGEST = 32512, ROWS = 8 };

/* Which input comes at a place. */
static long input_at(long place, long each)
{
    long block = place / (4 * each), within = place % (4 * each);
    return block * 4 * each + within % 4 * each + within / 4;
}

TARGET INLINE void split(__m512i whole, int8_t *high, int8_t *low)
{
    __m512i h = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128((__m128i *)high, _mm512_cvtepi32_epi8(h));
    _mm_storeu_si128((__m128i *)low, _mm512_cvtepi32_epi8(_mm512_sub_epi32(whole, _mm512_slli_epi32(h, 8))));
}

TARGET void take_rows(const struct weights *w, const float *from, long rows, const struct planes *to)
{
    long k = w->inputs, group = w->group, groups = k / group, each = in_byte(w->format);
    int32_t places[LANES];
    for (int i = 0; i < LANES; i++)
        places[i] = (int32_t)input_at(i, each > 4 ? 1 : each);
    const __m512i order = _mm512_loadu_si512(places);
    for (long g = 0; g < rows * groups; g++) {
        const float *x = from + g * group;
        int8_t *high = to->high + g * group, *low = to->low + g * group;
        __m512 most = _mm512_setzero_ps();
        __mmask16 strange = 0;
        for (long i = 0; i < group; i += LANES) {
            __m512 size = _mm512_abs_ps(_mm512_loadu_ps(x + i));
            strange |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
            most = _mm512_max_ps(most, size);
        }
        float largest = _mm512_reduce_max_ps(most), scale = largest / LARGEST;
        /* Of the smallest numbers there are, a part would be lost with the scale: they are nothing beside a weight. */
        float inverse = scale >= 0x1p-120f ? LARGEST / largest : 0.0f;
        __m512i sum = _mm512_setzero_si512();
        for (long i = 0; i < group; i += LANES) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)));
            sum = _mm512_add_epi32(sum, whole);
            split(_mm512_permutexvar_epi32(order, whole), high + i, low + i);
        }
        to->scales[g] = strange ? NAN : scale;
        to->sums[g] = to->scales[g] * (float)_mm512_reduce_add_epi32(sum);
        if (each > 4) {
            int8_t natural[2][128];
            memcpy(natural[0], high, (size_t)group);
            memcpy(natural[1], low, (size_t)group);
            for (long i = 0; i < group; i++) {
                high[i] = natural[0][input_at(i, each)];
                low[i] = natural[1][input_at(i, each)];
            }
        }
    }
}

/* Up to 16 bytes of each of sixteen rows: vector j has bytes 4 j to 4 j + 3 of all of them. */
TARGET INLINE void turn(const uint8_t *const rows[LANES], long at, __mmask16 some, __m512i to[4])
{
    __m512i v[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
        v[q] = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(some, rows[q] + at));
        v[q] = _mm512_inserti32x4(v[q], _mm_maskz_loadu_epi8(some, rows[q + 4] + at), 1);
        v[q] = _mm512_inserti32x4(v[q], _mm_maskz_loadu_epi8(some, rows[q + 8] + at), 2);
        v[q] = _mm512_inserti32x4(v[q], _mm_maskz_loadu_epi8(some, rows[q + 12] + at), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    to[0] = _mm512_unpacklo_epi64(a, c);
    to[1] = _mm512_unpackhi_epi64(a, c);
    to[2] = _mm512_unpacklo_epi64(b, d);
    to[3] = _mm512_unpackhi_epi64(b, d);
}

/* Numbers of widths that do not divide a byte, a byte each; 32 at a time. */
TARGET INLINE void widen(const int bits, const uint8_t *from, long count, uint8_t *to)
{
    uint8_t bytes[16];
    uint16_t shifts[8];
    for (int i = 0; i < 8; i++) { /* eight are in as many bytes as each has bits, and each in two of those at most */
        bytes[2 * i] = (uint8_t)(i * bits / 8);
        bytes[2 * i + 1] = (uint8_t)(i * bits / 8 + 1);
        shifts[i] = (uint16_t)(i * bits % 8);
    }
    const __m512i both = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes));
    const __m512i shift = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)shifts));
    const __m512i mask = _mm512_set1_epi16((short)((1 << bits) - 1));
    const __mmask16 some = (__mmask16)((1u << bits) - 1);
    for (long i = 0; i < count; i += 32, from += 4 * bits) {
        __m512i v = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(some, from));
        v = _mm512_inserti32x4(v, _mm_maskz_loadu_epi8(some, from + bits), 1);
        v = _mm512_inserti32x4(v, _mm_maskz_loadu_epi8(some, from + 2 * bits), 2);
        v = _mm512_inserti32x4(v, _mm_maskz_loadu_epi8(some, from + 3 * bits), 3);
        v = _mm512_and_si512(_mm512_srlv_epi16(_mm512_shuffle_epi8(v, both), shift), mask);
        _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtepi16_epi8(v));
    }
}

/* The numbers of outputs j to j + 15 as bytes [inputs / 4][16][4]. Behind the last output there is the last one again. */
TARGET INLINE void unpack_tile(const int format, const struct weights *w, long j, uint8_t *wide, uint8_t *to)
{
    const int bits = bits_of(format), each = format == E2M1 ? 2 : bits == 1 || bits == 2 || bits == 4 ? 8 / bits : 1;
    const uint8_t *rows[LANES];
    long k = w->inputs, bytes = k / each;
    for (int q = 0; q < LANES; q++) {
        const uint8_t *row = w->packed.numbers + smaller(j + q, w->outputs - 1) * (k * bits / 8);
        rows[q] = row;
        if (bits * each != 8) {
            widen(bits, row, k, wide + q * k);
            rows[q] = wide + q * k;
        }
    }
    const __m512i mask = _mm512_set1_epi8((char)(each == 1 ? 255 : (1 << bits) - 1));
    /* Twice what four bits stand for, and twelve, so that none is negative. */
    const __m512i twice = _mm512_broadcast_i32x4(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    for (long at = 0; at < bytes; at += 16) {
        long left = smaller(16, bytes - at);
        __m512i v[4];
        turn(rows, at, (__mmask16)((1u << left) - 1), v);
        for (long q = 0; 4 * q < left; q++)
            for (int part = 0; part < each; part++) {
                __m512i one = _mm512_and_si512(_mm512_srli_epi32(v[q], (unsigned)(part * bits)), mask);
                if (format == E2M1)
                    one = _mm512_shuffle_epi8(twice, one);
                _mm512_storeu_si512(to + ((at / 4 + q) * each + part) * 64, one);
            }
    }
}

/* Scales and biases of the same outputs, [groups rounded up to fours][16] each. ``room`` as large. */
TARGET static void take_factors(const struct weights *w, long j, float *room, float *scales, float *biases)
{
    long groups = w->inputs / w->group, there = smaller(LANES, w->outputs - j);
    const uint8_t *rows[LANES];
    for (int q = 0; q < LANES; q++)
        rows[q] = (const uint8_t *)(room + smaller(q, there - 1) * groups);
    for (int both = 0; both < (affine(w->format) ? 2 : 1); both++) {
        float *to = both ? biases : scales;
        factor_floats(both ? w->packed.biases : w->packed.scales, w->scale_type, j * groups, there * groups, room);
        for (long g = 0; g < groups; g += 4) {
            __m512i v[4];
            turn(rows, 4 * g, (__mmask16)((1u << 4 * smaller(4, groups - g)) - 1), v);
            for (int i = 0; i < 4; i++)
                _mm512_storeu_si512(to + (g + i) * LANES, v[i]);
        }
    }
    if (w->format == E2M1)
        for (long i = 0; i < groups * LANES; i += LANES) {
            __m512 half = _mm512_mul_ps(_mm512_loadu_ps(scales + i), _mm512_set1_ps(0.5f));
            _mm512_storeu_ps(scales + i, half);
            _mm512_storeu_ps(biases + i, _mm512_mul_ps(half, _mm512_set1_ps(-12.0f)));
        }
}

/* Have the scales or biases of sixteen outputs come into the cache. */
TARGET INLINE void fetch_factors(const struct weights *w, uint16_t *factors, long j)
{
    long groups = w->inputs / w->group;
    const char *from = (const char *)factors_at(factors, w->scale_type, j * groups);
    const char *to = (const char *)factors_at(factors, w->scale_type, (j + LANES) * groups);
    for (; from < to; from += 64)
        _mm_prefetch(from, _MM_HINT_T0);
}

struct tile {
    const uint8_t *numbers;
    const float *scales, *biases;
    long inputs, group, bits;
    const uint8_t *ahead; /* numbers that come next: sixteen short rows are no stream that a CPU would see by itself */
};

TARGET INLINE void multiply(
    const int rows, const struct tile *t, const struct planes *x, float *c, long ldc, __mmask16 some)
{
    long k = t->inputs, groups = k / t->group;
    __m512 total[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        total[r] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i high[ROWS], low[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            high[r] = low[r] = _mm512_setzero_si512();
        for (long i = g * t->group; i < (g + 1) * t->group; i += 4) {
            __m512i numbers = _mm512_loadu_si512(t->numbers + i * LANES);
            _mm_prefetch((const char *)t->ahead + i * LANES * t->bits / 8, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                int32_t h, l;
                memcpy(&h, x->high + r * k + i, sizeof h);
                memcpy(&l, x->low + r * k + i, sizeof l);
                high[r] = _mm512_dpbusd_epi32(high[r], numbers, _mm512_set1_epi32(h));
                low[r] = _mm512_dpbusd_epi32(low[r], numbers, _mm512_set1_epi32(l));
            }
        }
        __m512 scale = _mm512_loadu_ps(t->scales + g * LANES), bias = _mm512_loadu_ps(t->biases + g * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]));
            dot = _mm512_mul_ps(dot, _mm512_set1_ps(x->scales[r * groups + g]));
            total[r] = _mm512_fmadd_ps(dot, scale, total[r]);
            total[r] = _mm512_fmadd_ps(bias, _mm512_set1_ps(x->sums[r * groups + g]), total[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        _mm512_mask_storeu_ps(c + r * ldc, some, total[r]);
}

TARGET static void multiply_all(const struct tile *t, long m, const struct planes *x, float *c, long ldc, __mmask16 some)
{
    long k = t->inputs, groups = k / t->group;
    for (long r = 0; r < m; r += ROWS) {
        const struct planes rows = {x->high + r * k, x->low + r * k, x->scales + r * groups, x->sums + r * groups};
        float *to = c + r * ldc;
        switch (smaller(ROWS, m - r)) {
        case 1: multiply(1, t, &rows, to, ldc, some); break;
        case 2: multiply(2, t, &rows, to, ldc, some); break;
        case 3: multiply(3, t, &rows, to, ldc, some); break;
        case 4: multiply(4, t, &rows, to, ldc, some); break;
        case 5: multiply(5, t, &rows, to, ldc, some); break;
        case 6: multiply(6, t, &rows, to, ldc, some); break;
        case 7: multiply(7, t, &rows, to, ldc, some); break;
        case 8: multiply(8, t, &rows, to, ldc, some); break;
        }
    }
}

#include "near_rows.h"

TARGET INLINE void columns(const int format, const struct weights *w, float *room, long m, const struct planes *a, long from,
                           long to, float *c, long ldc)
{
    long k = w->inputs, factors = padded(k / w->group) * LANES;
    float *scales = room, *biases = scales + factors, *spare = biases + factors;
    uint8_t *numbers = (uint8_t *)(spare + factors), *wide = numbers + k * LANES;
    struct tile tile = {numbers, scales, biases, k, w->group, bits_of(format), NULL};
    for (long j = from; j < to; j += LANES) {
        long count = smaller(LANES, to - j);
        take_factors(w, j, spare, scales, biases);
        fetch_factors(w, w->packed.scales, j + LANES);
        if (affine(format))
            fetch_factors(w, w->packed.biases, j + LANES);
        if ((format == 4 || format == 8 || format == E2M1) && m == 1 && w->group >= LEAST_NEAR) {
            near_tile(format, w, j, scales, biases, a, c + j, (__mmask16)((1u << count) - 1));
            continue;
        }
        unpack_tile(format, w, j, wide, numbers);
        tile.ahead = w->packed.numbers + (j + LANES) * (k * tile.bits / 8);
        multiply_all(&tile, m, a, c + j, ldc, (__mmask16)((1u << count) - 1));
    }
}

TARGET void whole_rows(const struct weights *w, float *room, long m, const struct planes *a, long from, long to, float *c,
                       long ldc)
{
    switch (w->format) {
    case 1: columns(1, w, room, m, a, from, to, c, ldc); return;
    case 2: columns(2, w, room, m, a, from, to, c, ldc); return;
    case 3: columns(3, w, room, m, a, from, to, c, ldc); return;
    case 4: columns(4, w, room, m, a, from, to, c, ldc); return;
    case 5: columns(5, w, room, m, a, from, to, c, ldc); return;
    case 6: columns(6, w, room, m, a, from, to, c, ldc); return;
    case 8: columns(8, w, room, m, a, from, to, c, ldc); return;
    case E2M1: columns(E2M1, w, room, m, a, from, to, c, ldc); return;
    }
}

static int possible;

int use_whole_rows(void)
{
    return possible = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
}

int whole(const struct weights *w) { return possible && (affine(w->format) || w->format == E2M1); }
#else
int use_whole_rows(void) { return 0; }

int whole(const struct weights *w)
{
    (void)w;
    return 0;
}

void take_rows(const struct weights *w, const float *from, long rows, const struct planes *to)
{
    (void)w, (void)from, (void)rows, (void)to;
}

void whole_rows(const struct weights *w, float *room, long m, const struct planes *a, long from, long to, float *c,
                long ldc)
{
    (void)w, (void)room, (void)m, (void)a, (void)from, (void)to, (void)c, (void)ldc;
}
#endif

int planes_alike(const struct weights *a, const struct weights *b)
{
    return a->group == b->group && in_byte(a->format) == in_byte(b->format);
}

size_t planes_bytes(const struct weights *w, long rows)
{
    return (size_t)rows * (size_t)(2 * w->inputs + 2 * (w->inputs / w->group) * (long)sizeof(float));
}

struct planes planes_at(const struct weights *w, long rows, void *memory)
{
    long groups = rows * (w->inputs / w->group);
    float *scales = memory, *sums = scales + groups;
    int8_t *high = (int8_t *)(sums + groups);
    return (struct planes){high, high + rows * w->inputs, scales, sums};
}

struct planes planes_behind(const struct weights *w, const struct planes *p, long rows)
{
    long inputs = rows * w->inputs, groups = rows * (w->inputs / w->group);
    return (struct planes){p->high + inputs, p->low + inputs, p->scales + groups, p->sums + groups};
}

long whole_room(const struct weights *w) { return 3 * 16 * padded(w->inputs / w->group) + 2 * 16 * w->inputs / 4; }
