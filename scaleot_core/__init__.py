"""ScaleOT: offsite tuning with Dynamic LayerReplace and Selective Rank Compression (AAAI 2025).

Rooms, from the ground up; imports point one way: `common`; `params`; `models` and `evaluation`; `training`, `data` and
`reporting`; `compression`, which is the paper's method, and `tuning`; `exchange` between the parties; `methods` that
build an emulator; `attacks` on it. On top: `preflight`, `pipeline` and `results` for the stages, `cli` for the parties.
"""

import os
import sys

__version__ = "0.1.0"

if not sys.stderr.isatty():  # other libraries' progress bars, which a log file doesn't need
    os.environ.setdefault("TQDM_DISABLE", "1")
