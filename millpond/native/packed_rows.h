/* Products of a few rows with weights as they are on disk, for one instruction set; see kernels.h and instruction_set.h.
 *
 * Numbers become what they are in float32, and are multiplied as row_products.h does it: every element of a result has one
 * accumulator that walks k in order, so it has the same bits whatever the number of rows, the tile and the threads.
 * They come in twos of vectors. Of four bits those in even places are in the first, those in odd ones in the second, and
 * so are the vectors they are multiplied with (``in_turn``); all others are in order. */

TARGET static inline __attribute__((always_inline)) NAME(ints) NAME(octets_of)(const uint8_t *from)
{
#if WIDTH == 16
    return (NAME(ints))_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif WIDTH == 8
    return (NAME(ints))_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return (NAME(ints)){from[0], from[1], from[2], from[3]};
#endif
}

TARGET static inline __attribute__((always_inline)) NAME(vec) NAME(brains)(const uint8_t *from)
{
#if WIDTH == 16
    return (NAME(vec))((NAME(ints))_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)) << 16);
#elif WIDTH == 8
    return (NAME(vec))((NAME(ints))_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)) << 16);
#else
    uint16_t brains[WIDTH];
    memcpy(brains, from, sizeof brains);
    return (NAME(vec))((NAME(ints)){brains[0], brains[1], brains[2], brains[3]} << 16);
#endif
}

TARGET static inline __attribute__((always_inline)) NAME(vec) NAME(halves)(const uint8_t *from)
{
#if WIDTH == 16
    return (NAME(vec))_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif WIDTH == 8
    return (NAME(vec))_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    uint16_t halves[WIDTH];
    memcpy(halves, from, sizeof halves);
    return (NAME(vec)){half_to_float(halves[0]), half_to_float(halves[1]), half_to_float(halves[2]),
                       half_to_float(halves[3])};
#endif
}

/* Of a sign, four bits of exponent and three of a fraction. No number in between is subnormal: that would be slow. */
TARGET static inline __attribute__((always_inline)) NAME(vec) NAME(eighths)(NAME(ints) q)
{
    NAME(ints) magnitude = q & 0x7f, small = magnitude < 8;
    NAME(ints) bits = (magnitude << 20) + (120 << 23) - (small & -(1 << 23));
    NAME(vec) value = (NAME(vec))bits - (NAME(vec))(small & 0x3c800000); /* 2^-6 */
    return (NAME(vec))((NAME(ints))value | (q & 0x80) << 24);
}

/* Of a sign, two bits of exponent and one of a fraction: twice the number, which is whole. */
TARGET static inline __attribute__((always_inline)) NAME(ints) NAME(halved)(NAME(ints) q)
{
    NAME(ints) exponent = q >> 1 & 3, normal = exponent > 0;
    NAME(ints) twice = ((q & 1) - (normal & -2)) << (exponent + normal);
    NAME(ints) negative = -(q >> 3 & 1);
    return (twice ^ negative) - negative;
}

#if WIDTH <= 8
/* Numbers of ``bits`` each, the first of them ``skipped`` behind ``from``, where eight begin. */
TARGET static inline __attribute__((always_inline)) NAME(ints) NAME(fields)(
    const int bits, const uint8_t *from, const int skipped)
{
    /* A word each for four, the second of which ends where the eight do. */
    const int bytes = bits > 4 ? 4 : bits > 2 ? 2 : 1, last = 8 * bytes - 4 * bits;
    const uint8_t *start = from + skipped / 8 * bits;
    uint32_t low = 0, high = 0;
    memcpy(&low, start, (size_t)bytes);
    memcpy(&high, start + bits - bytes, (size_t)bytes);
    int32_t a = (int32_t)low, b = (int32_t)high;
    const int mask = (1 << bits) - 1;
#if WIDTH == 8
    return (NAME(ints)){a, a, a, a, b, b, b, b}
        >> (NAME(ints)){0, bits, 2 * bits, 3 * bits, last, last + bits, last + 2 * bits, last + 3 * bits} & mask;
#else
    if (skipped % 8 == 0)
        return (NAME(ints)){a, a, a, a} >> (NAME(ints)){0, bits, 2 * bits, 3 * bits} & mask;
    return (NAME(ints)){b, b, b, b} >> (NAME(ints)){last, last + bits, last + 2 * bits, last + 3 * bits} & mask;
#endif
}
#endif

