"""Finding a model and knowing it from its config alone: class, parameters, context, before any weight is read."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dpo_ds import hub
from dpo_ds.embedded import model_folder

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


@dataclass(frozen=True)
class Model:
    """A causal language model that has been found, but not loaded."""

    name: str  # as the user gave it
    source: str  # what from_pretrained takes: a folder, or the hub id
    config: object
    trust_remote_code: bool

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
        return sum(p.numel() for p in self.skeleton.parameters())

    @cached_property
    def size_class(self) -> SizeClass:
        return next(c for c in SIZE_CLASSES if self.parameters < c.below)

    @property
    def is_moe(self) -> bool:
        text = self.config.get_text_config()
        return any(getattr(text, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))

    @property
    def tier(self) -> str:
        return "zero3_offload_moe" if self.is_moe and self.parameters > 5e9 else self.size_class.tier

    @property
    def context(self) -> int | None:
        """Tokens that the model's positions reach; None where the config names no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size


def find_model(name: str, trust_remote_code: bool = False) -> Model:
    """Reads the model's config, from the package, a folder, or the hub.

    Raises ValueError if there is none to be had, or it is no causal language model that packed pairs can score.
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
    _require_packable(name, config, trust_remote_code)
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


def _require_packable(name: str, config, trust_remote_code: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
            return  # its attention says so by itself if it cannot be packed
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
    if not architecture._supports_attention_backend:
        raise ValueError(
            f"--model {name}: {architecture.__name__} does not call transformers' attention interface, so packed pairs "
            "cannot be scored with it; choose a model that does (GPT-2, Llama, Mistral, Gemma, Qwen2, Phi-3, …)"
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
