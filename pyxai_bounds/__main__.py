"""``python -m pyxai_bounds`` is ``pyxai-bounds``."""

import sys

from pyxai_bounds.cli import main

if __name__ == "__main__":
    sys.exit(main())
