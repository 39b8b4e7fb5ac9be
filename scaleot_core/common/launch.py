"""Tell which of how many processes this is, by what `torchrun` or `accelerate launch` puts into the environment.

Light to import, so that `--help` stays quick.
"""

import os

from scaleot_core.common.errors import UserError

RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets beside WORLD_SIZE, and without which the processes can't meet."""


def world_size() -> int:
    """Count the processes of this run; 1 unless WORLD_SIZE is above 1."""
    return max(1, _number("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Count the processes of this run that are on this machine."""
    return max(1, min(world_size(), _number("LOCAL_WORLD_SIZE", world_size())))


def rank() -> int:
    """Return this process's number, from 0; 0 where it is the only one, whatever RANK says."""
    return _number("RANK", 0) if world_size() > 1 else 0


def is_main_process() -> bool:
    """Tell whether this is the process that writes and speaks."""
    return rank() == 0


def check_launch() -> None:
    """Refuse an environment that names several processes but not how they meet, and clear what names none.

    Several processes are those that a launcher started, with all of its variables; one process that took itself for
    one of several would wait for the others, or compute and write nothing. A pod or a batch job may leave RANK or
    LOCAL_RANK behind, which lm-eval and Accelerate read too: one process alone has them removed.

    Raises:
        UserError: WORLD_SIZE is above 1 and a variable of RENDEZVOUS is missing, or RANK is out of range.
    """
    count = world_size()
    if count == 1:
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
        return
    remedy = "start it by torchrun or accelerate launch; for one process, unset WORLD_SIZE"
    if missing := [name for name in RENDEZVOUS if not os.environ.get(name)]:
        raise UserError(f"the environment has WORLD_SIZE = {count} but no {', '.join(missing)}: {remedy}")
    if not 0 <= _number("RANK", -1) < count:
        raise UserError(f"the environment has WORLD_SIZE = {count} and RANK = {os.environ['RANK']!r}: {remedy}")


def _number(name: str, default: int) -> int:
    """Read a variable of the environment as a whole number; the default where it is none."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return default
