/* One vector times weights of four or eight bits, for whole_rows.c, which includes this: with the same bits as there.
 *
 * With a single vector, turning weights so that outputs have lanes costs more than multiplying. Here a row of weights is
 * read as it lies, 64 bytes at a time, and what is turned are the sums: whole numbers, which may be added in any order. */

enum { BLOCK = 64, LEAST_NEAR = 32 /* numbers of a group: a quarter of a block of four bits */ };

/* Each of sixteen vectors summed up in quarters: in vector q the sums over quarter q of all of them. */
TARGET INLINE void sum_quarters(const __m512i from[LANES], __m512i to[4])
{
    __m512i fours[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i a = from[4 * i], b = from[4 * i + 1], c = from[4 * i + 2], d = from[4 * i + 3];
        __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    __m512i a = _mm512_shuffle_i32x4(fours[0], fours[1], 0x44), b = _mm512_shuffle_i32x4(fours[2], fours[3], 0x44);
    __m512i c = _mm512_shuffle_i32x4(fours[0], fours[1], 0xee), d = _mm512_shuffle_i32x4(fours[2], fours[3], 0xee);
    to[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    to[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    to[2] = _mm512_shuffle_i32x4(c, d, 0x88);
    to[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

/* Part of a plane as a block of weights has it: first numbers of all bytes, then second ones. */
TARGET INLINE void take_block(const int each, const int8_t *plane, long left, __m512i to[2])
{
    __mmask64 first = left >= BLOCK ? ~0ull : (1ull << left) - 1;
    to[0] = _mm512_maskz_loadu_epi8(first, plane);
    if (each == 1)
        return;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    long rest = larger(0, left - BLOCK);
    __m512i second = _mm512_maskz_loadu_epi8(rest >= BLOCK ? ~0ull : (1ull << rest) - 1, plane + BLOCK), front = to[0];
    to[0] = _mm512_permutex2var_epi32(front, even, second);
    to[1] = _mm512_permutex2var_epi32(front, odd, second);
}

/* The dot products of outputs j to j + 15, of which ``some`` are stored. */
TARGET INLINE void near_tile(const int format, const struct weights *w, long j, const float *scales, const float *biases,
                             const struct planes *x, float *c, __mmask16 some)
{
    const int each = format == 8 ? 1 : 2;
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i twice = _mm512_broadcast_i32x4(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    long k = w->inputs, groups = k / w->group, bytes = k / each, quarters = w->group / (each * BLOCK / 4), filled = 0, g = 0;
    const uint8_t *rows[LANES], *ahead = w->packed.numbers + (j + LANES) * bytes;
    for (int q = 0; q < LANES; q++)
        rows[q] = w->packed.numbers + smaller(j + q, w->outputs - 1) * bytes;
    __m512 total = _mm512_setzero_ps();
    __m512i sum = _mm512_setzero_si512();
    for (long at = 0; at < bytes; at += BLOCK) {
        __mmask64 there = bytes - at >= BLOCK ? ~0ull : (1ull << (bytes - at)) - 1;
        __m512i high[2], low[2], sums[LANES], parts[4];
        take_block(each, x->high + at * each, k - at * each, high);
        take_block(each, x->low + at * each, k - at * each, low);
#pragma GCC unroll 16
        for (int q = 0; q < LANES; q++) {
            __m512i v = _mm512_maskz_loadu_epi8(there, rows[q] + at), h = _mm512_setzero_si512(), l = h;
            _mm_prefetch((const char *)ahead + (at * LANES + q * BLOCK), _MM_HINT_T0);
            if (each == 1) {
                h = _mm512_dpbusd_epi32(h, v, high[0]);
                l = _mm512_dpbusd_epi32(l, v, low[0]);
            } else {
                __m512i first = _mm512_and_si512(v, mask), second = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
                if (format == E2M1) {
                    first = _mm512_shuffle_epi8(twice, first);
                    second = _mm512_shuffle_epi8(twice, second);
                }
                h = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(h, first, high[0]), second, high[1]);
                l = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(l, first, low[0]), second, low[1]);
            }
            sums[q] = _mm512_add_epi32(_mm512_slli_epi32(h, 8), l);
        }
        sum_quarters(sums, parts);
        for (int q = 0; q < 4 && g < groups; q++) {
            sum = _mm512_add_epi32(sum, parts[q]);
            if (++filled < quarters)
                continue;
            __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x->scales[g]));
            total = _mm512_fmadd_ps(dot, _mm512_loadu_ps(scales + g * LANES), total);
            total = _mm512_fmadd_ps(_mm512_loadu_ps(biases + g * LANES), _mm512_set1_ps(x->sums[g]), total);
            sum = _mm512_setzero_si512();
            filled = 0;
            g++;
        }
    }
    _mm512_mask_storeu_ps(c, some, total);
}
