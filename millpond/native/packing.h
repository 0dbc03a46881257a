/* Packing and unpacking for one instruction set of 4 or 8 floats a vector; see kernels.h and instruction_set.h. */

typedef uint8_t NAME(bytes) __attribute__((vector_size(WIDTH), aligned(1), may_alias));

TARGET static inline __attribute__((always_inline)) NAME(ints) NAME(spread)(const uint8_t *from, const int bits)
{
#if WIDTH == 8
    if (bits == 8)
        return (NAME(ints))_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    if (bits == 8)
        return __builtin_convertvector(*(const NAME(bytes) *)from, NAME(ints));
#endif
    uint32_t word = 0;
    memcpy(&word, from, WIDTH / 2);
    NAME(ints) all = (NAME(ints)){0} + (int32_t)word;
#if WIDTH == 8
    return all >> (NAME(ints)){0, 4, 8, 12, 16, 20, 24, 28} & 15;
#else
    return all >> (NAME(ints)){0, 4, 8, 12} & 15;
#endif
}

TARGET static inline __attribute__((always_inline)) void NAME(unpack_bits)(
    const int bits, struct packed packed, long groups, long size, float *to)
{
    const uint8_t *from = packed.numbers;
    for (long g = 0; g < groups; g++) {
        NAME(vec) scale = (NAME(vec)){0} + half_to_float(packed.scales[g]);
        NAME(vec) bias = (NAME(vec)){0} + half_to_float(packed.biases[g]);
        for (long i = 0; i < size; i += WIDTH) {
            NAME(vec) q = __builtin_convertvector(NAME(spread)(from, bits), NAME(vec));
            *(NAME(vec) *)to = q * scale + bias;
            from += WIDTH * bits / 8;
            to += WIDTH;
        }
    }
}

TARGET static void NAME(unpack)(int bits, struct packed packed, long groups, long size, float *to)
{
    if (bits == 8)
        NAME(unpack_bits)(8, packed, groups, size, to);
    else
        NAME(unpack_bits)(4, packed, groups, size, to);
}

TARGET static void NAME(pack)(int bits, const float *from, long groups, long size, struct packed packed)
{
    const int levels = (1 << bits) - 1;
    uint8_t *to = packed.numbers;
    uint16_t *scales = packed.scales, *biases = packed.biases;
    for (long g = 0; g < groups; g++, from += size, to += size * bits / 8) {
        NAME(vec) least = *(const NAME(vec) *)from, most = least, odd = {0};
        for (long i = 0; i < size; i += WIDTH) {
            NAME(vec) x = *(const NAME(vec) *)(from + i);
            NAME(ints) less = x < least, more = x > most;
            least = (NAME(vec))(((NAME(ints))x & less) | ((NAME(ints))least & ~less));
            most = (NAME(vec))(((NAME(ints))x & more) | ((NAME(ints))most & ~more));
            odd += x - x; /* not a number, unless all of them are finite */
        }
        float low = least[0], high = most[0], sound = odd[0];
        for (int i = 1; i < WIDTH; i++) {
            low = least[i] < low ? least[i] : low;
            high = most[i] > high ? most[i] : high;
            sound += odd[i];
        }
        /* Rounded so that every number of the group lies within what can be expressed. */
        biases[g] = float_to_half(low, 0);
        float bias = half_to_float(biases[g]);
        scales[g] = float_to_half((high - bias) / (float)levels, 1);
        float scale = half_to_float(scales[g]), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        if (!(sound == 0.0f)) {
            scales[g] = NOT_A_NUMBER;
            inverse = 0.0f;
        }
        NAME(vec) top = (NAME(vec)){0} + (float)levels;
        for (long i = 0; i < size; i += WIDTH) {
            NAME(vec) q = (*(const NAME(vec) *)(from + i) - bias) * inverse + 0.5f;
            NAME(ints) over = q > top;
            q = (NAME(vec))(((NAME(ints))top & over) | ((NAME(ints))q & ~over & (q > 0.0f)));
            NAME(ints) numbers = __builtin_convertvector(q, NAME(ints));
            if (bits == 8)
                for (int j = 0; j < WIDTH; j++)
                    to[i + j] = (uint8_t)numbers[j];
            else
                for (int j = 0; j < WIDTH; j += 2)
                    to[(i + j) / 2] = (uint8_t)(numbers[j] | numbers[j + 1] << 4);
        }
    }
}
