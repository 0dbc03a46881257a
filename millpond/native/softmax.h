/* One tile of a softmax for one instruction set; see kernels.h and instruction_set.h. */

/* 2 to the power of x, x at most 0; relative error below 2e-7, and 0 below 2^-126. */
TARGET static inline __attribute__((always_inline)) NAME(vec) NAME(power)(NAME(vec) x)
{
    const NAME(vec) shift = (NAME(vec)){0} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    NAME(ints) counts = ~(x < -126.0f); /* what is not a number stays so */
    NAME(vec) shifted = x + shift;
    NAME(vec) f = x - (shifted - shift); /* -0.5 to 0.5; what follows is exp(f ln 2) by its series */
    NAME(vec) y = f * 1.525273380e-5f + 1.540353040e-4f;
    y = y * f + 1.333355815e-3f;
    y = y * f + 9.618129108e-3f;
    y = y * f + 5.550410866e-2f;
    y = y * f + 2.402265070e-1f;
    y = y * f + 6.931471806e-1f;
    y = y * f + 1.0f;
    NAME(ints) bits = (NAME(ints))y + ((NAME(ints))shifted << 23);
    return (NAME(vec))(bits & counts);
}

TARGET static inline __attribute__((always_inline)) NAME(vec) NAME(larger)(NAME(vec) a, NAME(vec) b)
{
    NAME(ints) first = a > b;
    return (NAME(vec))(((NAME(ints))a & first) | ((NAME(ints))b & ~first));
}

TARGET static float NAME(softmax_row)(float *scores, long cols, struct running *running)
{
    NAME(vec) most = (NAME(vec)){0} + running->largest;
    for (long j = 0; j < cols; j += WIDTH)
        most = NAME(larger)(*(const NAME(vec) *)(scores + j), most);
    float largest = most[0];
    for (int i = 1; i < WIDTH; i++)
        largest = most[i] > largest ? most[i] : largest;
    float base = largest == -INFINITY ? 0.0f : largest; /* nothing is seen yet */
    NAME(vec) sum = {0};
    for (long j = 0; j < cols; j += WIDTH) {
        NAME(vec) weight = NAME(power)(*(const NAME(vec) *)(scores + j) - base);
        *(NAME(vec) *)(scores + j) = weight;
        sum += weight;
    }
    float factor = NAME(power)((NAME(vec)){0} + (running->largest - base))[0];
    float total = 0.0f;
    for (int i = 0; i < WIDTH; i++)
        total += sum[i];
    running->largest = largest;
    running->sum = running->sum * factor + total;
    return factor;
}
