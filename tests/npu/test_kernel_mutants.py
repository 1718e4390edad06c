"""A sample of `make mutate-kernels`: faults in the AscendC kernels that the twin, a result or a status must show."""

import re

import mutants
import mutate
import pytest
from ranks import RankPool

pytestmark = pytest.mark.torch_npu

EVERY = 5


@pytest.mark.slow
def test_a_sample_is_caught() -> None:
    library, made = mutate.build()
    pool = RankPool(mutate.SIZE, init=False)
    try:
        assert mutate.caught(pool, library, None) is None
        sample = made[::EVERY]
        survivors = [mutant for mutant in sample if mutate.caught(pool, library, mutant.number) is None]
    finally:
        pool.close()
    assert len(sample) > 15
    assert len(survivors) <= 0.05 * len(sample), "\n".join(map(str, survivors))


def test_every_pattern_is_in_the_sources() -> None:
    """A statement that is written in another way must not lose its mutants unseen."""
    texts = [path.read_text() for path, _ in mutants.sources()]
    for pattern in mutants.patterns():
        assert any(re.search(rf"(?<![\w.:]){pattern}(?!\w)", text) for text in texts), pattern


def test_no_statement_that_synchronises_is_forgotten() -> None:
    """Each call of AscendC's that orders something has its mutant."""
    synchronising = re.compile(
        r"\b(SetFlag|WaitFlag|PipeBarrier|SyncAll|EnQue|DataCacheCleanAndInvalid|order|all_blocks|refresh|SetAtomic\w+)\b[<(]"
    )
    for path, _ in mutants.sources():
        text = path.read_text()
        _, made = mutants.mutate(text, path.name, 0)
        mutated = {mutant.line for mutant in made}
        for number, line in enumerate(text.splitlines(), start=1):
            code = line.partition("//")[0]
            is_definition = re.search(r"__aicore__ (inline )?void (order|all_blocks|refresh)\(", code)
            if synchronising.search(code) and not is_definition:
                assert number in mutated, f"{path.name}:{number}: {line.strip()}"
