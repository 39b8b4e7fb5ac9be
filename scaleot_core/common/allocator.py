"""Tell glibc's allocator when to keep freed memory; without glibc do nothing."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h has them


def keep_freed_memory() -> None:
    """Keep large freed blocks, instead of paging them in anew at every step.

    Paging took half of the CPU time of the local fits, which run 2.5 times as fast with it. For loops whose steps all
    have the same shapes: where they differ, as in tuning, kept blocks pile up in the gaps between others.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**30)
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give every freed block of a MiB and more back at once, so that none pile up."""
    _mallopt(M_MMAP_THRESHOLD, 2**20)


def _mallopt(option: int, value: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have none, Windows not even the way to it
        return
    mallopt(option, value)
