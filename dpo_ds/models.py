"""Models, known from their config alone: class, tier, parameters, context, before any weight is read.

    python -m dpo_ds.models         the twelve models that this package was made for

Their shapes travel with the package (model_shapes.json: config.json's facts, from the models' pages), so that a plan
needs no network. Any other causal language model of transformers is known by the same rules from its own config.
"""

import functools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dpo_ds import hub, world
from dpo_ds.embedded import model_folder
from dpo_ds.resources import MODEL_SHAPES

EMBEDDED = "tiny-gpt2"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


@dataclass(frozen=True)
class SizeClass:
    """What follows from a model's size, where the user has not said otherwise."""

    name: str
    below: float  # parameters
    tier: str  # the ds_configs file for full fine-tuning
    learning_rate: float


# Learning rates: 5e-7 is Zephyr's for 7 B (arXiv 2310.16944, section 4); smaller models take more, larger ones less.
# The first row is ours, for models that learn from a thousand pairs while one watches (tests/test_embedded.py).
SIZE_CLASSES = (
    SizeClass("toy", 2e7, "zero0_debug", 2e-4),
    SizeClass("debug", 5e8, "zero0_debug", 5e-6),
    SizeClass("small", 5e9, "zero2_small", 1e-6),
    SizeClass("standard", 2e10, "zero3_standard", 5e-7),
    SizeClass("specialised", 4e10, "zero3_offload_specialised", 5e-7),
    SizeClass("large", float("inf"), "zero3_offload_large", 3e-7),
)


def torch_dtype(precision: str):
    """torch's dtype for --precision bf16 or fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _path(module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@dataclass(frozen=True)
class Model:
    """A causal language model that has been found, but not loaded."""

    name: str  # as the user gave it
    source: str  # what from_pretrained takes: a folder, or the hub id
    config: object
    trust_remote_code: bool = False

    @cached_property
    def skeleton(self):
        """The model without weights, on the meta device."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        if self.name in table() and self.config is table()[self.name].config:
            return table()[self.name].parameters
        return sum(p.numel() for p in self.skeleton.parameters())

    @cached_property
    def size_class(self) -> SizeClass:
        return next(c for c in SIZE_CLASSES if self.parameters < c.below)

    @property
    def is_moe(self) -> bool:
        text = self.config.get_text_config()
        return any(getattr(text, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))

    @cached_property
    def moe_blocks(self) -> list[str]:
        """Classes of the modules that hold experts. Under ZeRO-3 they must be gathered whole: ranks whose tokens go to
        different experts would wait for each other for ever."""
        if not self.is_moe:
            return []
        return sorted({_path(module) for module in self.skeleton.modules() if hasattr(module, "experts")})

    @cached_property
    def largest_block(self) -> int:
        """Parameters of the largest block of experts; 0 without any."""
        names = set(self.moe_blocks)
        blocks = (m for m in self.skeleton.modules() if names and _path(m) in names)
        return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)

    @property
    def tier(self) -> str:
        """The ds_configs file of the model's class, for full fine-tuning."""
        return "zero3_offload_moe" if self.is_moe and self.parameters > 5e9 else self.size_class.tier

    @property
    def lora_tier(self) -> str:
        return "zero3_lora_large" if self.tier.startswith("zero3") else self.tier

    @property
    def context(self) -> int | None:
        """Tokens that the model's positions reach; None where the config names no limit."""
        text = self.config.get_text_config()
        # Command-R's config.json has both, the second for what it was trained on in the end.
        limits = [getattr(text, key, None) for key in ("max_position_embeddings", "model_max_length")]
        return max((limit for limit in limits if limit), default=None)

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size


@dataclass(frozen=True)
class Row:
    """A model of the table: what its page on the hub says, without the hub."""

    parameters: int  # counted on the meta device, tests/test_models.py counts again
    config: object


@functools.cache
def table() -> dict[str, Row]:
    """The twelve models by hub id."""
    from transformers import AutoConfig

    rows = json.loads(MODEL_SHAPES.read_text(encoding="utf-8"))
    return {name: Row(row["parameters"], AutoConfig.for_model(**row["config"])) for name, row in rows.items()}


