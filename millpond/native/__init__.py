"""The compiled part, for Linux CPUs: rowblas.c. Loaded by millpond.model.blas, never imported."""
