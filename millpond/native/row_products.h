/* Row products for one instruction set; see kernels.h and instruction_set.h.
 *
 * Every element of a result has one accumulator that walks k in order, so it has the same bits whatever the number of
 * rows, the tile it falls in and the number of threads. */

TARGET static inline __attribute__((always_inline)) float NAME(sum)(NAME(vec) v)
{
    quarter part[WIDTH / 4];
    memcpy(part, &v, sizeof v);
#pragma GCC unroll 4
    for (int i = 1; i < WIDTH / 4; i++)
        part[0] += part[i];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

/* rows x cols dot products of length k: c[r][j] = a[r] . b[j] */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(
    const int rows, const int cols, long k, const float *a, long lda, const float *b, long ldb, float *c, long ldc)
{
    NAME(vec) acc[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < cols; j++)
            acc[r][j] = (NAME(vec)){0};
    long i = 0;
    for (; i + WIDTH <= k; i += WIDTH) {
        NAME(vec) w[4];
#pragma GCC unroll 4
        for (int j = 0; j < cols; j++)
            w[j] = *(const NAME(vec) *)(b + j * ldb + i);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            NAME(vec) x = *(const NAME(vec) *)(a + r * lda + i);
#pragma GCC unroll 4
            for (int j = 0; j < cols; j++)
                acc[r][j] += x * w[j];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < cols; j++) {
            float total = NAME(sum)(acc[r][j]);
            for (long t = i; t < k; t++)
                total += a[r * lda + t] * b[j * ldb + t];
            c[r * ldc + j] = total;
        }
}

TARGET static inline __attribute__((always_inline)) void NAME(strip)(
    const int cols, long m, long k, const float *a, long lda, const float *b, long ldb, float *c, long ldc)
{
    long r = 0;
    for (; r + 4 <= m; r += 4)
        NAME(tile)(4, cols, k, a + r * lda, lda, b, ldb, c + r * ldc, ldc);
    switch (m - r) {
    case 3: NAME(tile)(3, cols, k, a + r * lda, lda, b, ldb, c + r * ldc, ldc); break;
    case 2: NAME(tile)(2, cols, k, a + r * lda, lda, b, ldb, c + r * ldc, ldc); break;
    case 1: NAME(tile)(1, cols, k, a + r * lda, lda, b, ldb, c + r * ldc, ldc); break;
    }
}

/* C[m][n] = A[m][k] . B[n][k], few rows in A, B read once. */
TARGET static void NAME(dot_rows)(
    long m, long n, long k, const float *a, long lda, const float *b, long ldb, float *c, long ldc)
{
    long j = 0;
    if (m >= 3) {
        for (; j + 3 <= n; j += 3)
            NAME(strip)(3, m, k, a, lda, b + j * ldb, ldb, c + j, ldc);
    } else {
        for (; j + 4 <= n; j += 4)
            NAME(strip)(4, m, k, a, lda, b + j * ldb, ldb, c + j, ldc);
    }
    for (; j < n; j++)
        NAME(strip)(1, m, k, a, lda, b + j * ldb, ldb, c + j, ldc);
}

/* c[0..blocks*WIDTH) = sum over i of a[i] * b[i][..] */
TARGET static inline __attribute__((always_inline)) void NAME(column)(
    const int blocks, long k, const float *a, const float *b, long ldb, float *c)
{
    NAME(vec) acc[8];
#pragma GCC unroll 8
    for (int j = 0; j < blocks; j++)
        acc[j] = (NAME(vec)){0};
    for (long i = 0; i < k; i++) {
        float x = a[i];
#pragma GCC unroll 8
        for (int j = 0; j < blocks; j++)
            acc[j] += x * *(const NAME(vec) *)(b + i * ldb + j * WIDTH);
    }
#pragma GCC unroll 8
    for (int j = 0; j < blocks; j++)
        *(NAME(vec) *)(c + j * WIDTH) = acc[j];
}

/* C[m][n] = A[m][k] . B[k][n], few rows in A. */
TARGET static void NAME(mix_rows)(
    long m, long n, long k, const float *a, long lda, const float *b, long ldb, float *c, long ldc)
{
    for (long r = 0; r < m; r++) {
        const float *x = a + r * lda;
        float *y = c + r * ldc;
        long j = 0;
        for (; j + 8 * WIDTH <= n; j += 8 * WIDTH)
            NAME(column)(8, k, x, b + j, ldb, y + j);
        for (; j + 4 * WIDTH <= n; j += 4 * WIDTH)
            NAME(column)(4, k, x, b + j, ldb, y + j);
        for (; j + WIDTH <= n; j += WIDTH)
            NAME(column)(1, k, x, b + j, ldb, y + j);
        for (; j < n; j++) {
            float total = 0.0f;
            for (long i = 0; i < k; i++)
                total += x[i] * b[i * ldb + j];
            y[j] = total;
        }
    }
}
