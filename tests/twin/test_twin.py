"""The twin itself: kernels that keep or break one rule each, with its checks and its adversary.

The kernels are in twin_rules/*.cpp; ops/twin/core.h numbers the rules. A kernel that breaks a rule is caught at its
line, with pipe and address; one that keeps it runs through, in fast mode and with every seed, on both architectures.
"""

import ctypes
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tools.twin import native

pytestmark = pytest.mark.slow  # the library has to be built

RULES = Path(__file__).parent / "twin_rules"

ARCHS = (2201, 3510)
SEEDS = range(8)
RARE_SEEDS = range(64)
"""As many as it takes until something that may happen does."""

NEVER, SOMETIMES, ALWAYS = range(3)


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(native.build(RULES, native.root() / "build" / "twin" / "rules", "twin_rules")))
    lib.twin_rule.restype = lib.twin_run_rule.restype = ctypes.c_char_p
    return lib


class Rule(NamedTuple):
    index: int
    name: str
    arch: int
    fast: bool
    seen: int
    breaks: list[str]

    def is_caught(self, arch: int, adversarial: bool) -> bool:
        return bool(self.breaks) and self.arch in (0, arch) and (adversarial or self.fast)

    def run(self, arch: int, seed: int | None) -> bool:
        """Runs it, in fast mode without a seed; returns whether it has seen what it looks for."""
        answer = library().twin_run_rule(self.index, arch, seed is not None, ctypes.c_uint64(seed or 0)).decode()
        caught, other, seen, result, *violations = answer.split("\n")
        if self.is_caught(arch, seed is not None):
            assert violations, "it is not caught"
            text = violations[0]
            lines = [line for line in (caught, other) if line != "0"]
            assert re.match(rf"kernel {self.name}, (cube )?core ", text), text
            for part in (*self.breaks, *(f".cpp:{line}" for line in lines)):
                assert part in text, f"{part!r} is not in {text!r}"
        else:
            assert not violations, violations
            assert result == "1", "the result is wrong"
        return seen == "1"


@functools.cache
def rules() -> dict[str, Rule]:
    found = {}
    for index in range(library().twin_rules()):
        name, arch, fast, seen, *breaks = library().twin_rule(index).decode().split("\n")
        found[name] = Rule(index, name, int(arch), fast == "1", int(seen), breaks)
    return found