@functools.cache
def known_model(name: str, trust_remote_code: bool = False) -> Model:
    """The model's shape: of the twelve from the package, without a network; of any other as `find_model` reads it."""
    if name in table() and not Path(name).exists():
        return Model(name, name, table()[name].config)
    return find_model(name, trust_remote_code)


def find_model(name: str, trust_remote_code: bool = False) -> Model:
    """Reads the model's config, from the package, a folder, or the hub.

    Raises ValueError if there is none to be had, or it is no causal language model.
    """
    from transformers import AutoConfig

    source = name
    if name == EMBEDDED:
        source = str(model_folder())
    elif Path(name).expanduser().exists():
        source = str(Path(name).expanduser())
    if Path(source).is_file():
        raise ValueError(f"--model {name} is a file; name the folder that holds it and its config.json")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"--model {name} has no config.json: name a Hugging Face model folder")
    if not Path(source).is_dir() and _looks_like_path(name):
        raise ValueError(f"--model {name} is not there: check the path")
    if not Path(source).is_dir():
        hub.offline_if_unreachable()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_found(name, source, error)) from error
    _require_causal(name, config, trust_remote_code)
    return Model(name, source, config, trust_remote_code)


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def _not_found(name: str, source: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if Path(source).is_dir():
        return f"--model {name}: its config.json cannot be used: {text[:300]}"
    if "gated" in text.lower() or "401" in text or "403" in text or "private" in text.lower():
        remedy = "ask for access on its page, then set HF_TOKEN or run `hf auth login`"
        return f"--model {name} is gated or does not exist on the hub: {remedy}"
    remedy = "check the id and the network, or download the model elsewhere and name its folder; tiny-gpt2 needs none"
    return f"--model {name} is no folder here and cannot be read from the hub: {remedy}"


def _require_causal(name: str, config, trust_remote_code: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
            return
        raise ValueError(
            f"--model {name} is a {config.model_type} model, not a causal language model; name one that is"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"--model {name} is an encoder-decoder; DPO here needs a decoder-only causal language model")
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    saved_as = getattr(config, "architectures", None) or [architecture.__name__]
    if architecture.__name__ not in saved_as:
        raise ValueError(
            f"--model {name} was saved as {saved_as[0]}, not as a causal language model ({architecture.__name__}): its "
            "output head would be random; name a checkpoint that has one"
        )


def load_tokenizer(model: Model):
    """The model's tokenizer. Raises ValueError if there is none, or it has no EOS token to end responses with."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.source, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--model {model.name} has no tokenizer that loads; put its files beside it: {text}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--model {model.name}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"--model {model.name}: its tokenizer knows {len(tokenizer)} tokens, but its config's vocab_size is only "
            f"{vocabulary}: resize the embeddings and save the model first"
        )
    return tokenizer


def fetch_weights(model: Model) -> Path:
    """The folder with the weights, downloaded if they are on the hub. Raises ValueError if they are not whole."""
    folder = Path(model.source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            folder = Path(snapshot_download(model.source, allow_patterns=[*WEIGHT_FILES, *OTHER_FILES]))
        except (OSError, HfHubHTTPError) as error:
            raise ValueError(_not_found(model.name, model.source, error)) from error
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):  # reads the header alone
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): copy it again") from None
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises ValueError if there are none, or some that the index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]} that its index names ({len(missing)} missing): copy it again")
    if not files:
        others = sorted(file.name for file in folder.glob("*.bin"))
        instead = f", only {others[0]}" if others else ""
        raise ValueError(
            f"{folder} holds no safetensors weights{instead}; save the model with save_pretrained, which writes them"
        )
    return files


def print_table() -> None:
    """The twelve, as Markdown."""
    print("| model | class | tier | tier with --lora | parameters | context |\n|---|---|---|---|---|---|")
    for name in table():
        model = known_model(name)
        tiers = f"`{model.tier}` | `{model.lora_tier}`"
        print(f"| `{name}` | {model.size_class.name} | {tiers} | {model.parameters:,} | {model.context:,} |")


def main(argv: list[str]) -> None:
    with world.user_errors():
        if argv:
            raise ValueError(f"python -m dpo_ds.models takes no arguments: leave out {argv[0]}")
    print_table()


if __name__ == "__main__":
    world.run_main(main)
