"""What hosts differ in: old kernels, locked memory, memory cgroups, a /proc that hides processes.

Each is what this machine has, made as it is elsewhere: system calls that are refused, limits of cgroups, mounts.

T local tokens, H hidden, K top-k, E experts, R ranks.
"""

import contextlib
import ctypes
import errno
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from op_calls import check_ops, error_of
from ranks import RankContext, RankDied, raise_failures, spawn_ranks

import deep_ep
from deep_ep import groups, meeting
from deep_ep._library import ERROR_BYTES, library
from tools.twin import native

SMALL = 1 << 20  # bytes, the smallest window
CASES = {R: Case((5, 0, 7, 3)[:R], seed=R) for R in (1, 2, 3, 4)}
NOBODY = 65534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

_libc = ctypes.CDLL(None, use_errno=True)


def must(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# Linux before 5.3


def refuse_system_call(number: int, error: int) -> None:
    """From here on this thread, and what it starts, gets `error` from that call (seccomp)."""
    load_number, return_ = 0x20, 0x06
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (load_number, 0, 0, 0),
            (0x15, 0, 1, number),  # skips one unless it is this one
            (return_, 0, 0, 0x00050000 | error),
            (return_, 0, 0, 0x7FFF0000),
        )
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    set_no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    must(_libc.prctl(set_no_new_privileges, 1, 0, 0, 0))
    must(_libc.prctl(set_seccomp, filter_mode, filters, 0, 0))


def without_pidfd(ctx: RankContext, error: int) -> str:
    refuse_system_call(434, error)
    with pytest.raises(OSError) as refused:
        os.pidfd_open(os.getpid())
    assert refused.value.errno == error
    deep_ep.init(ctx.group, num_bytes=SMALL)
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "default")
    if ctx.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    x, ids = torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64)
    return error_of(deep_ep.dispatch, x, ids, num_experts=ctx.size, group=ctx.group)[1]


@pytest.mark.parametrize("error", ["ENOSYS", pytest.param("EPERM", marks=pytest.mark.slow)])
def test_without_pidfd_a_dead_peer_is_noticed(error: str) -> None:
    with spawn_ranks(2, without_pidfd, getattr(errno, error)) as ranks:
        survivor, victim = ranks.outcomes()
    raise_failures([survivor])
    assert isinstance(victim.exception, RankDied)
    assert re.search(r"rank 1 \(process \d+\) has died", survivor.value), survivor.value


# Locked memory


CURRENT, FUTURE = 1, 2


def locked(ctx: RankContext) -> int:
    """Bytes that the window gets in a process that has locked all that it has and will have."""
    must(_libc.mlockall(CURRENT | FUTURE))
    deep_ep.init(ctx.group, num_bytes=512 << 20)
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "default")
    return os.fstat(library.deep_ep_group_fd(groups._parts[ctx.group.group_name]["cpu"]._handle)).st_blocks * 512


@only_root
def test_windows_stay_sparse_where_memory_is_locked() -> None:
    with spawn_ranks(2, locked) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        assert outcome.value < 32 << 20, f"{outcome.value >> 20} MiB"


LOCKABLE = 6 << 20


def locked_too_much(ctx: RankContext) -> tuple[str, str]:
    """Rank 1 has locked what it will have, of which it may have little."""
    if ctx.rank == 1:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (LOCKABLE, LOCKABLE))
    os.setresuid(NOBODY, NOBODY, NOBODY)  # root may lock all there is
    if ctx.rank == 1:
        must(_libc.mlockall(FUTURE))
    return error_of(deep_ep.init, ctx.group, num_bytes=64 << 20)


@only_root
def test_a_window_larger_than_what_may_be_locked_is_refused() -> None:
    with spawn_ranks(2, locked_too_much) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        kind, message = outcome.value
        assert kind == "RuntimeError"
        says = rf"rank 1: cannot map a window .* may lock {LOCKABLE} bytes \(RLIMIT_MEMLOCK"
        assert re.search(says, message), message


# Memory cgroups

