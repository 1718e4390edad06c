"""Under the real torch_npu, the stand-in for CANN behaves like devices, and shows what a program did not wait for."""

import ctypes
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch_npu")
import torch
from cann import stand_in

pytestmark = pytest.mark.skipif(not stand_in.in_use(), reason="the stand-in for CANN is not on LD_LIBRARY_PATH")

# Values of enumerations in acl_rt.h: of aclrtMemcpyKind, and of aclmdlRICaptureMode.
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
GLOBAL, RELAXED = 0, 2
POISON = 0xA5


@pytest.fixture(autouse=True)
def clean_slate():
    torch.npu.set_stream(torch.npu.default_stream())  # where a failed capture leaves torch_npu on its stream
    torch.npu.synchronize()
    stand_in.clear_log()


@pytest.fixture
def acl():
    return ctypes.CDLL("libascendcl.so")


@pytest.fixture
def side():
    return torch.npu.Stream()


@pytest.fixture
def address(acl):
    """4096 bytes of device memory."""
    address = ctypes.c_void_p()
    assert acl.aclrtMalloc(ctypes.byref(address), 4096, 0) == 0
    yield address
    acl.aclrtFree(address)


def ones():
    return torch.ones(4).pin_memory()


def launched():
    """Returns when torch_npu's own queue is empty: asking for the handle of a stream waits for that, and only that."""
    assert torch.npu.current_stream().npu_stream


def now(tensor):
    """What is in the memory now, whatever has been launched."""
    launched()
    return list((ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr()))


def run_python(code, *args, **environment):
    command, env = [sys.executable, "-c", code, *args], {**os.environ, **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.splitlines()[-1]


# Devices and copies.


def test_every_soc_has_devices_that_hold_tensors():
    code = """
import torch, torch_npu
x = torch.arange(6.0).view(2, 3)
assert torch.equal(x.npu().t().cpu(), x.t()) and torch.equal(x.to("npu:2").to("npu:1").cpu(), x)
print(torch.npu.is_available(), torch.npu.device_count(), torch.npu.get_device_name(), torch.npu.current_device())
"""
    socs = ["Ascend910B3", "Ascend910_9391", "Ascend950PR_9589"]
    processes = [run_python(code, CANN_STAND_IN_SOC=soc, CANN_STAND_IN_DEVICES="3") for soc in socs]
    assert list(map(output_of, processes)) == [f"True 3 {soc} 0" for soc in socs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool])
def test_copies_keep_every_bit(dtype):
    x = torch.randint(0, 2, (4, 6)).to(dtype)
    y = x.npu()
    assert torch.equal(y.cpu(), x)
    assert torch.equal(torch.empty_like(y).copy_(y).cpu(), x)
    assert torch.equal(y.t().contiguous().cpu(), x.t())
    assert torch.equal(y[1:3, ::2].cpu(), x[1:3, ::2])
    assert torch.equal(torch.empty_like(y).copy_(y[:, :1]).cpu(), x[:, :1].expand(4, 6))
    assert not torch.zeros_like(y).cpu().any()
    assert stand_in.log("missing") == stand_in.log("error") == []


def test_new_memory_is_poisoned(acl, address):
    host = ctypes.create_string_buffer(4096)
    assert acl.aclrtMemcpy(host, 4096, address, 4096, DEVICE_TO_HOST) == 0
    assert set(host.raw) == {POISON}


def test_free_memory_shrinks():
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    kept = torch.empty(32 << 20, device="npu", dtype=torch.uint8)
    assert torch.npu.mem_get_info()[0] <= free - kept.numel()
    del kept
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info() == (free, total)


@pytest.mark.parametrize("operator", [lambda x: x + x, lambda x: x.to(torch.int32), lambda x: x.fill_(1.0)])
def test_a_missing_operator_is_an_error_and_leaves_the_process_usable(operator):
    x = ones().npu()
    with pytest.raises(RuntimeError, match=r"Acl op is disabled|aclnnInplaceCopy"):
        operator(x)
    assert x.cpu().tolist() == [1.0] * 4


# Streams run late, and in order.


def test_a_copy_on_another_stream_has_not_happened_until_that_stream_is_waited_for(side):
    x = torch.zeros(4, device="npu")
    assert x.cpu().tolist() == [0.0] * 4
    with torch.npu.stream(side):
        x.copy_(ones(), non_blocking=True)
    assert now(x) == [0.0] * 4
    assert x.cpu().tolist() == [0.0] * 4  # waits for the current stream only
    side.synchronize()
    assert x.cpu().tolist() == [1.0] * 4


