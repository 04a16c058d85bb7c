"""LoRA adapters that others made with peft: finding one, checking that it is of this model, loading its weights."""

import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dpo_ds import hub
from dpo_ds.errors import UserError, files_of, one_line
from dpo_ds.files import remembered_sha256
from dpo_ds.models.find import known_model
from dpo_ds.models.model import Model
from dpo_ds.models.values import require_finite

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys of a config whose every value is supported, or has nothing to do with what the adapter computes. Any other key
# must have the value that switches it off.
SUPPORTED = frozenset(
    {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "base_model_name_or_path", "revision"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}  # its tensors' names say it all
    | {
        "auto_mapping",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "peft_version",
        "bias",
        "runtime_config",
    }
    | {"megatron_core", "qalora_group_size"}  # without effect beside megatron_config and use_qalora
)
# Ways to begin that change the base weights too: the adapter alone is not what was trained.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits its model."""

    folder: Path
    r: int
    alpha: float  # its scale is alpha / r
    targets: str  # as --lora_targets takes them
    numbers: int  # parameters

    def hashes(self, cache: Path) -> dict[str, str]:
        """The sha256 of its files, by name. Raises UserError if a weight is not finite."""
        with files_of("--cache_dir", cache):
            require_finite(self.folder / WEIGHTS, cache / "hashes")
            return {f"adapter/{name}": remembered_sha256(self.folder / name, cache / "hashes") for name in FILES}


FILES = (CONFIG, WEIGHTS)


@functools.cache
def find_adapter(option: str, name: str, model: str, trust_remote_code: bool) -> Adapter:
    """The adapter that `option` names, downloaded if it is on the hub. `model` is its base.

    Raises UserError if it cannot be used on that model.
    """
    given = f"{option} {name}"
    folder = _fetch(given, name)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{given} is damaged ({one_line(error)}): copy it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{given}: its {CONFIG} is no JSON object: copy it again")
    base = known_model(model, trust_remote_code)
    _require_lora(given, config)
    _require_base(given, config.get("base_model_name_or_path"), base)
    r = config["r"]
    targets = _targets(given, shapes, r, base)
    scale = config["lora_alpha"] * (math.sqrt(r) if config.get("use_rslora") else 1.0)
    return Adapter(folder, r, float(scale), targets, sum(map(math.prod, shapes.values())))


def _fetch(given: str, name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        if not (folder / CONFIG).is_file():
            raise UserError(f"{given} has no {CONFIG}: name the folder of a peft adapter, or its hub id")
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{given} has no {WEIGHTS}: save it with peft's save_pretrained, which writes that")
        return folder
    from huggingface_hub import snapshot_download

    hub.offline_if_unreachable()
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # its type depends on the HTTP library of the hub's client
        raise UserError(
            f"{given} is not a local folder and cannot be read from the hub: check the id and the network"
        ) from error
    if not all((folder / file).is_file() for file in FILES):
        raise UserError(f"{given} is no peft adapter with safetensors weights: it must hold {CONFIG} and {WEIGHTS}")
    return folder


def _require_lora(given: str, config: dict[str, Any]) -> None:
    """Raises UserError for an adapter of a kind that is not trained exactly here."""
    from peft import LoraConfig

    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{given} is a {kind} adapter; only LoRA is supported: merge it into the model first")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(r, int) and r > 0 and isinstance(alpha, (int, float)) and alpha > 0):
        raise UserError(f"{given}: its {CONFIG} has r {r} and lora_alpha {alpha}, which must be above 0: copy it again")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(CHANGES_THE_BASE):
        raise UserError(f"{given} began with {init}, which changes the base weights too: convert or merge it first")
    usual = LoraConfig().to_dict()
    for key, value in config.items():
        if key == "bias" and value != "none":
            raise UserError(f"{given} trains biases (bias is {value}), which is not supported: merge it first")
        if key not in SUPPORTED and value and value != usual.get(key):
            raise UserError(f"{given} has {key}, which is not supported: merge it into the model first")


def _require_base(given: str, base: str | None, model: Model) -> None:
    """Raises UserError if the adapter names another base. The folder that it names may have moved: names count."""
    if not base:
        return
    if Path(base).exists() and Path(model.source).exists() and Path(base).samefile(model.source):
        return
    if _last(base) not in {_last(model.name), _last(model.source)}:
        raise UserError(
            f"{given} is an adapter of {base}, not of {model.name}: take its base as the model, or correct "
            f"base_model_name_or_path in its {CONFIG} if only the name differs"
        )


def _last(name: str) -> str:
    """A model's name without its owner or folder. The hub's cache has it in the folder's name."""
    cached = re.search(r"models--[^/]+?--([^/]+)/snapshots/", name)
    return (cached.group(1) if cached else Path(name).name).lower()


def _targets(given: str, shapes: dict[str, tuple], r: int, model: Model) -> str:
    """The adapted modules, as --lora_targets takes them. Raises UserError if the tensors are not those of such an
    adapter on this model."""
    linear = {
        name: (module.weight.shape, type(module).__name__ == "Conv1D")
        for name, module in model.skeleton.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    found: dict[str, set[str]] = {}
    for key, shape in shapes.items():
        parts = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not parts or parts[1] not in linear:
            raise UserError(
                f"{given} has the tensor {key}, for which {model.name} has no linear module: it is of another base"
            )
        (rows, columns), transposed = linear[parts[1]]
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        wanted = (r, in_features) if parts[2] == "A" else (out_features, r)
        if shape != wanted:
            raise UserError(
                f"{given}: {key} has the shape {list(shape)}, but {model.name} needs {list(wanted)}: it is of another "
                "base"
            )
        found.setdefault(parts[1], set()).add(parts[2])
    if not found or any(len(sides) < 2 for sides in found.values()):
        raise UserError(f"{given} lacks tensors: a lora_A and a lora_B of each module are needed; copy it again")
    ends = {name.rpartition(".")[2] for name in found}
    complete = {end for end in ends if all(name in found for name in linear if name.rpartition(".")[2] == end)}
    return ",".join(sorted(complete | {name for name in found if name.rpartition(".")[2] not in complete}))


def load_adapter(model: "PeftModel", folder: Path) -> None:
    """Gives a model's adapters the weights of a peft folder. find_adapter has checked their names and shapes."""
    own = dict(model.named_parameters())
    stored = load_file(folder / WEIGHTS)
    assert len(stored) == sum(".lora_" in name for name in own)
    for name, tensor in stored.items():
        own[name.removesuffix(".weight") + ".default.weight"].data.copy_(tensor)
