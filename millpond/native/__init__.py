"""The compiled part, for Linux CPUs; rowblas.c is its top. Loaded by millpond.model.blas, never imported."""