def test_wait_stream_orders(side):
    x = torch.zeros(4, device="npu")
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        x.copy_(ones(), non_blocking=True)
    x.record_stream(side)
    torch.npu.current_stream().wait_stream(side)
    assert x.cpu().tolist() == [1.0] * 4


@pytest.mark.parametrize("too_early", [False, True])
def test_an_event_orders_what_was_launched_before_it(side, too_early):
    x, event = torch.zeros(4, device="npu"), torch.npu.Event()
    torch.npu.synchronize()
    with torch.npu.stream(side):
        for step in (event.record, lambda: x.copy_(ones(), non_blocking=True))[:: 1 if too_early else -1]:
            step()
    torch.npu.current_stream().wait_event(event)
    assert x.cpu().tolist() == [float(not too_early)] * 4


def test_a_source_that_changes_before_the_stream_is_waited_for_is_seen_changed():
    source, x = ones(), torch.zeros(4, device="npu")
    x.copy_(source, non_blocking=True)
    launched()
    source.fill_(2.0)
    assert x.cpu().tolist() == [2.0] * 4


@pytest.mark.parametrize("is_pinned", [True, False])
def test_an_asynchronous_copy_from_pageable_memory_is_done_when_it_returns(acl, side, is_pinned):
    x = torch.zeros(4, device="npu")
    source, stream = ones() if is_pinned else torch.ones(4), ctypes.c_void_p(side.npu_stream)
    torch.npu.synchronize()
    to, from_ = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, source))
    assert acl.aclrtMemcpyAsync(to, 16, from_, 16, HOST_TO_DEVICE, stream) == 0
    assert now(x) == [float(not is_pinned)] * 4


def test_asking_does_not_wait_but_comes_to_an_end():
    x, start, end = (
        torch.zeros(4, device="npu"),
        torch.npu.Event(enable_timing=True),
        torch.npu.Event(enable_timing=True),
    )
    torch.npu.synchronize()
    start.record()
    x.copy_(ones(), non_blocking=True)
    end.record()
    launched()
    assert not end.query() and not torch.npu.current_stream().query() and now(x) == [0.0] * 4
    while not end.query():
        pass
    assert now(x) == [1.0] * 4
    assert 0 <= start.elapsed_time(end) < 60e3


def test_a_kernel_runs_when_its_stream_is_waited_for(acl, side):
    seen = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(seen.append)
    assert acl.cann_stand_in_launch(ctypes.c_void_p(side.npu_stream), b"a_kernel", function, ctypes.c_void_p(7)) == 0
    assert seen == []
    side.synchronize()
    assert seen == [7]
    kinds = [line.kind for line in stand_in.log() if line.stream == side.npu_stream]
    assert kinds == ["launch", "sync", "run"] and stand_in.log("run")[0].text == "a_kernel"


# What is counted.


def test_host_synchronisations_are_counted():
    x, source = torch.zeros(4, device="npu"), ones()
    torch.npu.synchronize()
    stand_in.clear_log()
    x.copy_(source, non_blocking=True)
    torch.empty_like(x).copy_(x)
    launched()
    assert stand_in.log("sync") == [] and len(stand_in.log("launch")) >= 2
    for step in (x.cpu, x[0].item, torch.npu.synchronize, lambda: x.copy_(torch.ones(4), non_blocking=True)):
        stand_in.clear_log()
        step()
        launched()
        assert stand_in.log("sync"), step


def test_allocations_are_counted():
    torch.npu.empty_cache()
    stand_in.clear_log()
    for _ in range(2):  # the second one comes from torch_npu's cache
        torch.empty(64 << 20, device="npu", dtype=torch.uint8)
        assert [int(line.text) >= 64 << 20 for line in stand_in.log("malloc")] == [True]


# Memory errors.


def test_copies_out_of_bounds_and_wrong_frees_are_errors(acl, address):
    host = ctypes.create_string_buffer(8192)
    inside, outside = ctypes.c_void_p(address.value + 4000), ctypes.c_void_p(address.value + (1 << 40))
    assert acl.aclrtMemcpy(inside, 96, host, 96, HOST_TO_DEVICE) == 0
    assert stand_in.log("error") == []
    assert acl.aclrtMemcpy(inside, 97, host, 97, HOST_TO_DEVICE) != 0
    assert acl.aclrtMemcpy(outside, 8, host, 8, HOST_TO_DEVICE) != 0
    assert acl.aclrtMemcpy(inside, 8, host, 9, HOST_TO_DEVICE) != 0
    assert acl.aclrtMemset(inside, 97, 0, 97) != 0
    assert acl.aclrtFree(inside) != 0
    assert acl.aclrtFreeHost(address) != 0
    assert len(stand_in.log("error")) == 6