TARGET static inline __attribute__((always_inline)) void NAME(numbers)(
    const int format, const uint8_t *from, NAME(vec) *first, NAME(vec) *second)
{
    switch (format) {
    case BRAINS:
        *first = NAME(brains)(from);
        *second = NAME(brains)(from + 2 * WIDTH);
        return;
    case HALVES:
        *first = NAME(halves)(from);
        *second = NAME(halves)(from + 2 * WIDTH);
        return;
    case FLOATS:
        *first = *(const NAME(vec) *)from;
        *second = *(const NAME(vec) *)(from + 4 * WIDTH);
        return;
    case E4M3:
        *first = NAME(eighths)(NAME(octets_of)(from));
        *second = NAME(eighths)(NAME(octets_of)(from + WIDTH));
        return;
    }
    NAME(ints) low, high;
    if (format == 8) {
        low = NAME(octets_of)(from);
        high = NAME(octets_of)(from + WIDTH);
    } else if (format == 4 || format == E2M1) {
        NAME(ints) both = NAME(octets_of)(from);
        low = both & 15;
        high = both >> 4;
    } else {
#if WIDTH <= 8
        low = NAME(fields)(format, from, 0);
        high = NAME(fields)(format, from, WIDTH);
#else
        __builtin_unreachable();
#endif
    }
    if (format == E2M1) {
        low = NAME(halved)(low);
        high = NAME(halved)(high);
    }
    *first = __builtin_convertvector(low, NAME(vec));
    *second = __builtin_convertvector(high, NAME(vec));
}

/* Scales of groups, or biases, as floats. */
TARGET static void NAME(factors)(uint16_t *from, int type, long at, long count, float *to)
{
    const uint8_t *bytes = (const uint8_t *)factors_at(from, type, at);
    long g = 0;
    switch (type) {
    case FLOATS:
        memcpy(to, bytes, (size_t)count * sizeof(float));
        return;
    case HALVES:
        for (; g + WIDTH <= count; g += WIDTH)
            *(NAME(vec) *)(to + g) = NAME(halves)(bytes + 2 * g);
        break;
    case BRAINS:
        for (; g + WIDTH <= count; g += WIDTH)
            *(NAME(vec) *)(to + g) = NAME(brains)(bytes + 2 * g);
        break;
    case E4M3:
        for (; g + WIDTH <= count; g += WIDTH)
            *(NAME(vec) *)(to + g) = NAME(eighths)(NAME(octets_of)(bytes + g));
        break;
    case POWERS:
        for (; g + WIDTH <= count; g += WIDTH)
            *(NAME(vec) *)(to + g) = (NAME(vec))(NAME(octets_of)(bytes + g) << 23);
        break;
    }
    for (; g < count; g++)
        to[g] = factor_of(bytes, type, g);
}

