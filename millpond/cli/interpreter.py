"""How the front end's interpreter divides its time.

Text threads read prompts and bodies while the event loop answers everybody else. A thread that computes keeps the
interpreter for a switch interval after another has asked for it, and a token on its way to a client asks several times.
A garbage collection stops all of them for as long as there are objects to look at.
"""

from __future__ import annotations

import gc
import sys

SWITCH_SECONDS = 0.0005
"""A tenth of Python's: costs a computing thread one to two per cent."""
YOUNG_OBJECTS = 50_000
"""Made since the last collection when the next one comes. By Python's own 700, a large body is looked through some
hundreds of times while it is being read."""
YOUNG_COLLECTIONS = 1
"""Of those, when what has outlived them is looked through, too: by Python's own ten, half a million objects at once."""


def settle() -> None:
    """To be called once all that stays has been loaded, and again when other things have: no collection looks at it."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_COLLECTIONS, 1000 // YOUNG_COLLECTIONS)
