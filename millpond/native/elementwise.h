/* What is done to single numbers between products, for one instruction set; see kernels.h and instruction_set.h. */

TARGET static void NAME(normalise)(const float *from, const float *weight, long count, float eps, float *to)
{
    NAME(vec) squares = {0};
    long i = 0;
    for (; i + WIDTH <= count; i += WIDTH)
        squares += *(const NAME(vec) *)(from + i) * *(const NAME(vec) *)(from + i);
    float sum = NAME(sum)(squares);
    for (; i < count; i++)
        sum += from[i] * from[i];
    float factor = 1.0f / sqrtf(sum / (float)count + eps);
    for (i = 0; i + WIDTH <= count; i += WIDTH)
        *(NAME(vec) *)(to + i) = *(const NAME(vec) *)(from + i) * factor * *(const NAME(vec) *)(weight + i);
    for (; i < count; i++)
        to[i] = from[i] * factor * weight[i];
}

/* 2 to the power of -|x| log2(e) times ``many``: e to the power of -many |x|. */
TARGET static inline __attribute__((always_inline)) NAME(vec) NAME(falling)(NAME(vec) x, float many)
{
    NAME(vec) size = (NAME(vec))((NAME(ints))x & 0x7fffffff);
    return NAME(power)(size * (-1.44269504f * many));
}

TARGET static inline __attribute__((always_inline)) NAME(vec) NAME(gated)(const int kind, NAME(vec) gate, NAME(vec) up)
{
    if (kind == SILU) {
        NAME(vec) e = NAME(falling)(gate, 1.0f);
        NAME(ints) negative = gate < 0.0f;
        NAME(vec) above = (NAME(vec))(((NAME(ints))e & negative) | ((NAME(ints))((NAME(vec)){0} + 1.0f) & ~negative));
        return gate * (above / (e + 1.0f)) * up;
    }
    NAME(vec) u = (gate + gate * gate * gate * 0.044715f) * 0.797884561f, e = NAME(falling)(u, 2.0f);
    NAME(vec) size = (1.0f - e) / (e + 1.0f);
    NAME(vec) tanh = (NAME(vec))((NAME(ints))size | ((NAME(ints))u & (int32_t)0x80000000));
    return gate * 0.5f * (tanh + 1.0f) * up;
}

TARGET static void NAME(gate_all)(int kind, const float *gate, const float *up, long count, float *to)
{
    long i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        NAME(vec) g = *(const NAME(vec) *)(gate + i), u = *(const NAME(vec) *)(up + i);
        *(NAME(vec) *)(to + i) = kind == SILU ? NAME(gated)(SILU, g, u) : NAME(gated)(GELU, g, u);
    }
    for (; i < count; i++) {
        NAME(vec) g = (NAME(vec)){0} + gate[i], u = (NAME(vec)){0} + up[i];
        to[i] = (kind == SILU ? NAME(gated)(SILU, g, u) : NAME(gated)(GELU, g, u))[0];
    }
}