def names() -> list[str]:
    """Of all rules, out of their source: collecting tests builds nothing."""
    return [
        name for path in sorted(RULES.glob("*.cpp")) for name in re.findall(r"^RULE\(\s*(\w+)", path.read_text(), re.M)
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", names())
def test_rule(name: str, arch: int) -> None:
    rule = rules()[name]
    seen = [rule.run(arch, None)] + [rule.run(arch, seed) for seed in SEEDS]
    if rule.seen == NEVER or rule.arch not in (0, arch):
        assert not any(seen)
    elif rule.seen == ALWAYS:
        assert all(seen)
    else:
        assert any(seen) or any(rule.run(arch, seed) for seed in RARE_SEEDS)


def test_names_are_those_of_the_library() -> None:
    assert sorted(names()) == sorted(rules())


REGIONS = ("in", "out", "work", "window of rank 0", "window of rank 1", "sync")


class Counted(NamedTuple):
    vector: int
    mte2: int
    mte3: int
    barriers: int
    syncs: int
    events: int
    peak: int


def count(name: str, arch: int, adversarial: bool, core: int = 0) -> tuple[Counted, dict[str, list[int]]]:
    """What a core has done; and by region that it has touched: bytes and transfers read, and written."""
    size = len(Counted._fields)
    counts = (ctypes.c_uint64 * (size + 4 * len(REGIONS)))()
    library().twin_count(rules()[name].index, arch, adversarial, core, counts)
    by_region = {region: counts[size + 4 * i : size + 4 * i + 4] for i, region in enumerate(REGIONS)}
    return Counted(*counts[:size]), {region: moved for region, moved in by_region.items() if any(moved)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("adversarial", [False, True])
def test_counters(adversarial: bool, arch: int) -> None:
    # 4 rounds of 256 bytes, in four buffers; EnQue and FreeTensor of both queues.
    assert count("rule3_queues_keep", arch, adversarial) == (
        Counted(vector=4, mte2=4, mte3=4, barriers=0, syncs=0, events=16, peak=1024),
        {"in": [1024, 4, 0, 0], "out": [0, 0, 1024, 4]},
    )
    # SyncAll is no PipeBarrier, although it has one on 2201.
    assert count("rule5_many_cores_keep", arch, adversarial, core=7) == (
        Counted(vector=1, mte2=0, mte3=20, barriers=1, syncs=20, events=0, peak=3072),
        {"work": [0, 0, 20 * 32, 20]},
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("adversarial", [False, True])
def test_counters_by_region(adversarial: bool, arch: int) -> None:
    for core, blocks in ((0, 2), (1, 3)):
        counted, by_region = count("counted_by_region_keeps", arch, adversarial, core)
        # A transfer is one, however many blocks of 20 bytes it has and whatever pads them.
        assert by_region == {
            "in": [20 * blocks, 1, 0, 0],
            "work": [0, 0, 20 * blocks, 1],
            "window of rank 0": [64, 2, 0, 0],
            "window of rank 1": [0, 0, 1024 + 64, 2],
        }
        assert counted == Counted(vector=1, mte2=3, mte3=3, barriers=2, syncs=1, events=1, peak=3072)


# ---- Numbers.

ROUND = {"none": 0, "rint": 1, "floor": 2, "ceil": 3, "round": 4, "trunc": 5}
DTYPES = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int32": torch.int32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


def cast(x: torch.Tensor, source: str, destination: str, mode: str) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=DTYPES[destination])
    library().twin_cast(
        source.encode(),
        destination.encode(),
        ROUND[mode],
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
        x.numel(),
    )
    return y


def floats() -> torch.Tensor:
    """Of all exponents, with mantissas around ties of both 16-bit types."""
    high = torch.arange(0, 1 << 16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] + low).flatten()
    return bits.to(torch.int32).view(torch.float32)


def assert_same_numbers(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_16_bit_numbers(dtype: str) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    assert_same_numbers(cast(numbers, dtype, "float", "none"), numbers.float())
    assert_same_numbers(cast(floats(), "float", dtype, "rint"), floats().to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_directed_rounding(dtype: str) -> None:
    x = floats()
    x = x[x.isfinite()]
    down, up = (cast(x, "float", dtype, mode).float() for mode in ("floor", "ceil"))
    assert (down <= x).all() and (x <= up).all()
    exact = x.to(DTYPES[dtype]).float() == x
    assert (down[exact] == x[exact]).all() and (up[exact] == x[exact]).all()
    assert ((up > down) | exact).all()
    # The number towards 0 is one of the two; nothing lies between them.
    assert_same_numbers(cast(x, "float", dtype, "trunc").float(), torch.where(x < 0, up, down))
    nearest = x.to(DTYPES[dtype]).float()
    assert ((nearest == down) | (nearest == up)).all()


def test_integers() -> None:
    x = torch.cat([torch.arange(-40, 41) / 4, torch.tensor([126.5, 127.5, 300.0, -127.5, -128.5, -300.0])])
    by_mode = {"rint": torch.round, "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc}
    for mode, function in by_mode.items():
        expected = function(x)
        assert_same_numbers(cast(x, "float", "int32", mode), expected.to(torch.int32))
        assert_same_numbers(cast(x.half(), "half", "int8", mode), expected.clamp(-128, 127).to(torch.int8))
    away = torch.sign(x) * torch.floor(x.abs() + 0.5)
    assert_same_numbers(cast(x, "float", "int32", "round"), away.to(torch.int32))
    whole = torch.tensor([0, 1, -1, 2**24 + 1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert_same_numbers(cast(whole, "int32", "float", "rint"), whole.float())
    assert_same_numbers(
        cast(torch.tensor([3e9, -3e9]), "float", "int32", "rint"), torch.tensor([2**31 - 1, -(2**31)]).int()
    )


# ---- Cube cores.


class Product(NamedTuple):
    violation: str
    out: torch.Tensor


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    transposed: bool,
    arch: int,
    seed: int | None,
    cores: int = 2,
) -> Product:
    """[M, K] x [K, N] on cube cores, times scales of rows and of columns on vector cores: twin_rules/matmul.cpp."""
    (m, k), n = a.shape, b.shape[0 if transposed else 1]
    out = torch.full((m, n), float("nan"))
    name = next(name for name, dtype in DTYPES.items() if dtype == a.dtype)
    lib = library()
    lib.twin_matmul.restype = ctypes.c_char_p
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, *scales, out)]
    answer = lib.twin_matmul(
        name.encode(), arch, ctypes.c_int64(-1 if seed is None else seed), cores, m, n, k, transposed, *pointers
    )
    return Product(answer.decode(), out)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("transposed", [True, False])
def test_int8_product(transposed: bool, arch: int) -> None:
    for seed in (None, *SEEDS):
        generator = torch.Generator().manual_seed(seed or 0)
        # Tiles are of [48, 64, 96]: whole ones and parts in each direction.
        m, k, n = 70, 240, 160
        a, b = (
            torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
            for shape in ((m, k), (n, k) if transposed else (k, n))
        )
        rows, columns = torch.rand(m, generator=generator), torch.rand(n, generator=generator)
        found = multiply(a, b, (rows, columns), transposed, arch, seed)
        assert found.violation == ""
        exact = a.numpy().astype("int32") @ (b.numpy().T if transposed else b.numpy()).astype("int32")
        expected = torch.from_numpy(exact).float() * columns * rows[:, None]
        torch.testing.assert_close(found.out, expected, rtol=0, atol=0)


FLOATS = [(dtype, dtype, arch) for dtype in (torch.float16, torch.bfloat16) for arch in ARCHS]
FLOATS8 = (torch.float8_e4m3fn, torch.float8_e5m2, 3510)


@pytest.mark.parametrize(
    ("a_dtype", "b_dtype", "arch", "transposed"),
    [(*types, transposed) for types in FLOATS for transposed in (True, False)] + [(*FLOATS8, True)],
)
def test_float_product(a_dtype: torch.dtype, b_dtype: torch.dtype, arch: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    m, k, n = 70, 240, 96
    a = torch.randn((m, k), generator=generator).to(a_dtype)
    b = torch.randn((n, k) if transposed else (k, n), generator=generator).to(b_dtype)
    whole = b.T if transposed else b
    exact = a.double() @ whole.double()
    # What fp32 sums of k products can be wrong by, in any order.
    bound = k * 2.0**-24 * (a.double().abs() @ whole.double().abs()) * 1.01
    outs = []
    for seed in (None, *SEEDS):
        found = multiply(a, b, (torch.ones(m), torch.ones(n)), transposed, arch, seed)
        assert found.violation == ""
        assert ((found.out.double() - exact).abs() <= bound).all()
        outs.append(found.out)
    assert any(not torch.equal(outs[0], out) for out in outs[1:]), "the order of sums never varies"
