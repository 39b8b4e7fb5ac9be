"""What every stage shares."""

import sys

from scaleot_core.common.errors import UserError
from scaleot_core.params import Params


def named_task(params: Params) -> str:
    """The task that a stage's command line names; UserError for none, or one that params.yaml doesn't have."""
    given = sys.argv[1:]
    if len(given) != 1 or given[0] not in params.tasks:
        raise UserError(f"name one of the tasks in params.yaml: python {sys.argv[0]} {'|'.join(params.tasks)}")
    return given[0]
