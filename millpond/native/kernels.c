/* The kernels of every instruction set, and which of them this machine uses; see kernels.h. */

#include "kernels.h"

#include <limits.h>
#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common.h"
#include "halves.h"

static float factor_of(const uint8_t *factors, int type, long at)
{
    union {
        uint32_t bits;
        float number;
    } u;
    uint16_t half;
    switch (type) {
    case POWERS: u.bits = (uint32_t)factors[at] << 23; return u.number;
    case E4M3:
        u.bits = (uint32_t)(factors[at] & 0x7f) << 20;
        u.number *= 0x1p120f;
        return factors[at] & 0x80 ? -u.number : u.number;
    }
    memcpy(&half, factors + 2 * at, sizeof half);
    if (type == HALVES)
        return half_to_float(half);
    u.bits = (uint32_t)half << 16;
    return u.number;
}

typedef float quarter __attribute__((vector_size(16)));

#define WIDTH 4
#define TARGET
#define NAME(base) base##_portable
#include "instruction_set.h"

#if defined(__x86_64__)
#define WIDTH 8
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(base) base##_avx2
#include "instruction_set.h"

#define WIDTH 16
#define TARGET __attribute__((target("avx512f,fma")))
#define NAME(base) base##_avx512
#include "instruction_set.h"
#endif

product dot_rows = dot_rows_portable;
product mix_rows = mix_rows_portable;
float (*softmax_row)(float *, long, struct running *) = softmax_row_portable;
void (*attend_lanes)(const struct attended *, float *) = attend_lanes_portable;
void (*normalise)(const float *, const float *, long, float, float *) = normalise_portable;
void (*gate_all)(int, const float *, const float *, long, float *) = gate_all_portable;
void (*recur)(const struct recurrence *, float *) = recur_portable;
static long widest = 4;
void (*packed_rows)(const struct weights *, float *, long, const float *, long, long, float *, long) =
    packed_rows_portable;
void (*factor_floats)(uint16_t *, int, long, long, float *) = factors_portable;
static void (*unpack)(int, struct packed, long, long, float *) = unpack_portable;
static void (*pack)(int, const float *, long, long, struct packed) = pack_portable;

enum instructions choose_kernels(enum instructions most)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && most >= AVX512 && __builtin_cpu_supports("avx512f");
    if (!avx2 || most < AVX2)
        return PORTABLE;
    dot_rows = avx512 ? dot_rows_avx512 : dot_rows_avx2;
    mix_rows = avx512 ? mix_rows_avx512 : mix_rows_avx2;
    softmax_row = avx512 ? softmax_row_avx512 : softmax_row_avx2;
    attend_lanes = avx512 ? attend_lanes_avx512 : attend_lanes_avx2;
    normalise = avx512 ? normalise_avx512 : normalise_avx2;
    gate_all = avx512 ? gate_all_avx512 : gate_all_avx2;
    recur = avx512 ? recur_avx512 : recur_avx2;
    packed_rows = avx512 ? packed_rows_avx512 : packed_rows_avx2;
    factor_floats = avx512 ? factors_avx512 : factors_avx2;
    widest = avx512 ? 16 : 8;
    unpack = unpack_avx2;
    pack = pack_avx2;
    return avx512 ? AVX512 : AVX2;
#else
    (void)most;
    return PORTABLE;
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

long turned(const struct weights *w)
{
    if (w->format != 4 && w->format != E2M1)
        return 0;
    return w->group % (2 * widest) == 0 ? 2 * widest : widest;
}

long packed_room(const struct weights *w) { return 4 * (2 * (w->inputs / w->group) + w->inputs); }