def test_a_task_that_uses_freed_memory_fails_the_next_synchronisation(acl, side):
    address = ctypes.c_void_p()
    assert acl.aclrtMalloc(ctypes.byref(address), 64, 0) == 0
    assert acl.aclrtMemsetAsync(address, 64, 0, 64, ctypes.c_void_p(side.npu_stream)) == 0
    assert acl.aclrtFree(address) == 0
    assert acl.aclrtFree(address) != 0
    with pytest.raises(RuntimeError, match="do not lie in one live allocation"):
        side.synchronize()
    side.synchronize()


# Graphs.


def test_a_graph_runs_at_each_replay_and_not_before():
    x, y, z = (torch.zeros(4, device="npu") for _ in range(3))
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y.copy_(x)
        z.copy_(y)
        stand_in.clear_log()
    for value in (1.0, 2.0):
        x.copy_(torch.full((4,), value))
        assert now(z) == [value - 1] * 4
        graph.replay()
        assert now(z) == [value - 1] * 4
        assert z.cpu().tolist() == [value] * 4


@pytest.mark.parametrize("ordered", [True, False])
def test_streams_of_a_graph_are_ordered_by_their_events(side, ordered):
    x, y, source = torch.zeros(4, device="npu"), torch.zeros(4, device="npu"), ones()
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            x.copy_(source, non_blocking=True)
        if ordered:
            torch.npu.current_stream().wait_stream(side)
        y.copy_(x)
        torch.npu.current_stream().wait_stream(side)
    graph.replay()
    assert y.cpu().tolist() == [float(ordered)] * 4
    assert x.cpu().tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x, side: x.cpu(),
        lambda x, side: torch.npu.synchronize(),
        lambda x, side: torch.npu.current_stream().query(),
        lambda x, side: side.wait_stream(torch.npu.current_stream()),  # and the capture does not wait for it
    ],
    ids=["copy to the host", "synchronise", "query", "unjoined"],
)
def test_what_a_capture_forbids_spoils_it(forbidden, side):
    x = torch.zeros(4, device="npu")
    with pytest.raises(RuntimeError), torch.npu.graph(torch.npu.NPUGraph()):
        forbidden(x, side)
    assert stand_in.log("error")
    torch.npu.set_stream(torch.npu.default_stream())
    assert x.cpu().tolist() == [0.0] * 4


@pytest.mark.parametrize("mode", [GLOBAL, RELAXED])
def test_the_mode_of_a_thread_decides_whether_it_may_copy_during_a_capture(acl, side, address, mode):
    host, stream, model = ctypes.create_string_buffer(8), ctypes.c_void_p(side.npu_stream), ctypes.c_void_p()
    mode_of_thread = ctypes.c_int(mode)
    assert acl.aclmdlRICaptureBegin(stream, GLOBAL) == 0
    assert acl.aclmdlRICaptureThreadExchangeMode(ctypes.byref(mode_of_thread)) == 0
    results = [acl.aclrtMemcpy(address, 8, host, 8, HOST_TO_DEVICE)]
    assert acl.aclmdlRICaptureThreadExchangeMode(ctypes.byref(mode_of_thread)) == 0
    results.append(acl.aclmdlRICaptureEnd(stream, ctypes.byref(model)))
    assert mode_of_thread.value == mode
    assert results == ([0, 0] if mode == RELAXED else [107030, 507903])
    assert (model.value is None) == (mode != RELAXED)


# Several ranks.


def test_ranks_agree_on_the_name_of_a_communicator_and_runs_do_not(tmp_path):
    code = """
import sys, torch, torch_npu, torch.distributed as dist
rank, size = int(sys.argv[1]), int(sys.argv[2])
torch.npu.set_device(rank)
dist.init_process_group("hccl", rank=rank, world_size=size, store=dist.FileStore(sys.argv[3], size))
print(dist.group.WORLD._get_backend(torch.device("npu")).get_hccl_comm_name(rank))
"""
    ranks = [run_python(code, str(rank), "2", str(tmp_path / "two")) for rank in range(2)]
    another_run = run_python(code, "0", "1", str(tmp_path / "one"))
    first, second = map(output_of, ranks)
    assert first == second and first.startswith("127.0.0.1%lo_")
    assert output_of(another_run) != first
