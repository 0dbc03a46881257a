"""Environment for ranks on a machine with fewer cores than ranks; see patient_ring.c."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("patient_ring.c")


@functools.cache
def patient() -> dict[str, str]:
    """What makes MLX's ring wait instead of spin; empty where that cannot be had, and then it is only slow."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        return {}
    library = Path(tempfile.mkdtemp(prefix="millpond-ring-")) / "patient_ring.so"
    built = subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=False)
    return {"LD_PRELOAD": str(library)} if built.returncode == 0 else {}
