"""Liger's kernels go where they can, and where they are asked for or nothing is loaded."""

import pytest
import torch

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.liger import use_liger
from rankpo_fast.model.load import load_encoder
from support import fake_packages
from support.model_families import make_encoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def calls(monkeypatch):
    return fake_packages.liger(monkeypatch, "llama")


@pytest.mark.parametrize("asked", [None, True])
def test_the_instance_is_patched_without_the_losses_of_a_language_model(calls, asked):
    backbone = make_encoder("llama").backbone
    use_liger(backbone, asked, CUDA)
    off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert calls == [{"model": backbone, **off}]


@pytest.mark.parametrize(
    ("family", "device", "version", "reason"),
    [
        pytest.param("llama", CPU, "0.8.5", "need a GPU", id="cpu"),
        pytest.param("bert", CUDA, "0.8.5", "none for bert", id="family"),
        pytest.param("llama", CUDA, "0.8.1", "older than 0.8.2", id="version"),
    ],
)
def test_where_it_cannot_be_asking_is_an_error(calls, monkeypatch, family, device, version, reason):
    fake_packages.say_version(monkeypatch, "liger-kernel", version)
    backbone = make_encoder(family).backbone
    use_liger(backbone, None, device)
    with pytest.raises(InputError, match=f"--use_liger_kernel true: .*{reason}.* false"):
        use_liger(backbone, True, device)
    assert calls == []


def test_it_can_be_declined(calls):
    use_liger(make_encoder("llama").backbone, False, CUDA)
    assert calls == []


def test_asking_for_it_without_a_gpu_is_an_error_of_loading(tiny_llama_dir):
    config = ModelConfig(str(tiny_llama_dir), use_liger_kernel=True)
    with pytest.raises(InputError, match="--use_liger_kernel false"):
        load_encoder(config, device=CPU)
