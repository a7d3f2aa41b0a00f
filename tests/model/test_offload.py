"""Offload: the same gradients, memory that is given back in time, and copies in the right order.

On the CPU, where torch has streams and events that do nothing; tests/train/test_cuda.py has a GPU.
"""

from contextlib import contextmanager

import pytest
import torch

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model import offload
from rankpo_fast.model.attention import KERNELS
from rankpo_fast.model.offload import BEHIND, Offload
from rankpo_fast.model.trainable import check_offload
from support.model_families import make_batch, make_encoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAYERS = 6
LEAST = 214 * 32 * 4  # bytes of the states of make_batch


@pytest.fixture
def encoder():
    encoder = make_encoder("llama", num_hidden_layers=LAYERS, attention_dropout=0.1).train()
    encoder.use_kernel(KERNELS[-1])
    return encoder


def gradients(encoder):
    torch.manual_seed(1)
    encoder.zero_grad()
    vectors = encoder(make_batch())
    held = encoder.layers.host_bytes
    vectors.cos().sum().backward()
    return [p.grad for p in encoder.parameters()], held


@pytest.mark.parametrize("way", [True, "selective"])
def test_offloaded_activations_come_back_bit_by_bit(way, encoder, monkeypatch):
    encoder.layers.checkpoint(way)
    expected, _ = gradients(encoder)
    monkeypatch.setattr(offload, "LEAST", LEAST)
    encoder.layers.offload(CPU)
    got, held = gradients(encoder)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert held >= LAYERS * LEAST
    assert encoder.layers.host_bytes == 0  # once the graph is gone
    encoder.layers.offload(None)
    assert gradients(encoder)[1] == 0


class Device:
    """Streams that note what they are given to do, in order; "main" computes."""

    def __init__(self):
        self.log, self.now, self.names = [], "main", iter(("out", "in"))
        device = self

        class Stream:
            def __init__(self, _=None, name=None):
                self.name = name or next(device.names)

            def wait_stream(self, other):
                device.log.append((self.name, "waits for", other.name))

            def wait_event(self, event):
                device.log.append((self.name, "waits for", event.what))

        class Event:
            def record(self, stream):
                self.what = f"{stream.name} {device.copied}"

            def wait(self):
                device.log.append((device.now, "waits for", self.what))

        self.Stream, self.Event = Stream, Event
        self.copied = None

    def current_stream(self, _):
        return self.Stream(name=self.now)

    @contextmanager
    def stream(self, stream):
        self.now = stream.name
        yield
        self.now = "main"


@pytest.fixture
def device(monkeypatch):
    device, copy = Device(), torch.Tensor.copy_
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(offload, "LEAST", 0)

    def copy_(tensor, source, non_blocking):
        assert non_blocking
        device.copied = int(source.flatten()[0])
        device.log.append((device.now, "copies", device.copied))
        return copy(tensor, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    return device


def left(moving, count):
    """Tensors of 0, 1, ... that have left, as a forward pass makes them one after the other."""
    computed = torch.ones(4, requires_grad=True) * 1
    return [moving._pack(computed * 0 + number) for number in range(count)]


def test_a_block_is_given_back_once_the_copy_out_of_it_is_waited_for(device):
    moving = Offload(CPU)
    away = left(moving, 4)
    assert [one.tensor is None for one in away] == [True] * (4 - BEHIND) + [False] * BEHIND
    out = [("out", "waits for", "main"), ("out", "copies", 0),
           ("out", "waits for", "main"), ("out", "copies", 1),
           ("main", "waits for", "out 0"), ("out", "waits for", "main"), ("out", "copies", 2),
           ("main", "waits for", "out 1"), ("out", "waits for", "main"), ("out", "copies", 3),
           ]  # fmt: skip
    assert device.log == out


def test_a_tensor_comes_back_while_that_of_the_layer_above_is_used(device):
    moving = Offload(CPU)
    away = left(moving, 4)
    device.log.clear()
    back = [moving._unpack(one) for one in reversed(away)]
    assert [int(tensor[0]) for tensor in back] == [3, 2, 1, 0]
    assert device.log == [
        ("main", "waits for", "out 3"),  # on the device still, as 2 is
        ("main", "waits for", "out 2"),
        ("in", "waits for", "main"), ("in", "waits for", "out 1"), ("in", "copies", 1),
        ("main", "waits for", "in 1"),
        ("in", "waits for", "main"), ("in", "waits for", "out 0"), ("in", "copies", 0),
        ("main", "waits for", "in 0"),
    ]  # fmt: skip


def test_what_lies_on_the_host_counts_as_pinned_memory_does(device):
    """Which torch takes in powers of two: of 9 MB there are 16 gone."""
    moving = Offload(CPU)
    computed = torch.ones(5, requires_grad=True) * 1
    away = moving._pack(computed)
    assert moving.host_bytes == away.host.nbytes == 20
    moving._device = CUDA
    assert moving.host_bytes == 32


def test_a_graph_that_is_dropped_half_way_leaves_no_copy_running(device):
    moving = Offload(CPU)
    away = left(moving, 4)
    moving._unpack(away[2])  # and 1 is on its way
    device.log.clear()
    del away
    assert device.log == [("main", "waits for", "in 1")]
    assert moving.host_bytes == 0


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.ones(1 << 20, requires_grad=True), id="weight"),
        pytest.param(torch.ones(1 << 20), id="shared by layers"),
        pytest.param(torch.ones(8, requires_grad=True) * 2, id="small"),
    ],
)
def test_what_is_not_worth_it_stays(tensor):
    assert Offload(CPU)._pack(tensor) is tensor


@pytest.mark.parametrize(
    ("device", "flags", "said"),
    [
        pytest.param(CPU, {}, "the device is cpu", id="cpu"),
        pytest.param(CUDA, {"gradient_checkpointing": False}, "checkpointing true", id="none"),
    ],
)
def test_offload_is_refused_where_nothing_can_be_moved(device, flags, said):
    config = ModelConfig("m", **flags)
    check_offload([], config, device)
    with pytest.raises(InputError, match=f"--offload activations: .*{said}"):
        check_offload(["activations"], config, device)
