"""A quantization that is killed for good, as a process."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

MAKE_AND_QUANTIZE = """
import sys, time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from duquant.config import CalibrationConfig, Recipe, TextSource, TransformConfig
from duquant.pipeline import quantize_model

root, slow = Path(sys.argv[1]), sys.argv[2] == "slow"
model = root / "model"
if not model.exists():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(model)
    words = Tokenizer(WordLevel({str(n): n for n in range(64)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1").save_pretrained(model)

def progress(step):
    print(step.phase, step.message, flush=True)
    if slow:
        time.sleep(0.3)

recipe = Recipe(
    transform=TransformConfig(rotation="hadamard", permutation="zigzag", block_size=16),
    calibration=CalibrationConfig(source=TextSource(kind="random"), samples=2, seq_len=16, shards=2, search_tokens=16),
)
quantize_model(str(model), root / "out", recipe, device="cpu", threads=1, on_progress=progress)
"""


def start(root: Path, speed: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", MAKE_AND_QUANTIZE, str(root), speed], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("phase", ["sweep layer 1", "quantize layer 2"])
def test_killed_run_leaves_no_artifact_and_the_next_one_succeeds(tmp_path: Path, phase: str) -> None:
    process = start(tmp_path, "slow")
    assert process.stdout is not None
    deadline = time.monotonic() + 120
    for line in process.stdout:
        if phase in line:
            process.send_signal(signal.SIGKILL)
            break
        assert time.monotonic() < deadline
    process.stdout.close()
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()

    again = start(tmp_path, "fast")
    again.communicate(timeout=200)
    assert again.returncode == 0
    assert (tmp_path / "out" / "manifest.json").exists()
