"""Starts docker-compose.yml service for service, as plain processes: its commands, its environment, its order.

Only what a container would give is put in its place: host names become loopback, ports become free ones, volumes become
folders. PostgreSQL comes from a wheel and is started by the session; its service is the only one that is not run.
"""

import contextlib
import os
import secrets as random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from client.sdk import Client
from duquant.artifact import verify

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.timeout(600)]

_MARK = "DUQUANT_TEST_RUN"


def _free_port() -> int:
    """A free port whose neighbour 10000 above, SeaweedFS's gRPC port, is free too."""
    while True:
        port = 20000 + random.randbelow(10000)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10000))
            return port


@dataclass
class Stack:
    """The services of the compose file as processes."""

    services: dict[str, dict[str, Any]]
    places: dict[str, str]
    """What a container would have, and what stands for it here, longest first."""
    folder: Path
    mark: str = field(default_factory=lambda: random.token_hex(8))
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def here(self, text: str) -> str:
        for there, here in self.places.items():
            text = text.replace(there, here)
        return text

    def environment(self, name: str) -> dict[str, str]:
        given = {key: self.here(str(value)) for key, value in self.services[name].get("environment", {}).items()}
        scripts = sysconfig.get_path("scripts")
        outside = {
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "RAY_TMPDIR": str(self.folder / "r"),
            "OMP_NUM_THREADS": "1",
            _MARK: self.mark,
        }
        return {**outside, **given, "HOME": str(self.folder)}

    def command(self, name: str) -> list[str]:
        words = [self.here(word) for word in self.services[name]["command"]]
        return [sys.executable, *words[1:]] if words[0] == "python" else words

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self.command(name), env=self.environment(name), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        if self.services[name]["command"][0] == "ray":
            # Nodes that start at the same moment under one address, as no two containers do, take each other's files.
            self._wait_until_said(name, "Ray runtime started.")

    def _wait_until_said(self, name: str, text: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while text not in (self.folder / f"{name}.log").read_text(errors="replace"):
            assert self.processes[name].poll() is None, f"{name} ended:\n{self.log(name)}"
            assert time.monotonic() < deadline, f"{name} did not start:\n{self.log(name)}"
            time.sleep(0.2)

    def wait_until_healthy(self, name: str, seconds: float = 90) -> None:
        """Run the service's own health check until it passes."""
        kind, *check = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        check = [self.here(word) for word in check]
        deadline = time.monotonic() + seconds
        while not self._passes(check, name):
            assert self.processes[name].poll() is None, f"{name} ended:\n{self.log(name)}"
            assert time.monotonic() < deadline, f"{name} is not healthy:\n{self.log(name)}"
            time.sleep(0.5)

    def _passes(self, check: list[str], name: str) -> bool:
        try:
            done = subprocess.run(check, env=self.environment(name), capture_output=True, check=False, timeout=20)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def wait_for(self, name: str, condition: str) -> None:
        """Wait until a service is as far as one that depends on it wants."""
        if condition == "service_completed_successfully":
            assert self.processes[name].wait(60) == 0, f"{name} failed:\n{self.log(name)}"
        elif condition == "service_healthy":
            self.wait_until_healthy(name)

    def start_all(self) -> None:
        """Start every service as soon as what it depends on allows, as Compose does."""
        met: set[tuple[str, str]] = set()
        while len(self.processes) < len(self.services):
            for name, service in self.services.items():
                wanted = {(other, how["condition"]) for other, how in service.get("depends_on", {}).items()}
                if name not in self.processes and wanted <= met:
                    self.start(name)
            later = [s.get("depends_on", {}) for name, s in self.services.items() if name not in self.processes]
            conditions = {(other, how["condition"]) for wanted in later for other, how in wanted.items()}
            for other, condition in sorted(conditions - met):
                if other in self.processes:
                    self.wait_for(other, condition)
                    met.add((other, condition))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def alive(self) -> list[psutil.Process]:
        """Every process of this run: ours, and what Ray started in the background."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self.mark:
                    found.append(process)
        return found

    def stop(self) -> None:
        for name in reversed(list(self.processes)):
            self.processes[name].terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        left = self.alive()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in self.processes.values():
            process.wait()
        psutil.wait_procs(left, timeout=10)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model root with a tiny random Llama and a byte-level tokenizer."""
    folder = tmp_path / "models" / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder.parent


@pytest.fixture
def stack(compose_file, secrets, postgres_url: str, model_folder: Path) -> Iterator[Stack]:
    s3, ray, api = _free_port(), _free_port(), _free_port()
    variables = {**secrets, "DUQUANT_S3_PUBLIC_ENDPOINT": f"http://127.0.0.1:{s3}", "DUQUANT_THREADS_PER_SLOT": "1"}
    services = compose_file.services(variables)
    # Short: Ray and SeaweedFS put sockets below it.
    folder = Path(tempfile.mkdtemp(prefix="dqc-"))
    for name in ("objects", "home", "texts", "r"):
        (folder / name).mkdir()
    database = services["api"]["environment"]["DUQUANT_DATABASE_URL"]
    places = {
        database: postgres_url,
        "-dir=/data": f"-dir={folder / 'objects'}",
        "-s3.ip.bind=0.0.0.0": "-s3.ip.bind=127.0.0.1",
        "-master.port=9333": f"-master.port={_free_port()}",
        "-volume.port=8080": f"-volume.port={_free_port()}",
        "-filer.port=8888": f"-filer.port={_free_port()}",
        "-s3.port=8333": f"-s3.port={s3}",
        "storage:8333": f"127.0.0.1:{s3}",
        "127.0.0.1:8333": f"127.0.0.1:{s3}",
        "ray-head:6380": f"127.0.0.1:{ray}",
        "127.0.0.1:6380": f"127.0.0.1:{ray}",
        "--port=6380": f"--port={ray}",
        "api:8000": f"127.0.0.1:{api}",
        "127.0.0.1:8000": f"127.0.0.1:{api}",
        "/var/lib/duquant": str(folder / "home"),
        "/models": str(model_folder),
        "/texts": str(folder / "texts"),
        "python -m workers": f"{sys.executable} -m workers",
    }
    services["api"]["environment"] |= {"DUQUANT_HOST": "127.0.0.1", "DUQUANT_PORT": str(api)}
    running = Stack({k: v for k, v in services.items() if k != "postgres"}, places, folder)
    for service in running.services.values():
        service.get("depends_on", {}).pop("postgres", None)
    try:
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_the_services_of_the_compose_file_quantize_a_model(stack: Stack, secrets, tmp_path: Path):
    stack.start_all()
    stack.wait_until_healthy("api")
    stack.wait_until_healthy("dispatcher")

    url = f"http://127.0.0.1:{stack.services['api']['environment']['DUQUANT_PORT']}"
    with Client(url, secrets["DUQUANT_API_KEY"]) as client:
        calibration = {"samples": 2, "seq_len": 48, "shards": 1, "search_tokens": 32}
        job = client.submit("local:tiny", "duquant-fast", calibration=calibration)
        job = client.wait(job.id, timeout_s=120)
        assert job.state == "succeeded", f"{job.reason}: {job.detail}\n{stack.log('dispatcher')}"
        pulled = client.pull(job.id, tmp_path / "artifact")
        assert [layer["state"] for layer in client.layers(job.id)] == ["done"] * 3  # two and the embeddings

    report = verify(pulled.out)
    assert report.ok, report.problems
    assert any("_LayerActor" in " ".join(process.cmdline()) for process in stack.alive())

    stack.processes["dispatcher"].terminate()
    assert stack.processes["dispatcher"].wait(30) == 0, stack.log("dispatcher")
    stack.processes["api"].terminate()
    # uvicorn stops in good order and then gives itself the signal again, for whoever waits for it.
    assert stack.processes["api"].wait(15) in (0, -signal.SIGTERM), stack.log("api")
    assert "Application shutdown complete" in stack.log("api")
    stack.stop()
    assert stack.alive() == []
    assert list((stack.folder / "home" / "work").glob("job_*")) == [], "a finished job's scratch files are removed"