GIB = 1 << 30
MEMINFO = f"MemTotal: {64 << 20} kB\nMemFree: 5 kB\nMemAvailable: {48 << 20} kB\nHugePages_Total:       0\n"
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


def v2(limit: int | str, used: int, files: int = 0) -> dict[str, str]:
    stat = f"anon 5\nfile {files + 7}\nshmem 7\ninactive_file {files // 2}\nactive_file {files - files // 2}\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def v1(limit: int, used: int, files: int = 0) -> dict[str, str]:
    stat = f"cache {files}\ninactive_file 1\nactive_file 2\ntotal_inactive_file {files}\ntotal_active_file 0\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


UNLIMITED = 9223372036854771712
HOSTS: dict[str, tuple[str, str, dict[str, dict[str, str]], tuple[int, int, str]]] = {
    # what /proc says: mountinfo, cgroup; folders of cgroups; what is available, the limit, and whose it is
    "no limit": (V2.format(root="/"), "0::/user/a\n", {"user/a": v2("max", 5 * GIB)}, (0, 0, "")),
    "own": (V2.format(root="/"), "0::/user/a\n", {"user/a": v2(8 * GIB, 5 * GIB, GIB)}, (4 * GIB, 8 * GIB, "/user/a")),
    "parent": (
        V2.format(root="/"),
        "0::/user/a\n",
        {"user/a": v2(8 * GIB, GIB), "user": v2(10 * GIB, 9 * GIB)},
        (GIB, 10 * GIB, "/user"),
    ),
    "container": (V2.format(root="/"), "0::/\n", {"": v2(6 * GIB, 2 * GIB)}, (4 * GIB, 6 * GIB, "/")),
    "outside": (V2.format(root="/"), "0::/../other\n", {"": v2(6 * GIB, 2 * GIB)}, (4 * GIB, 6 * GIB, "/")),
    "full": (V2.format(root="/"), "0::/\n", {"": v2(2 * GIB, 2 * GIB + 4096)}, (0, 2 * GIB, "/")),
    "v1": (
        V1.format(root="/"),
        "9:name=systemd:/x\n4:cpu,memory:/job/7\n0::/y\n",
        {"memory/job/7": v1(4 * GIB, 3 * GIB, GIB), "memory/job": v1(UNLIMITED, 9 * GIB)},
        (2 * GIB, 4 * GIB, "/job/7"),
    ),
    "v1 container": (
        V1.format(root="/docker/ab"),
        "4:memory:/docker/ab\n",
        {"memory": v1(4 * GIB, 3 * GIB)},
        (GIB, 4 * GIB, "/"),
    ),
    "v1 no limit": (V1.format(root="/"), "4:memory:/\n", {"memory": v1(UNLIMITED, GIB)}, (0, 0, "")),
    "none": ("", "", {}, (0, 0, "")),
}


@pytest.mark.parametrize("host", HOSTS)
def test_limits_of_cgroups(host: str, tmp_path: Path) -> None:
    mountinfo, cgroup, folders, (available, limit, owner) = HOSTS[host]
    files = {"proc/meminfo": MEMINFO, "proc/self/mountinfo": mountinfo, "proc/self/cgroup": cgroup}
    for folder, contents in folders.items():
        files |= {f"sys/fs/cgroup/{folder}/{name}": text for name, text in contents.items()}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    numbers = (ctypes.c_uint64 * 4)()
    name, error = ctypes.create_string_buffer(ERROR_BYTES), ctypes.create_string_buffer(ERROR_BYTES)
    assert library.deep_ep_host_memory(str(tmp_path).encode(), numbers, name, error) == 0, error.value
    assert list(numbers) == [48 * GIB, 64 * GIB, available, limit]
    assert name.value.decode() == (f"the memory cgroup {owner}" if owner else "")


def cgroup_folder() -> tuple[Path, str] | None:
    """Where a memory cgroup can be made, and what its limit is called."""
    for folder, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        path = Path("/sys/fs/cgroup", folder, f"deep_ep_{os.getpid()}")
        try:
            path.mkdir()
        except OSError:
            continue
        is_one = (path / limit).exists()
        path.rmdir()
        if is_one:
            return path, limit
    return None


