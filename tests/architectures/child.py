"""``python -m architectures.child NAME gpu|cpu FOLDER FILE``: one architecture; FILE gets the report."""

from __future__ import annotations

import sys

from millpond.model import blas

if __name__ == "__main__":
    blas.prepare()  # before anything imports mlx
    from architectures.serve import serve

    serve(*sys.argv[1:])
