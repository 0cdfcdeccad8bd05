"""Others' trainers on the same card, for gpu.py."""

from __future__ import annotations

import argparse
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import throughput
import torch
from gpu_report import Report


@contextmanager
def watching_the_card(found: list[float]) -> Iterator[None]:
    """The most that all processes held on the card meanwhile, GB, beside what they held before."""
    before, least, stop = torch.cuda.mem_get_info()[0], [], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            least.append(torch.cuda.mem_get_info()[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found.append((before - min(least, default=before)) / 1e9)


def measure_peers(
    args: argparse.Namespace, checkpoint: Path, resolution: int, work: Path, report: Report
) -> None:
    """Others' trainers as whole processes, ours too, in the manner of throughput.py. One that
    fails says so and has no row."""
    cuda = report.device.type == "cuda"
    contestants: dict[str, Any] = {"CNTLoRA": throughput.ours}
    contestants |= {"diffusers' script": throughput.diffusers} if args.script else {}
    contestants |= {"ComfyUI's node": throughput.comfyui} if args.comfyui else {}
    folder = work / "model"
    throughput.write_folder(checkpoint, folder)
    for batch in args.peer_batches:
        data = work / f"peers{batch}"
        data.mkdir()
        throughput.copy_pictures(data / "pictures", batch)
        asked = Namespace(
            script=args.script,
            comfyui=args.comfyui,
            model=checkpoint,
            folder=folder,
            resolution=resolution,
            batch_size=batch,
            gpu=cuda,
        )
        for name, command in contestants.items():
            peak: list[float] = []
            try:
                with watching_the_card(peak):
                    few, many = (
                        throughput.measure(
                            command(asked, n, data), throughput.ROOT, gpu=cuda
                        ).seconds
                        for n in (2, 42)
                    )
            except SystemExit as failed:
                print(f"{name}: {failed}", flush=True)
                continue
            phase = f"sd1 {name}, step of batch {batch}, whole process"
            report.add(phase, (many - few) / 40, None, *peak)