@contextlib.contextmanager
def cgroup(num_bytes: int) -> Iterator[Path]:
    """A memory cgroup that has so many bytes."""
    found = cgroup_folder()
    assert found is not None
    path, limit = found
    path.mkdir()
    try:
        (path / limit).write_text(str(num_bytes))
        yield path
    finally:
        while path.exists():  # the last process of it may still end
            with contextlib.suppress(OSError):
                path.rmdir()
            os.sched_yield()


LIMIT = 512 << 20


def in_cgroup(ctx: RankContext, path: str) -> dict[str, Any]:
    """What rank 1, in a cgroup, may have: errors, and what works."""
    group, H = ctx.group, 1024
    if ctx.rank == 1:
        Path(path, "cgroup.procs").write_text(str(os.getpid()))
    found: dict[str, Any] = {"init": error_of(deep_ep.init, group, num_bytes=2 * LIMIT)}
    deep_ep.init(group)
    found["window"] = groups._parts[group.group_name]["cpu"].num_bytes
    check_ops(CASES[ctx.size], ctx.rank, group.group_name, "default")
    x, ids = torch.ones(3, H), torch.zeros(3, 1, dtype=torch.int64)
    W = LIMIT // (4 * H)
    found["worst"] = error_of(
        deep_ep.dispatch, x, ids, num_experts=ctx.size, num_worst_tokens=W if ctx.rank == 1 else 8, group=group
    )
    check_ops(CASES[ctx.size], ctx.rank, group.group_name, "default")
    # Many rows for rank 1, whose number it learns when they come.
    T = 200_000
    x = torch.ones(1, H).expand(T if ctx.rank == 0 else 1, H).contiguous()
    found["exact"] = error_of(
        deep_ep.dispatch, x, torch.ones(len(x), 1, dtype=torch.int64), num_experts=ctx.size, group=group
    )
    deep_ep.init(group)
    check_ops(CASES[ctx.size], ctx.rank, group.group_name, "default")
    deep_ep.destroy(group)
    return found


@only_root
@pytest.mark.skipif(cgroup_folder() is None, reason="no memory cgroup can be made here")
def test_what_a_cgroup_does_not_have_is_refused() -> None:
    with cgroup(LIMIT) as path, spawn_ranks(2, in_cgroup, str(path)) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    name = rf"the memory cgroup /\S*{path.name}"
    for rank, outcome in enumerate(outcomes):
        found = outcome.value
        assert found["init"][0] == found["worst"][0] == "RuntimeError"
        assert re.search(rf"rank 1: windows of {2 * LIMIT} bytes .* {name} has only \d+ bytes", found["init"][1])
        assert found["window"] <= LIMIT // 4 or rank == 0
        assert re.search(r"a memory cgroup has too little memory, \d+ bytes: rank 1 makes", found["worst"][1])
        assert re.search(rf"rank 1 failed in the middle .* {name} has only \d+ bytes", found["exact"][1])


# A /proc that shows less


def mount_proc(options: str) -> None:
    """From here on this process has such a /proc, and nobody else."""
    new_mounts, recursive_private = 0x00020000, 0x4000 | 1 << 18
    must(_libc.unshare(new_mounts))
    must(_libc.mount(b"none", b"/", None, recursive_private, None))
    must(_libc.mount(b"proc", b"/proc", b"proc", 0, options.encode()))


def may_mount() -> bool:
    """Whether that can be, which before Linux 5.8 would change every /proc there is."""
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (5, 8) or os.geteuid() != 0:
        return False
    child = os.fork()
    if child == 0:
        try:
            mount_proc("hidepid=2")
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def in_proc(ctx: RankContext, options: str, users: list[int], strategy: str, is_dumpable: bool) -> tuple[str, str]:
    """What init says in such a /proc, to ranks of these users; "" if all works."""
    mount_proc(options)
    if user := users[ctx.rank]:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    must(_libc.prctl(4, int(is_dumpable), 0, 0, 0))
    for rank in (ctx.rank, 1 - ctx.rank):  # its own, and that of the other one
        if rank == ctx.rank:
            ctx.store.set(f"process {rank}", pickle.dumps(meeting.this_process()))
        assert not pickle.loads(ctx.store.get(f"process {rank}")).has_ended()
    kind, message = error_of(deep_ep.init, ctx.group, strategy=strategy, num_bytes=SMALL)
    if not kind:
        check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, strategy)
        deep_ep.destroy(ctx.group)
    return kind, message


