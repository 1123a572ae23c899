"""A run's model as files that outlive it: safetensors, JSON, and an MLflow model that holds no pickle.

DIR/model.safetensors   every weight, under the names of the modules
DIR/config.json         what rebuilds the model around them: structure, resolved configuration, inputs, class names
DIR/plugins/            the plugin files that the model needs, where there are any
DIR/mlflow_model/       the same as an MLflow model, for `mlflow models serve`
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cmoe import inputs
from cmoe.errors import UserError
from cmoe.plugins import Catalogue
from cmoe.restored import Restored, assemble, unchecked

FORMAT, VERSION = "cmoe", 1
WEIGHTS, CONFIG, PLUGINS, MLFLOW = "model.safetensors", "config.json", "plugins", "mlflow_model"


def export(restored: Restored, target: Path, plugins: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Write a model to a folder; an earlier export there is replaced, whole or not at all.

    Args:
        restored: the model.
        target: the folder; not there, empty, or an earlier export.
        plugins: further folders with plugins.

    Returns:
        `folder`, `weights`, `config` and `mlflow_model` (paths), `parameters`, `bytes`, and `notes`.

    Raises:
        UserError: the folder holds something else.
    """
    target = Path(target)
    if target.exists() and not _replaceable(target):
        raise UserError(f"{target}: expected a new folder or an earlier export, it holds something else")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    staging.chmod(0o755)
    try:
        notes = write(restored, staging / "export", plugins)
        served = load(staging / "export")  # what the files say, not what memory holds
        from cmoe.packaging import save_mlflow

        save_mlflow(served, staging / "export", staging / MLFLOW)
        (staging / MLFLOW).replace(staging / "export" / MLFLOW)
        if target.exists():
            target.replace(staging / "before")
        (staging / "export").replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "run": restored.run_id,
        "folder": str(target),
        "weights": str(target / WEIGHTS),
        "config": str(target / CONFIG),
        "mlflow_model": str(target / MLFLOW),
        "parameters": sum(p.numel() for p in restored.model.parameters()),
        "bytes": (target / WEIGHTS).stat().st_size,
        "notes": notes,
    }


def write(restored: Restored, folder: Path, plugins: Sequence[str | Path] = ()) -> list[str]:
    """Weights, `config.json` and plugin files in a new folder; returns what a user should know."""
    from safetensors.torch import save_file

    from cmoe.tracking.files import write_json

    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    own = [pack(s, f"strategies.{i}", tensors) for i, s in enumerate(restored.state["strategies"])]
    structure = pack(restored.state["structure"], "structure", tensors)
    tensors |= {f"model.{n}": w.detach().cpu().contiguous().clone() for n, w in restored.model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / WEIGHTS).chmod((folder.stat().st_mode & 0o666) | 0o600)  # safetensors lets nobody else read
    described = inputs.describe(restored.stream)
    if described["transform"] is None:
        # the transform is a plugin's own code around its data: the export begins behind it
        described |= {"raw_shape": described["input_shape"], "transform": {"name": "chain", "transforms": []}}
        described["raw_dtype"] = "int32" if restored.stream.vocabulary is not None else "float32"
    content = {
        "format": FORMAT,
        "version": VERSION,
        "run": restored.run_id,
        "config": restored.plan.to_dict(),
        "class_names": list(restored.class_names),
        "inputs": described,
        "structure": structure,
        "seen": restored.state["seen"],
        "learned": restored.state["learned"],
        "strategies": own,
    }
    write_json(folder / CONFIG, content)
    _copy_plugins(restored, folder / PLUGINS, plugins)
    if inputs.transform_spec(restored.stream.transform) is None:
        return [f"the task {restored.stream.name} has a transform of its own: the export takes inputs that went through it"]  # fmt: skip
    return []


def load(folder: Path) -> Restored:
    """The model of an export; its logits are those of the run, bit for bit.

    Raises:
        UserError: no export, a damaged one, or one of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        content = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: expected an export of cmoe, {CONFIG} or {WEIGHTS} cannot be read") from error
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(f"{folder}: expected an export of version {VERSION}, got {content.get('version')}")
    catalogue = Catalogue([folder / PLUGINS] if (folder / PLUGINS).is_dir() else [])
    weights = {n.removeprefix("model."): w for n, w in tensors.items() if n.startswith("model.")}
    state = {
        "structure": unpack(content["structure"], tensors),
        "model": weights,
        "seen": content["seen"],
        "learned": content["learned"],
        "strategies": [unpack(s, tensors) for s in content["strategies"]],
    }
    stream = inputs.rebuild(content["inputs"])
    return assemble(content["run"], unchecked(content["config"]), catalogue, stream, state)


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Plain containers for JSON; tensors go to `tensors` under `name`, and only their names stay."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"$tensor": name}
    if isinstance(value, dict):
        items = [(k, pack(v, f"{name}.{k}", tensors)) for k, v in value.items()]
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return dict(items)
        return {"$items": [[pack(k, "", tensors), v] for k, v in items]}
    if isinstance(value, (list, tuple, set)):
        packed = [pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {"$set" if isinstance(value, set) else "$tuple": packed}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise UserError(f"{name}: expected tensors and plain containers in an exported state, got {type(value).__name__}")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(unpack(v, tensors) for v in value["$tuple"])
    if "$set" in value:
        return {unpack(v, tensors) for v in value["$set"]}
    if "$items" in value:
        return {unpack(k, tensors): unpack(v, tensors) for k, v in value["$items"]}
    return {k: unpack(v, tensors) for k, v in value.items()}


def _copy_plugins(restored: Restored, folder: Path, plugins: Sequence[str | Path]) -> None:
    """The files of the plugins that make the model up; the task's is not needed any more."""
    plan = restored.plan
    here = [p for p in plan.plugins if Path(p).expanduser().is_dir()]
    catalogue = Catalogue([*here, *plugins])
    moe = plan.model.get("moe") or {}
    used = [("backbone", plan.model["name"]), *(("strategy", s["name"]) for s in plan.strategy)]
    used += [(k, moe[k]["name"]) for k in ("router", "expert") if moe.get(k)]
    used += [("router", s["router"]["name"]) for s in plan.strategy if isinstance(s.get("router"), dict)]
    for kind, name in used:
        entry = catalogue.find(kind, name)
        if entry.folder is not None:
            folder.mkdir(exist_ok=True)
            for path in (entry.path, *entry.folder.glob("_*.py")):  # with the helpers that it may import
                shutil.copy(path, folder / path.name)


def _replaceable(target: Path) -> bool:
    if not target.is_dir():
        return False
    if not any(target.iterdir()):
        return True
    try:
        return json.loads((target / CONFIG).read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False
