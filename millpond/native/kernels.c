/* The kernels of every instruction set, and which of them this machine uses; see kernels.h. */

#include "kernels.h"

#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "halves.h"

typedef float quarter __attribute__((vector_size(16)));

#define WIDTH 4
#define TARGET
#define NAME(base) base##_portable
#include "instruction_set.h"

#if defined(__x86_64__)
#define WIDTH 8
#define TARGET __attribute__((target("avx2,fma")))
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
void (*recur)(const struct recurrence *, float *) = recur_portable;
static void (*unpack)(int, struct packed, long, long, float *) = unpack_portable;
static void (*pack)(int, const float *, long, long, struct packed) = pack_portable;

const char *choose_kernels(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx512 = __builtin_cpu_supports("avx512f");
    if (!avx512 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")))
        return "portable";
    dot_rows = avx512 ? dot_rows_avx512 : dot_rows_avx2;
    mix_rows = avx512 ? mix_rows_avx512 : mix_rows_avx2;
    softmax_row = avx512 ? softmax_row_avx512 : softmax_row_avx2;
    recur = avx512 ? recur_avx512 : recur_avx2;
    unpack = unpack_avx2;
    pack = pack_avx2;
    return avx512 ? "avx512" : "avx2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "portable";
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
