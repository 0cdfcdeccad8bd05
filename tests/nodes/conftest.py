"""The pack loaded beside small stand-ins for ComfyUI, written by hand: only what nodes/host.py asks
for."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


class Field:
    def __init__(self, id=None, *, advanced=False, **options):
        self.id, self.advanced, self.options = id, advanced, options


def kind(name):
    return type(
        name,
        (),
        {
            "Input": type("Input", (Field,), {"io_type": name}),
            "Output": type("Output", (Field,), {}),
        },
    )


class NodeOutput:
    def __init__(self, *values, ui=None):
        self.values, self.ui = values, ui


def stand_ins(base):
    """The modules by name, with their folders under `base`."""
    kinds = {
        k: kind(k.upper())
        for k in (
            "Combo",
            "String",
            "Int",
            "Float",
            "Boolean",
            "Image",
            "Mask",
            "Model",
            "Clip",
            "Vae",
            "LoraModel",
            "LossMap",
        )
    }
    kinds["MultiType"] = SimpleNamespace(Input=lambda field, types: field)
    io = SimpleNamespace(
        **kinds,
        Custom=kind,
        Schema=lambda **values: SimpleNamespace(
            **({"is_output_node": False, "hidden": []} | values)
        ),
        ComfyNode=object,
        NodeOutput=NodeOutput,
        Hidden=SimpleNamespace(unique_id="UNIQUE_ID", extra_pnginfo="EXTRA_PNGINFO"),
    )
    preview = SimpleNamespace(as_dict=lambda: {"images": []})
    ui = SimpleNamespace(PreviewImage=lambda *a, **k: preview)
    modules = {
        "comfy": {"__path__": [str(base / "comfy")]},
        "comfy.utils": {
            "ProgressBar": lambda *a, **k: SimpleNamespace(update_absolute=lambda *a: None)
        },
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"),
            "is_device_cpu": lambda device: True,
            "should_use_bf16": lambda device: False,
            "unload_all_models": lambda: None,
            "soft_empty_cache": lambda: None,
            "InterruptProcessingException": type("InterruptProcessingException", (Exception,), {}),
            "throw_exception_if_processing_interrupted": lambda: None,
            "OOM_EXCEPTION": torch.OutOfMemoryError,
        },
        **{f"comfy.{name}": {} for name in ("lora", "model_patcher", "model_sampling")},
        "folder_paths": {
            "get_filename_list": lambda name: ["sd15.safetensors", "old.ckpt"],
            "get_full_path": lambda name, file: str(base / name / file),
            "get_folder_paths": lambda name: [str(base / name)],
            "get_input_directory": lambda: str(base / "input"),
            "get_output_directory": lambda: str(base / "output"),
            "get_temp_directory": lambda: str(base / "temp"),
        },
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": object, "io": io, "ui": ui},
        "server": {"PromptServer": SimpleNamespace(instance=None)},
        "aiohttp": {"web": SimpleNamespace(Request=object, Response=object)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        yield name, module


def run(node, **inputs):
    """Execute the node as ComfyUI does."""
    node.hidden = SimpleNamespace(unique_id="12:5", extra_pnginfo=None)
    with torch.inference_mode():
        return node.execute(**inputs)


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """CNTLoRA's `nodes` package, with `base`, the folder that plays ComfyUI's, and `run`."""
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("input", "loras", "checkpoints"):
        (base / folder).mkdir()
    added = dict(stand_ins(base))
    before = {name: sys.modules.get(name) for name in added}
    sys.modules.update(added)
    for name, module in added.items():  # `import comfy.utils` reads the attribute
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(added[parent], child, module)
    spec = importlib.util.spec_from_file_location(
        "cntlora_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["cntlora_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["cntlora_pack"])
    nodes = importlib.import_module("cntlora_pack.nodes")
    nodes.base, nodes.run = base, run
    yield nodes
    for name in [n for n in sys.modules if n.split(".")[0] == "cntlora_pack"]:
        del sys.modules[name]
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


@pytest.fixture(scope="module")
def model(pack):
    return run(pack.LoadCheckpoint, checkpoint="mini-sd (embedded)", precision="auto").values[0]


@pytest.fixture
def folder(pack, request):
    path = pack.base / "input" / request.node.name.split("[")[0]
    path.mkdir()
    Image.new("RGB", (64, 64), "orange").save(path / "a.png")
    return path
