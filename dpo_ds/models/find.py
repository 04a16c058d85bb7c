"""Finding a model by name: one of the twelve from the package, a folder, or the hub.

The shapes of the twelve are in the package (model_shapes.json holds what their config.json files say), so a plan for
them needs no network. For any other causal language model of transformers, its own config is read.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_ds import hub
from dpo_ds.embedded import model_folder
from dpo_ds.errors import UserError, one_line
from dpo_ds.models.model import Model
from dpo_ds.resources import MODEL_SHAPES

if TYPE_CHECKING:  # a command that refuses its options must not wait for this import
    from transformers import PreTrainedConfig

EMBEDDED = "tiny-gpt2"


@dataclass(frozen=True)
class Row:
    """One of the twelve models, as model_shapes.json describes it."""

    parameters: int  # counted on the meta device; tests/unit/models/test_models.py counts again
    config: "PreTrainedConfig"


@functools.cache
def known_models() -> dict[str, Row]:
    """The twelve models by hub id."""
    from transformers import AutoConfig

    rows = json.loads(MODEL_SHAPES.read_text(encoding="utf-8"))
    return {name: Row(row["parameters"], AutoConfig.for_model(**row["config"])) for name, row in rows.items()}


@functools.cache
def known_model(name: str, trust_remote_code: bool = False) -> Model:
    """The model's shape: for the twelve from the package, without a network; for any other from `find_model`."""
    if name in known_models() and not Path(name).exists():
        row = known_models()[name]
        return Model(name, name, row.config, known_parameters=row.parameters)
    return find_model(name, trust_remote_code)


def find_model(name: str, trust_remote_code: bool = False) -> Model:
    """Reads the model's config, from the package, a folder, or the hub.

    Raises UserError if it cannot be read, or if the model is no causal language model.
    """
    from transformers import AutoConfig

    source = name
    if name == EMBEDDED:
        source = str(model_folder())
    elif Path(name).expanduser().exists():
        source = str(Path(name).expanduser())
    if Path(source).is_file():
        raise UserError(f"--model {name} is a file; name the folder that holds it and its config.json")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UserError(f"--model {name} has no config.json: name a Hugging Face model folder")
    if not Path(source).is_dir() and _looks_like_path(name):
        raise UserError(f"--model {name} is not there: check the path")
    if not Path(source).is_dir():
        hub.offline_if_unreachable()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers reads the user's file, so any error is about it
        raise unreadable(name, source, error) from error
    _require_causal(name, config, trust_remote_code)
    _require_sizes(name, config)
    return Model(name, source, config, trust_remote_code)


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def unreadable(name: str, source: str, error: Exception) -> UserError:
    """The UserError for a model whose files cannot be read, from its folder or from the hub."""
    if "trust_remote_code" in str(error):
        return UserError(f"--model {name} comes with Python code of its own: read it, then add --trust_remote_code")
    if Path(source).is_dir():
        return UserError(f"--model {name}: its config.json cannot be used: {one_line(error)}")
    text = str(error).lower()
    if any(word in text for word in ("gated", "401", "403", "private")):
        remedy = "ask for access on its page, then set HF_TOKEN or run `hf auth login`"
        return UserError(f"--model {name} is gated or does not exist on the hub: {remedy}")
    remedy = "check the id and the network, or download the model elsewhere and name its folder; tiny-gpt2 needs none"
    return UserError(f"--model {name} is not a local folder and cannot be read from the hub: {remedy}")


def _require_causal(name: str, config: "PreTrainedConfig", trust_remote_code: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
            return
        raise UserError(f"--model {name} is a {config.model_type} model, not a causal language model; name one that is")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"--model {name} is an encoder-decoder; DPO here needs a decoder-only causal language model")
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # a class, though transformers declares a pair
    saved_as = getattr(config, "architectures", None) or [architecture.__name__]
    if architecture.__name__ not in saved_as:
        raise UserError(
            f"--model {name} was saved as {saved_as[0]}, not as a causal language model ({architecture.__name__}): its "
            "output head would be random; name a checkpoint that has one"
        )


# What a config must count, if it names it at all.
SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"),
    *("max_position_embeddings", "intermediate_size"),
)


def _require_sizes(name: str, config: "PreTrainedConfig") -> None:
    """Raises UserError for a config that describes no model, or a quantised one."""
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"--model {name} is quantised{f' ({kind})' if kind else ''}, and quantised weights cannot be trained: take "
            "the model that it was made of"
        )
    text = config.get_text_config()
    for size in SIZES:
        value = getattr(text, size, None)
        if isinstance(value, int) and value < 1:
            raise UserError(f"--model {name}: its config.json has {size} {value}, which must be above 0: correct it")
