"""``python -m millpond.cli.held COMMAND ...``: a ``millpond`` command that ends with the process that started it.

That process holds the other end of standard input. For servers that belong to another command, such as ``millpond
chat``; ``millpond serve`` itself outlives its terminal.
"""

from __future__ import annotations

import sys

from millpond.cli.main import main
from millpond.lifeline import die_with_parent, end_with

if __name__ == "__main__":
    die_with_parent()
    end_with(sys.stdin.fileno())
    sys.exit(main())