@pytest.mark.skipif(not may_mount(), reason="needs root that may mount")
@pytest.mark.parametrize(
    "options, users, strategy, is_dumpable, says",
    [
        ("hidepid=2", [NOBODY, NOBODY - 1], "alltoall", True, ""),
        pytest.param("hidepid=2", [NOBODY, NOBODY], "default", True, "", marks=pytest.mark.slow),
        ("hidepid=2", [NOBODY, NOBODY], "default", False, "rank 1: cannot open .*; ranks must see each other in /proc"),
        pytest.param("subset=pid", [0, 0], "alltoall", True, "", marks=pytest.mark.slow),
        ("subset=pid", [0, 0], "default", True, "has ranks whose /proc is without .* use DEEP_USE_MODE=alltoall"),
    ],
)
def test_a_proc_that_hides(options: str, users: list[int], strategy: str, is_dumpable: bool, says: str) -> None:
    with spawn_ranks(2, in_proc, options, users, strategy, is_dumpable) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        kind, message = outcome.value
        assert kind == ("RuntimeError" if says else ""), message
        assert re.search(says, message), message


# Two builds

TWO_BUILDS = """
import sys
from datetime import timedelta
import torch.distributed as dist, deep_ep
rank, port, strategy = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, is_master=False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
try:
    deep_ep.init(strategy=strategy)
except RuntimeError as error:
    print(error)
store.set(f"done {rank}", "")
store.wait(["done 0", "done 1"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["default", "alltoall"])
def test_two_builds_do_not_meet(strategy: str, tmp_path: Path) -> None:
    """Ranks run copies of the package, that of rank 1 with one line more."""
    for rank in ("0", "1"):
        for folder in deep_ep.__path__:
            shutil.copytree(folder, tmp_path / rank / "deep_ep", dirs_exist_ok=True)
    with open(tmp_path / "1" / "deep_ep" / "checks.py", "a") as file:
        file.write("# another build\n")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", TWO_BUILDS, str(rank), str(store.port), strategy],
            env=environment | {"PYTHONPATH": os.pathsep.join([str(tmp_path / str(rank)), *sys.path])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [rank.communicate()[0] for rank in ranks]
    name = r"\d\S* \(\w{8}\)"
    for text in told:
        found = re.search(rf"different builds of deep_ep: rank 0 has ({name}), rank 1 has ({name});", text)
        assert found and found[1] != found[2], text


@pytest.mark.slow
def test_a_build_knows_its_sources(tmp_path: Path) -> None:
    """What is compiled changes with what ranks share, and with nothing else."""
    root = Path(__file__).parents[2]
    tree = tmp_path / "tree"
    for folder in ("src", "torch_library", "ops", "cmake"):
        shutil.copytree(root / folder, tree / folder)
    shutil.copy(root / "CMakeLists.txt", tree)

    def digest() -> str:
        tools = [f"-DCMAKE_MAKE_PROGRAM={native.tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
        command = [native.tool("cmake"), "-S", tree, "-B", tmp_path / "build", "-G", "Ninja", *tools]
        subprocess.run(command, check=True, capture_output=True)
        ninja = (tmp_path / "build" / "build.ninja").read_text()
        (found,) = set(re.findall(r"DEEP_EP_SOURCES=\W*(\w{64})", ninja))
        return found

    first = digest()
    assert digest() == first == library.deep_ep_sources().decode()
    with open(tree / "src" / "shm" / "window_layout.h", "a") as file:
        file.write("\n")
    assert digest() != first
