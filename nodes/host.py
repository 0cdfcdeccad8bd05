"""The only file that knows ComfyUI: its schema, folders, devices, Cancel and messages to the
page."""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy
import comfy.model_management as management
import comfy.utils
import folder_paths
import torch
from aiohttp import web
from comfy_api.latest import ComfyExtension, io, ui
from server import PromptServer

from ..cntlora_core.defaults import MINI_SD
from ..cntlora_core.devices import DTYPES
from ..cntlora_core.errors import SettingError
from ..cntlora_core.events import Event, Notice, Observer
from ..cntlora_core.model.loader import StableDiffusion
from .paths import inside

__all__ = ["ComfyExtension", "io", "ui"]

EMBEDDED = f"{MINI_SD} (embedded)"
Cancelled = management.InterruptProcessingException


# Search aliases came in 0.11.0; an intermediate output is shown again when the cache answers.
NEWER_FIELDS = ("search_aliases", "has_intermediate_output")


def advanced(kind: Any) -> Callable[..., Any]:
    """`kind.Input`, folded away under Advanced. Hosts before 0.15.0 do not know the argument, but
    their page does the word, which `extra_dict` hands on."""
    if "advanced" in inspect.signature(kind.Input.__init__).parameters:
        return partial(kind.Input, advanced=True)

    def older(*args: Any, **values: Any) -> Any:
        field = kind.Input(*args, **values)
        field.extra_dict = {**field.extra_dict, "advanced": True}
        return field

    return older


def schema(**values: Any) -> Any:
    """`io.Schema`, without the fields that the host does not know yet."""
    known = inspect.signature(io.Schema).parameters
    return io.Schema(**{k: v for k, v in values.items() if k in known or k not in NEWER_FIELDS})


def category() -> str:
    """Beside the host's own Train LoRA, which has moved: `training`, later `model/training`."""
    known = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    return f"{getattr(known.get('TrainLoraNode'), 'CATEGORY', 'training')}/CNTLoRA"


def text_or_number(name: str, **values: Any) -> Any:
    """A text widget into which another node's number may be connected."""
    return io.MultiType.Input(io.String.Input(name, **values), types=[io.Int, io.Float])


# --- folders --------------------------------------------------------------------------------------


def checkpoint_names() -> list[str]:
    files = folder_paths.get_filename_list("checkpoints")
    return [name for name in files if name.endswith(".safetensors")] + [EMBEDDED]


def checkpoint_path(name: str) -> str:
    """The file of a name in that list, `mini-sd` for the embedded model. Raises SettingError for
    any other name."""
    if name == EMBEDDED:
        return MINI_SD
    listed = name in checkpoint_names()
    path = folder_paths.get_full_path("checkpoints", name) if listed else None
    if path is None:
        raise SettingError(
            f"The checkpoint '{name}' is not in models/checkpoints. Put it there and refresh, or "
            "choose another."
        )
    return str(path)


OWN = "the checkpoint's own"


def part_names(folder: str) -> list[str]:
    """Of files in ComfyUI's lists `vae` and `text_encoders`, after the checkpoint's own part."""
    names = folder_paths.get_filename_list(folder)
    return [OWN, *(name for name in names if name.endswith(".safetensors"))]


def part_path(folder: str, name: str) -> str | None:
    """The file of a name in `part_names`; None for the checkpoint's own. Raises SettingError."""
    if name == OWN:
        return None
    path = folder_paths.get_full_path(folder, name) if name in part_names(folder) else None
    if path is None:
        raise SettingError(f"'{name}' is not in models/{folder}. Choose another.")
    return str(path)


def tokenizer_folder() -> Path:
    """CLIP's vocabulary as ComfyUI ships it."""
    return Path(comfy.__path__[0], "sd1_tokenizer")


HOSTS_FOLDERS = ("3d", "clipspace")  # meshes and masks that ComfyUI keeps under input


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def input_subfolders() -> list[str]:
    """Folders directly under ComfyUI's input folder, without those that are ComfyUI's own."""
    return [name for name in subfolders(input_folder()) if name not in HOSTS_FOLDERS]


def dataset_roots() -> list[Path]:
    """Where the host's own dataset nodes keep theirs; none before 0.33."""
    if "datasets" not in getattr(folder_paths, "folder_names_and_paths", {}):
        return []
    return [Path(root) for root in folder_paths.get_folder_paths("datasets")]


def subfolders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    names = (p.name for p in root.iterdir() if p.is_dir())
    return sorted(n for n in names if not n.startswith("."))


def lora_path(name: str) -> Path:
    """`<first loras folder>/<name>.safetensors`. Raises SettingError for a name that leads
    elsewhere."""
    stem = name.removesuffix(".safetensors")
    inside(_loras_folder(), stem)  # an ending alone is no name
    return inside(_loras_folder(), f"{stem}.safetensors")


def lora_name(path: Path) -> str:
    """The name under which Load LoRA lists the file; its whole path where it does not."""
    folder = _loras_folder()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def other_folders() -> list[Path]:
    """Where a LoRA goes that the loras folder does not take: ComfyUI's output, then its temp."""
    roots = (folder_paths.get_output_directory(), folder_paths.get_temp_directory())
    return [Path(root, "cntlora-saved") for root in roots]


def is_temporary(path: Path) -> bool:
    """Whether ComfyUI removes it: it empties its temp folder whenever it starts or ends."""
    return path.is_relative_to(folder_paths.get_temp_directory())


