"""The compiled part, for Linux CPUs: rowblas.c. Loaded by kvarn.model.blas, never imported."""