/* rows x cols dot products with weights j..j+cols; ``factors``: scales of their groups, then biases. */
TARGET static inline __attribute__((always_inline)) void NAME(packed_tile)(
    const int format, const int rows, const int cols, const struct weights *w, const float *factors, const float *a, long j,
    float *c, long ldc)
{
    const int bits = bits_of(format);
    long k = w->inputs, group = w->group, groups = k / group, bytes = k * bits / 8;
    const uint8_t *b = w->packed.numbers + j * bytes;
    NAME(vec) acc[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int t = 0; t < cols; t++)
            acc[r][t] = (NAME(vec)){0};
    for (long g = 0; g < groups; g++) {
        NAME(vec) scale[4], bias[4];
        if (!plain(format)) {
#pragma GCC unroll 4
            for (int t = 0; t < cols; t++) {
                scale[t] = (NAME(vec)){0} + factors[t * groups + g];
                if (affine(format))
                    bias[t] = (NAME(vec)){0} + factors[(cols + t) * groups + g];
            }
        }
        for (long i = g * group; i < (g + 1) * group; i += 2 * WIDTH) {
            NAME(vec) first[4], second[4];
#pragma GCC unroll 4
            for (int t = 0; t < cols; t++) {
                NAME(numbers)(format, b + t * bytes + i * bits / 8, &first[t], &second[t]);
                if (affine(format)) {
                    first[t] = first[t] * scale[t] + bias[t];
                    second[t] = second[t] * scale[t] + bias[t];
                } else if (!plain(format)) {
                    first[t] *= scale[t];
                    second[t] *= scale[t];
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                NAME(vec) x = *(const NAME(vec) *)(a + r * k + i), y = *(const NAME(vec) *)(a + r * k + i + WIDTH);
#pragma GCC unroll 4
                for (int t = 0; t < cols; t++) {
                    acc[r][t] += x * first[t];
                    acc[r][t] += y * second[t];
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int t = 0; t < cols; t++)
            c[r * ldc + t] = NAME(sum)(acc[r][t]);
}

/* The same weights as floats, in the order of vectors. */
TARGET static inline __attribute__((always_inline)) void NAME(packed_floats)(
    const int format, const int cols, const struct weights *w, const float *factors, long j, float *to)
{
    const int bits = bits_of(format);
    long group = w->group, groups = cols * (w->inputs / group);
    const uint8_t *from = w->packed.numbers + j * (w->inputs * bits / 8);
    for (long g = 0; g < groups; g++) {
        float scale = plain(format) ? 1.0f : factors[g], bias = affine(format) ? factors[groups + g] : 0.0f;
        for (long i = g * group; i < (g + 1) * group; i += 2 * WIDTH) {
            NAME(vec) first, second;
            NAME(numbers)(format, from + i * bits / 8, &first, &second);
            if (affine(format)) {
                first = first * scale + bias;
                second = second * scale + bias;
            } else if (!plain(format)) {
                first *= scale;
                second *= scale;
            }
            *(NAME(vec) *)(to + i) = first;
            *(NAME(vec) *)(to + i + WIDTH) = second;
        }
    }
}

/* Rows times weights that are floats by now. Not inlined: that would be a copy for each format. */
TARGET static __attribute__((noinline)) void NAME(floats_strip)(
    int cols, long m, long k, const float *a, const float *b, float *c, long ldc)
{
    switch (cols) {
    case 1: NAME(strip)(1, m, k, a, k, b, k, c, ldc); break;
    case 2: NAME(strip)(2, m, k, a, k, b, k, c, ldc); break;
    case 4: NAME(strip)(4, m, k, a, k, b, k, c, ldc); break;
    }
}

TARGET static inline __attribute__((always_inline)) void NAME(packed_strip)(
    const int format, const int cols, const struct weights *w, float *room, long m, const float *a, long j, float *c,
    long ldc)
{
    long k = w->inputs, groups = cols * (k / w->group);
    float *factors = room, *floats = room + 2 * groups;
    if (!plain(format))
        NAME(factors)(w->packed.scales, w->scale_type, j * (k / w->group), groups, factors);
    for (long g = 0; format == E2M1 && g < groups; g++)
        factors[g] *= 0.5f; /* its numbers are twice what they stand for */
    if (affine(format))
        NAME(factors)(w->packed.biases, w->scale_type, j * (k / w->group), groups, factors + groups);
    if (m == 1) {
        NAME(packed_tile)(format, 1, cols, w, factors, a, j, c, ldc);
        return;
    }
    NAME(packed_floats)(format, cols, w, factors, j, floats);
    NAME(floats_strip)(cols, m, k, a, floats, c, ldc);
}

TARGET static inline __attribute__((always_inline)) void NAME(packed_columns)(
    const int format, const struct weights *w, float *room, long m, const float *a, long from, long to, float *c, long ldc)
{
    enum { COLS = WIDTH == 16 ? 4 : 2 };
    long j = from;
    for (; j + COLS <= to; j += COLS)
        NAME(packed_strip)(format, COLS, w, room, m, a, j, c + j, ldc);
    for (; j < to; j++)
        NAME(packed_strip)(format, 1, w, room, m, a, j, c + j, ldc);
}

TARGET static void NAME(packed_rows)(
    const struct weights *w, float *room, long m, const float *a, long from, long to, float *c, long ldc)
{
    switch (w->format) {
    case 4: NAME(packed_columns)(4, w, room, m, a, from, to, c, ldc); return;
    case 8: NAME(packed_columns)(8, w, room, m, a, from, to, c, ldc); return;
    case E4M3: NAME(packed_columns)(E4M3, w, room, m, a, from, to, c, ldc); return;
    case BRAINS: NAME(packed_columns)(BRAINS, w, room, m, a, from, to, c, ldc); return;
    case HALVES: NAME(packed_columns)(HALVES, w, room, m, a, from, to, c, ldc); return;
    case FLOATS: NAME(packed_columns)(FLOATS, w, room, m, a, from, to, c, ldc); return;
    case E2M1:
        if (w->group % (2 * WIDTH) == 0) {
            NAME(packed_columns)(E2M1, w, room, m, a, from, to, c, ldc);
            return;
        }
        break;
    }
#if WIDTH <= 8
    switch (w->format) {
    case 1: NAME(packed_columns)(1, w, room, m, a, from, to, c, ldc); return;
    case 2: NAME(packed_columns)(2, w, room, m, a, from, to, c, ldc); return;
    case 3: NAME(packed_columns)(3, w, room, m, a, from, to, c, ldc); return;
    case 5: NAME(packed_columns)(5, w, room, m, a, from, to, c, ldc); return;
    case 6: NAME(packed_columns)(6, w, room, m, a, from, to, c, ldc); return;
    }
#else
    packed_rows_avx2(w, room, m, a, from, to, c, ldc);
#endif
}
