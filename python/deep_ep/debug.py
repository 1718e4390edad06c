"""What a rank has issued, and where the time went."""

from .groups import cpu_windows, info_of
from .process_groups import Group
from .windows import Windows


def op_log(group: Group = None, since: int = 0) -> tuple[list[str], int]:
    """What this rank issued under ``default``: for debugging ranks that fall out of step.

    Returns:
        The names of the communicating ops after the first `since` ones, oldest first (1024 are remembered), and how
        many have been issued by now.
    """
    return _cpu_windows(group).log(since)


def phases(group: Group = None) -> dict[str, dict[str, float]]:
    """Where the time of this rank's ops under ``default`` on CPU has gone, since the windows were made.

    Returns:
        For each op that has finished, "calls", and seconds: "counts" (telling peers what is wanted, and checks), "wait"
        (for peers), "allocate" (outputs, and where rows go), "copy" (rows into windows), "reduce" (sums of rows that
        have come, and what goes with rows), "finish". What is before and after in Python and in torch's dispatcher is
        not in them; torch.profiler has the ops as deep_ep::dispatch and so on.
    """
    return _cpu_windows(group).phases()


def _cpu_windows(group: Group) -> Windows:
    info = info_of(group)
    windows = cpu_windows(info.name)
    if windows is None:
        raise RuntimeError(
            f"deep_ep: the group '{info.name}' has no windows on CPU; alltoall keeps neither log nor times"
        )
    return windows