def lora_names() -> list[str]:
    """The LoRA files that Load LoRA lists."""
    files = folder_paths.get_filename_list("loras")
    return [name for name in files if name.endswith(".safetensors")]


def lora_file(name: str) -> Path:
    """The file of a name in that list. Raises SettingError for any other name."""
    path = folder_paths.get_full_path("loras", name) if name in lora_names() else None
    if path is None:
        raise SettingError(f"There is no LoRA '{name}' in models/loras: refresh, and choose one.")
    return Path(path)


def unfinished_folder() -> Path:
    """Where trainings that did not end keep what they need to go on."""
    return Path(folder_paths.get_output_directory(), "cntlora-unfinished")


def _loras_folder() -> Path:
    return Path(folder_paths.get_folder_paths("loras")[0])


# --- which node this is ---------------------------------------------------------------------------

IDENTITY = [io.Hidden.unique_id, io.Hidden.extra_pnginfo]  # what `identity` reads


@dataclass(frozen=True)
class Identity:
    """A node of a workflow. `node` is "7", or "12:5" in a subgraph; `workflow` is empty when no
    page sent the run, `client` is the page that did."""

    workflow: str
    node: str
    client: str = ""

    @property
    def folder(self) -> str:
        """Under ComfyUI's temp folder: the node's runs, their events and samples (the page reads
        them by /view)."""
        name = f"{self.workflow}-{self.node}" if self.workflow else self.node
        return (
            "cntlora/" + re.sub(r"[^A-Za-z0-9-]", "_", name)[:100]
        )  # both parts may be a stranger's

    def source(self, kind: str) -> dict[str, str]:
        """The node, of class `kind`, as the page finds it."""
        return {
            "workflow": self.workflow, "node": self.node, "client": self.client, "class": kind
        }  # fmt: skip

    @property
    def path(self) -> Path:
        return Path(folder_paths.get_temp_directory(), self.folder)


def identity(cls: Any) -> Identity:
    """Of the running node."""
    page = cls.hidden.extra_pnginfo
    workflow = page.get("workflow") if isinstance(page, dict) else None
    server = getattr(PromptServer, "instance", None)
    return Identity(
        str(workflow.get("id") or "") if isinstance(workflow, dict) else "",
        str(cls.hidden.unique_id),
        re.sub(r"[^A-Za-z0-9]", "", str(getattr(server, "client_id", None) or ""))[:40],
    )


# --- devices --------------------------------------------------------------------------------------


def device() -> torch.device:
    return management.get_torch_device()


def dtype(precision: str) -> torch.dtype:
    """Of `auto` and `int8`: fp32 on a CPU; on a GPU bf16 where it is native, else fp16."""
    if precision in DTYPES:
        return DTYPES[precision]
    if management.is_device_cpu(device()):
        return torch.float32
    return torch.bfloat16 if management.should_use_bf16(device()) else torch.float16


@contextmanager
def gradients() -> Iterator[None]:
    """Out of ComfyUI's inference mode: tensors made inside can be trained."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def working(model: StableDiffusion) -> Iterator[None]:
    """The UNet on its device while the block runs, with ComfyUI's own models out of the way."""
    management.unload_all_models()
    try:
        with gradients(), model.at_work():  # weights moved in inference mode cannot be trained
            yield
    finally:
        management.soft_empty_cache()


# --- Cancel, progress, messages -------------------------------------------------------------------


def check_cancel() -> None:
    """Raises Cancelled, ComfyUI's own exception, when the user pressed Cancel."""
    management.throw_exception_if_processing_interrupted()


def progress_bar(node_id: str) -> Callable[[int, int], None]:
    """`(done, total)` shown on the node. Raises on Cancel."""
    bar = comfy.utils.ProgressBar(1, node_id=node_id)

    def show(done: int, total: int) -> None:
        bar.update_absolute(done, total)

    return show


def send(message: dict[str, Any]) -> None:
    """A message to every open page; nobody need listen."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync("cntlora.event", message)


def notices(cls: Any) -> Observer:
    """For a node without a panel: what the user should know goes to the page that began the run,
    which shows it beside the graph, and into the log."""
    source = identity(cls).source(cls.define_schema().node_id)

    def tell(event: Event) -> None:
        if isinstance(event, Notice):
            logging.warning("CNTLoRA: %s", event.text)
            send({"v": 1, **source, "events": [event.to_dict()]})

    return tell


def events_file(folder: Path, run: str | None = None, client: str = "") -> Path | None:
    """The events of the named run in a node's folder, else of the newest that `client` began, else
    of the newest of all; None without any."""
    found = sorted(folder.glob("events_*_*.jsonl"))
    parts = {path: path.stem.split("_", 2)[1:] for path in found}
    if run:
        found = [path for path in found if parts[path][0] == run]
    own = [path for path in found if parts[path][1] == client]
    return max(own or found, default=None)


def add_routes() -> None:
    """GET /cntlora/events?workflow=ID&node=ID&class=NODE[&client=ID][&run=ID]: every event of the
    last run that the page began, or anybody, or of the named one, for a page opened later."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.get("/cntlora/events")
    async def events(request: web.Request) -> web.Response:
        asked = request.query
        folder = Identity(asked.get("workflow", ""), asked.get("node", "")).path
        path = events_file(folder, asked.get("run"), asked.get("client", ""))
        lines = path.read_text(encoding="utf-8").split("\n") if path else []
        found = [
            json.loads(line) for line in lines if line.endswith("}")
        ]  # the last line may be half written
        same = bool(found) and found[0].get("node_class") == asked.get("class")
        return web.json_response({"events": found if same else []})
