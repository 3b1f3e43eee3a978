"""How emitted files launch: the second time as the first, and by the config that was the fastest."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

GOLDEN = Path(__file__).parent / "goldens" / "softcap_causal.py"
CONFIGS = tuple(dict(BLOCK_M=m, BLOCK_N=32, num_warps=4) for m in (16, 32, 64))


@pytest.fixture
def file():
    spec = importlib.util.spec_from_file_location("launched_golden", GOLDEN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kernel:
    """As Triton's: a launch compiles, and gives what launches by values alone."""

    def __init__(self):
        self.launches: list[tuple] = []

    def __getitem__(self, grid):
        def launch(*args, **config):
            self.launches.append((grid, *args, *(v for n, v in config.items() if n.isupper())))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launches.append((grid[:1], *args))


def test_what_is_compiled_is_given_what_the_first_launch_was(file, monkeypatch):
    monkeypatch.setattr(file, "has_tma", lambda device: False)
    kernel, dense = Kernel(), torch.zeros(2, 16)
    other = torch.zeros(2, 16)
    launch = file.Launch(kernel, CONFIGS[0], 7, lambda a, b: (*a.stride(), 5), boxes={0: (1, 16)})
    for _ in range(3):
        launch(dense, other)
    first, *later = kernel.launches
    assert first == ((7,), dense, other, 16, 1, 5, 16, 32)
    assert later == [((7,), dense.data_ptr(), other.data_ptr(), 16, 1, 5, 16, 32)] * 2


def test_a_tensor_that_is_copied_is_copied_each_time(file, monkeypatch):
    monkeypatch.setattr(file, "has_tma", lambda device: False)
    kernel, copies = Kernel(), []
    monkeypatch.setattr(file, "dense", lambda t: copies.append(t.clone()) or copies[-1])
    launch = file.Launch(kernel, CONFIGS[0], 7, lambda a, b: (), boxes={0: (1, 16)})
    given = [torch.full((2, 17), value, dtype=torch.float16)[:, 1:] for value in (1.0, 2.0)]
    for tensor in given:
        launch(tensor, tensor)
    assert list(map(torch.equal, copies, given)) == [True, True]
    first, second = kernel.launches
    assert first[1] is copies[0] and first[2] is given[0]
    assert second[1:3] == (copies[1].data_ptr(), given[1].data_ptr())


def test_boxes_are_of_the_tensor_at_hand_and_copied_where_rows_are_not_aligned(file, monkeypatch):
    monkeypatch.setattr(file, "has_tma", lambda device: True)
    kernel = Kernel()
    launch = file.Launch(kernel, CONFIGS[0], 7, lambda a: a.stride(), boxes={0: (1, 16)})
    for value in (1.0, 2.0):
        launch(torch.full((2, 17), value, dtype=torch.float16)[:, 1:])
    for (_, box, *numbers), value in zip(kernel.launches, (1.0, 2.0), strict=True):
        assert torch.equal(box.base, torch.full((2, 16), value, dtype=torch.float16))
        assert (tuple(box.shape), box.strides, box.block_shape) == ((2, 16), [16, 1], (1, 16))
        assert numbers == [16, 1, 16, 32]


def test_nothing_is_launched_for_no_programs(file):
    kernel = Kernel()
    file.Launch(kernel, CONFIGS[0], 0)(torch.zeros(0))
    assert not kernel.launches


@pytest.fixture
def gpu(file, monkeypatch, tmp_path):
    """A GPU of 100 multiprocessors, on which the second config is the fastest; what was timed."""
    timed: list[int] = []

    def milliseconds(launch, tensors):
        timed.append(launch.config["BLOCK_M"])
        return {16: 3.0, 32: 1.0, 64: 2.0}[launch.config["BLOCK_M"]]

    properties = SimpleNamespace(multi_processor_count=100, name="one")
    monkeypatch.delenv("FLASHLIGHT_TUNE", raising=False)
    monkeypatch.setattr(file, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(file.triton.knobs.cache, "dir", str(tmp_path))
    return timed


def chosen(file, programs: int = 100, length: int = 1000) -> int:
    ran: list[int] = []

    def launch_by(config):
        launch = SimpleNamespace(config=config, programs=programs)
        return type("Launched", (), vars(launch) | {"__call__": lambda self, *_: ran.append(config["BLOCK_M"])})()

    file.Fastest.chosen.clear()  # as in another process
    file.Fastest(CONFIGS, launch_by, "kernel", length)(SimpleNamespace(device=torch.device("cuda", 0)))
    return ran[-1]


def test_the_fastest_config_is_measured_once_for_lengths_alike(file, gpu, tmp_path):
    assert chosen(file, length=1000) == 32 and len(gpu) == 2 * len(CONFIGS)
    assert chosen(file, length=513) == 32 and len(gpu) == 2 * len(CONFIGS)
    assert chosen(file, length=2000) == 32 and len(gpu) == 4 * len(CONFIGS)
    (told,) = (tmp_path / "flashlight").glob("*.json")
    assert sorted(json.loads(told.read_text()).values()) == [1, 1]


@pytest.mark.parametrize("programs, wanted", [(99, ""), (100, "0")])
def test_the_first_is_taken_where_the_gpu_is_idle_or_nothing_is_to_be_measured(
    file, gpu, monkeypatch, programs, wanted
):
    monkeypatch.setenv("FLASHLIGHT_TUNE", wanted)
    assert chosen(file, programs) == 16 and not gpu


def test_parts_lie_in_one_allocation():
    spec = importlib.util.spec_from_file_location("launched_parts", GOLDEN.with_name("grouped_decode.py"))
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    pieces = file.Pieces(((3, 5), torch.float32), ((2,), torch.int32), ((4, 2), torch.float32))
    kernel = Kernel()
    launch = file.Launch(kernel, CONFIGS[0], 7, lambda *tensors: [s for t in tensors for s in t.stride()])
    for _ in range(2):
        given = pieces(torch.zeros(1, dtype=torch.float16))
        launch(*given)
        at = [t.data_ptr() - given[0].data_ptr() for t in given]
        assert at == [0, 64, 80] and len({t.allocated.data_ptr() for t in given}) == 1
    first, second = (launched[1:4] for launched in kernel.launches)
    assert [(t.shape, t.dtype) for t in first] == [
        ((3, 5), torch.float32),
        ((2,), torch.int32),
        ((4, 2), torch.float32),
    ]
    assert second == tuple(t.data_ptr() for t in given)
    assert kernel.launches[0][4:] == kernel.launches[1][4:] == (5, 1, 1, 2, 1, 16, 32)
