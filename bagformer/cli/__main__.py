"""``python -m bagformer.cli`` is the command ``bagformer``."""

import sys

from bagformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
