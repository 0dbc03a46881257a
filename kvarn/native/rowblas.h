/* What the parts of the library share. */

#ifndef KVARN_ROWBLAS_H
#define KVARN_ROWBLAS_H

#define EXPORT __attribute__((visibility("default")))

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

typedef void (*real_gemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *,
                          int);

/* OpenBLAS's sgemm: one thread per call. */
extern real_gemm next_sgemm;

/* Width in bits of the vectors this machine has. */
void attention_for(int bits);

#endif
