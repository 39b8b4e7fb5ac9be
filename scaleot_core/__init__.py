"""ScaleOT: offsite tuning with Dynamic LayerReplace and Selective Rank Compression (AAAI 2025).

Each module is one idea. From what a stage or a party calls to what all stand on: `cli`; `page` and `pictures` over
`report`; `attacks`; `methods`; `adapter` over `tuning`, `examples` and `privacy`; `evaluation` over `tasks`; `package`
over `handover` and `emulator`, which stands on `plan`, `rank_compression` and `harmonizer`; `dlr` and `importance`;
`models` over `families`; `embedded`, `questions` and `corpus` for the data; `experiments`; `training`, `runtime`,
`params`, `progress`, `files`, `errors`.
"""

import os
import sys

__version__ = "0.1.0"

if not sys.stderr.isatty():  # other libraries' progress bars, which a log file doesn't need
    os.environ.setdefault("TQDM_DISABLE", "1")
