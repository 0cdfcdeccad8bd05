"""A real ComfyUI in CPU mode on a free port, with only this pack, and the few calls a client
makes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def running(base: Path | None = None) -> Iterator[Server]:
    """The ComfyUI at COMFYUI_PATH while the block runs, on a folder that is not there yet."""
    server = Server(Path(os.environ["COMFYUI_PATH"]), base or Path(tempfile.mkdtemp()) / "base")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


class Server:
    """Base folder (input, output, models, custom_nodes) of its own, so nothing is left in the
    checkout."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.base, self.log = base, base / "server.log"
        for name in (
            "input",
            "output",
            "temp",
            "user",
            "custom_nodes",
            "models/loras",
            "models/checkpoints",
        ):
            (base / name).mkdir(parents=True)
        (base / "custom_nodes" / "CNTLoRA").symlink_to(ROOT)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.comfyui = comfyui
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "main.py",
            "--cpu",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
        ]
        command += ["--disable-api-nodes", *os.environ.get("COMFYUI_ARGS", "").split()]
        environment = os.environ | {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            command,
            cwd=self.comfyui,
            env=environment,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
        )

    def restart(self) -> None:
        """Killed without a word, and up again."""
        self.process.kill()
        self.process.wait(20)
        self.start()
        self.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self, seconds: float = 600) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not start:\n{self.text()[-3000:]}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def raw(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else None

    def queue(self, workflow: dict):
        return self.post("/prompt", {"prompt": workflow})

    def run(self, workflow: dict, seconds: float = 240) -> dict:
        """Queue, wait, and return the entry of /history."""
        answer = self.queue(workflow)
        assert "prompt_id" in answer, answer
        return self.result(answer["prompt_id"], seconds)

    def result(self, prompt_id: str, seconds: float = 240) -> dict:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id]["status"]["status_str"] in (
                "success",
                "error",
            ):
                return history[prompt_id]
            time.sleep(0.1)
        raise TimeoutError(self.text()[-3000:])

    def events(self, node: str, kind: str = "CNTLoRATrain") -> list[dict]:
        """What the node's last run reported; empty before the first."""
        return self.get(f"/cntlora/events?node={node}&class={kind}")["events"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.base / "temp", ignore_errors=True)
