"""What memory.py tells is what the scripts ask for."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.memory import main, peaks


def small():
    return LlavaNextConfig(
        text_config=LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                                num_attention_heads=4, vocab_size=100),
        vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                       num_attention_heads=2, image_size=28, patch_size=14))


@pytest.mark.parametrize("method", ["full", "sparsemm"])
def test_fake_tensors_take_what_real_ones_take(method):
    told, real = (peaks(small(), 600, method, 64, torch.float32, fake) for fake in (True, False))
    assert told == real
    heads = 3 * 4 * (64 if method == "sparsemm" else 600)
    assert told["kept"] == (heads + 3 * 4) * 2 * 16 * 4                   # one token was decoded
    assert told["prefill"] > told["weights"] + told["kept"] - 3 * 4 * 2 * 16 * 4


def test_a_compressed_cache_needs_less_in_prefill_too():
    full, sparse = (peaks(small(), 2000, method, 64) for method in ("full", "sparsemm"))
    assert full["prefill"] - sparse["prefill"] > 0.5 * full["kept"]


def test_bad_arguments_take_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--budget", "31", "--geometry", "small-mha", "--lengths", "100"])
    assert end.value.code == 2 and "budget" in capsys.readouterr().err
