/* The recurrence of one head for one instruction set; see kernels.h and instruction_set.h. */

TARGET static inline __attribute__((always_inline)) NAME(vec) NAME(decay)(const int apart, const float *decay, long i)
{
    if (apart)
        return *(const NAME(vec) *)(decay + i);
    return (NAME(vec)){0} + *decay;
}

TARGET static inline __attribute__((always_inline)) void NAME(recur_values)(
    const int values, const int corrects, const int apart, const struct recurrence *g, long first, float *state)
{
    long keys = g->keys, whole = keys / WIDTH * WIDTH;
    for (long t = 0; t < g->columns; t++) {
        const float *query = g->queries + t * g->key_step, *key = g->keyed + t * g->key_step;
        const float *value = g->values + t * g->value_step + first, *decay = g->decays + t * g->decay_step;
        float *result = g->results + t * g->value_step + first;
        if (g->counted && g->counted[t] == 0.0f) {
#pragma GCC unroll 4
            for (int r = 0; r < values; r++)
                result[r] = 0.0f;
            continue;
        }
        float added[4], rest[4];
        NAME(vec) said[4], read[4];
#pragma GCC unroll 4
        for (int r = 0; r < values; r++) {
            added[r] = value[r];
            rest[r] = 0.0f;
            said[r] = read[r] = (NAME(vec)){0};
        }
        if (corrects) {
            for (long i = 0; i < whole; i += WIDTH) {
                NAME(vec) k = *(const NAME(vec) *)(key + i);
                NAME(vec) d = NAME(decay)(apart, decay, i);
#pragma GCC unroll 4
                for (int r = 0; r < values; r++) {
                    NAME(vec) *s = (NAME(vec) *)(state + r * keys + i);
                    *s *= d;
                    said[r] += *s * k;
                }
            }
            for (long i = whole; i < keys; i++)
#pragma GCC unroll 4
                for (int r = 0; r < values; r++) {
                    state[r * keys + i] *= apart ? decay[i] : *decay;
                    rest[r] += state[r * keys + i] * key[i];
                }
#pragma GCC unroll 4
            for (int r = 0; r < values; r++) {
                added[r] = (value[r] - (NAME(sum)(said[r]) + rest[r])) * g->shares[t * g->share_step];
                rest[r] = 0.0f;
            }
        }
        for (long i = 0; i < whole; i += WIDTH) {
            NAME(vec) k = *(const NAME(vec) *)(key + i), q = *(const NAME(vec) *)(query + i);
            NAME(vec) d = NAME(decay)(apart, decay, i);
#pragma GCC unroll 4
            for (int r = 0; r < values; r++) {
                NAME(vec) *s = (NAME(vec) *)(state + r * keys + i);
                if (!corrects)
                    *s *= d;
                *s += k * added[r];
                read[r] += *s * q;
            }
        }
        for (long i = whole; i < keys; i++)
#pragma GCC unroll 4
            for (int r = 0; r < values; r++) {
                float *s = state + r * keys + i;
                if (!corrects)
                    *s *= apart ? decay[i] : *decay;
                *s += key[i] * added[r];
                rest[r] += *s * query[i];
            }
#pragma GCC unroll 4
        for (int r = 0; r < values; r++)
            result[r] = NAME(sum)(read[r]) + rest[r];
    }
}

TARGET static inline __attribute__((always_inline)) void NAME(recur_head)(
    const int corrects, const int apart, const struct recurrence *g, float *state)
{
    long v = 0;
    for (; v + 4 <= g->count; v += 4)
        NAME(recur_values)(4, corrects, apart, g, v, state + v * g->keys);
    for (; v < g->count; v++)
        NAME(recur_values)(1, corrects, apart, g, v, state + v * g->keys);
}

TARGET static void NAME(recur)(const struct recurrence *g, float *state)
{
    if (g->shares)
        g->apart ? NAME(recur_head)(1, 1, g, state) : NAME(recur_head)(1, 0, g, state);
    else
        g->apart ? NAME(recur_head)(0, 1, g, state) : NAME(recur_head)(0, 0, g, state);
}
