"""--bf16 auto is bf16 where that is faster: a GPU says so, a CPU is timed."""

import pytest
import torch

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model import precision
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.precision import Precision

TICK = 2**-10  # seconds, whose sums are exact
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def products(monkeypatch):
    """products(fp32=seconds, bf16=seconds): what one takes, by a played clock; the precisions of
    those that were timed."""
    monkeypatch.setattr(precision, "half_speed", precision.half_speed.__wrapped__)
    timed = []

    def play(**seconds):
        now = 0.0

        def linear(states, weights):
            nonlocal now
            timed.append("bf16" if torch.is_autocast_enabled("cpu") else "fp32")
            now += seconds[timed[-1]]

        monkeypatch.setattr(precision.F, "linear", linear)
        monkeypatch.setattr(precision, "perf_counter", lambda: now)
        return timed

    return play


@pytest.mark.parametrize(
    "seconds, bf16, said",
    [
        pytest.param(
            56 * TICK, False, "fp32 (bf16 products took 56 times fp32's time", id="slower"
        ),
        pytest.param(TICK / 4, True, "bf16 (bf16 products took 0.25 times fp32's", id="faster"),
        pytest.param(TICK, False, "fp32 (bf16 products took 1 times fp32's time", id="as-fast"),
    ],
)
def test_a_cpu_is_timed(seconds, bf16, said, products):
    products(fp32=TICK, bf16=seconds)
    chosen = Precision.of("auto", CPU)
    assert chosen.bf16 is bf16 and str(chosen).startswith(said)


def test_two_emulated_products_are_enough(products):
    """Besides the first, in which libraries set themselves up."""
    timed = products(fp32=0.01, bf16=0.9)
    Precision.of("auto", CPU)
    assert timed.count("bf16") == 1 + 2 and timed.count("fp32") == 1 + precision.REPEATS


def test_a_process_times_once(monkeypatch):
    Precision.of("auto", CPU)
    monkeypatch.setattr(precision.F, "linear", None)  # must not be called
    Precision.of("auto", CPU)


@pytest.mark.parametrize("able", [True, False], ids=["hopper", "turing"])
def test_a_card_that_emulates_bf16_computes_in_fp32(able, monkeypatch):
    def supported(including_emulation=True):
        return able or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert Precision.of("auto", CARD).bf16 is able


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_for_is_not_timed(asked, products):
    timed = products()
    assert Precision.of(asked, CPU) == Precision(asked) and timed == []


def test_an_encoder_is_loaded_in_what_auto_comes_to(tiny_bert_dir, monkeypatch, recwarn):
    monkeypatch.setattr(precision, "half_speed", lambda dtype, device: 0.5)
    assert load_encoder(ModelConfig(str(tiny_bert_dir), pooling="mean"), device=CPU).bf16 is True
    assert not recwarn
    config = EncoderConfig(str(tiny_bert_dir), bf16="auto")
    with pytest.warns(UserWarning, match=r"--bf16 auto: vectors are computed in bf16 \(bf16 prod"):
        assert load_encoder(config, device=CPU).bf16 is True
    assert load_encoder(EncoderConfig(str(tiny_bert_dir)), device=CPU).bf16 is False


def test_what_is_neither_is_refused():
    with pytest.raises(InputError, match="--bf16 must be auto, true or false, got 'yes'"):
        ModelConfig("m", bf16="yes")
