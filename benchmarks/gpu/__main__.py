"""``python benchmarks/gpu --out FILE``: see docs/gpu.md; run_on_gpu.sh builds first."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpu import supervisor  # noqa: E402

if __name__ == "__main__":
    sys.exit(supervisor.main(sys.argv[1:]))
