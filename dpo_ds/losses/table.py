"""The table of losses: for each its paper, what it needs, its options, and what beta means in it.

`--loss sigmoid,sft --loss_weights 1,0.1` sums two. The formulas are in formulas.py, under the same names. This file
imports no torch, so that a wrong option is refused at once.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dpo_ds.config import FIELDS, Options
from dpo_ds.errors import UserError, one_line


@dataclass(frozen=True)
class Settings:
    """The options of one loss, with the defaults that most losses have. Each is an option of a run by the same name."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    f_alpha: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 1.0
    orpo_lambda: float = 0.1
    cpo_alpha: float = 1.0
    dpop_lambda: float = 50.0
    length_alpha: float = 0.01
    beta_alpha: float = 0.6
    beta_momentum: float = 0.9
    offset_alpha: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """A row of the table.

    scope: whose values the loss of one pair reads: the pair's own, all of its group (answers to one prompt), or the
    whole step's.
    """

    paper: str  # authors, year, arXiv number, equation
    beta: str | None  # what beta means; None: the loss has no beta
    use: str  # when to choose it, for docs/losses.md
    options: tuple[str, ...] = ()  # of Settings, besides beta
    defaults: Mapping[str, float] = field(default_factory=dict)  # where they differ from those of Settings
    reference: bool = True  # whether it reads the reference's logps
    lengths: bool = False  # whether it reads the answers' lengths
    scope: Literal["pair", "group", "step"] = "pair"
    weighted: bool = True  # whether its values belong to single pairs, so that these can be weighted
    margins: bool = False  # whether it reads the data's margins
    per_token: bool = False  # whether its rewards are means over tokens

    def settings(self, options: Options) -> Settings:
        """The loss's options: what the run says, else the loss's defaults."""
        own = {name: getattr(options, name) for name in ("beta", *self.options) if getattr(options, name) is not None}
        return dataclasses.replace(Settings(), **{**self.defaults, **own})


KL = "strength of the KL constraint: the implicit reward is beta * log(policy / reference)"
SMOOTHED = ("label_smoothing", "f_divergence", "f_alpha")
DIVERGENCE = ("f_divergence", "f_alpha")

LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        paper="Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with label_smoothing: cDPO, Mitchell 2023, eq. 3",
        beta=KL,
        use="DPO; the default",
        options=SMOOTHED,
    ),
    "hinge": Loss(
        paper="Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, on DPO's rewards: hinge-norm in Liu et al. 2023 (RSO), "
        "arXiv 2309.06657",
        beta="1 / the margin of log-ratios from which a pair has no loss",
        use="pairs that are already right should not be pushed further",
        options=DIVERGENCE,
    ),
    "ipo": Loss(
        paper="Azar et al. 2023, arXiv 2310.12036, eq. 17, on log-ratios per token",
        beta="the paper's tau: the margin per token is drawn to 1 / (2 * beta)",
        use="few, noiseless pairs that DPO overfits",
        options=DIVERGENCE,
        lengths=True,
    ),
    "exo_pair": Loss(
        paper="Ji et al. 2024 (EXO), arXiv 2402.00856, eq. 16",
        beta=KL,
        use="the reverse KL to the preference distribution instead of the forward one",
        options=SMOOTHED,
        defaults={"label_smoothing": 1e-3},
    ),
    "nca_pair": Loss(
        paper="Chen et al. 2024 (NCA), arXiv 2402.05369, section 4.1, for pairs",
        beta=KL,
        use="chosen log-probabilities fall",
        defaults={"beta": 0.01},
    ),
    "robust": Loss(
        paper="Chowdhury et al. 2024, arXiv 2403.00409, section 3.1",
        beta=KL,
        use="a known share of the pairs, label_smoothing, is the wrong way round",
        options=SMOOTHED,
        defaults={"label_smoothing": 0.1},
    ),
    "bco_pair": Loss(
        paper="Jung et al. 2024 (BCO), arXiv 2404.04656, eq. 11, with both sides from the same prompts",
        beta=KL,
        use="the two answers of a pair are not about each other: a good one and a bad one",
        defaults={"beta": 0.01},
        scope="step",
    ),
    "sppo_hard": Loss(
        paper="Wu et al. 2024 (SPPO), arXiv 2405.00675, eq. 4.7, winner 1 and loser 0",
        beta="1 / the paper's eta: log-ratios are drawn to 1 / (2 * beta) and -1 / (2 * beta)",
        use="rounds of self-play; chosen log-probabilities fall",
        defaults={"beta": 1e-3},
    ),
    "aot": Loss(
        paper="Melnyk et al. 2024, arXiv 2406.05882, section 3, paired: margins sorted over the step",
        beta=KL,
        use="the distribution of margins counts, not each pair",
        options=("label_smoothing",),
        scope="step",
        weighted=False,
    ),
    "aot_unpaired": Loss(
        paper="Melnyk et al. 2024, arXiv 2406.05882, section 3, unpaired: rewards of both sides sorted over the step",
        beta=KL,
        use="good and bad answers that are not about each other",
        options=("label_smoothing",),
        scope="step",
        weighted=False,
    ),
    "apo_zero": Loss(
        paper="D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7",
        beta=KL,
        use="the chosen answers are better than what the model says",
    ),
    "apo_down": Loss(
        paper="D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8",
        beta=KL,
        use="the chosen answers are worse than what the model says",
    ),
    "discopop": Loss(
        paper="Lu et al. 2024 (DiscoPOP), arXiv 2406.08414, eq. 5",
        beta=KL,
        use="a loss found by search; strong on MT-Bench and AlpacaEval in its paper",
        options=("discopop_tau", *DIVERGENCE),
        defaults={"beta": 0.05},
    ),
    "sigmoid_norm": Loss(
        paper="Lambert et al. 2024 (Tulu 3), arXiv 2411.15124: DPO on log-ratios per token",
        beta="as DPO's, for log-ratios per token: some fifty times as large",
        use="answers grow longer and longer",
        options=SMOOTHED,
        defaults={"beta": 5.0},
        lengths=True,
        per_token=True,
    ),
    "sft": Loss(
        paper="the chosen answers' negative log-likelihood per token, as in Pang et al. 2024 (RPO), arXiv 2404.19733",
        beta=None,
        use="beside another loss: chosen log-probabilities fall",
        reference=False,
        lengths=True,
    ),
    "simpo": Loss(
        paper="Meng et al. 2024 (SimPO), arXiv 2405.14734",
        beta="scale of the mean log-probability per token",
        use="no reference in memory or in a table; answers grow longer",
        options=("simpo_gamma", "label_smoothing"),
        defaults={"beta": 2.0},
        reference=False,
        lengths=True,
        per_token=True,
    ),
    "orpo": Loss(
        paper="Hong et al. 2024 (ORPO), arXiv 2403.07691, eq. 4 and 7",
        beta=None,
        use="from a base model in one go: fine-tuning and preference at once, no reference",
        options=("orpo_lambda",),
        reference=False,
        lengths=True,
        per_token=True,
    ),
    "cpo": Loss(
        paper="Xu et al. 2024 (CPO), arXiv 2401.08417, section 3, eq. 3",
        beta="scale of the log-probabilities",
        use="no reference in memory or in a table; translation",
        options=("cpo_alpha", "label_smoothing"),
        reference=False,
        lengths=True,
    ),
    "dpop": Loss(
        paper="Pal et al. 2024 (Smaug), arXiv 2402.13228",
        beta=KL,
        use="chosen log-probabilities fall, above all where the two answers differ little",
        options=("dpop_lambda",),
    ),
    "rdpo": Loss(
        paper="Park et al. 2024 (R-DPO), arXiv 2403.19159",
        beta=KL,
        use="answers grow longer and longer",
        options=("length_alpha", "label_smoothing"),
        lengths=True,
    ),
    "beta_dpo": Loss(
        paper="Wu et al. 2024 (beta-DPO), arXiv 2407.08639, as in its code, without the filter of pairs",
        beta="DPO's, where the step's mean margin is as usual; larger where the margin is larger",
        use="pairs of very different quality",
        options=("beta_alpha", "beta_momentum"),
        scope="step",
    ),
    "kto_pair": Loss(
        paper="Ethayarajh et al. 2024 (KTO), arXiv 2402.01306; for pairs: the HALOs report, eq. 7",
        beta=KL,
        use="noisy pairs; good and bad answers that are not about each other",
        options=("desirable_weight", "undesirable_weight"),
        scope="step",
    ),
    "odpo": Loss(
        paper="Amini et al. 2024 (ODPO), arXiv 2402.10571, with f = log",
        beta=KL,
        use="the data says by how much the chosen answer is better (a margin, or scores)",
        options=("offset_alpha",),
        margins=True,
    ),
    "plackett_luce": Loss(
        paper="Rafailov et al. 2023, arXiv 2305.18290, appendix A.3",
        beta=KL,
        use="rankings of several answers, with --pairs adjacent",
        scope="group",
    ),
}

# Other names of losses that users know.
KNOWN_AS = {
    "dpo": "--loss sigmoid",
    "cdpo": "--loss sigmoid --label_smoothing 0.1",
    "slic": "--loss hinge",
    "rpo": "--loss sigmoid --sft_weight 1",
    "kto": "--loss kto_pair",
    "bco": "--loss bco_pair",
    "exo": "--loss exo_pair",
    "nca": "--loss nca_pair",
    "sppo": "--loss sppo_hard",
    "apo": "--loss apo_zero, or --loss apo_down",
    "smaug": "--loss dpop",
    "r_dpo": "--loss rdpo",
    "wpo": "--wpo true",
    "ld": "--ld_alpha 0.5",
    "ld_dpo": "--ld_alpha 0.5",
    "f_dpo": "--f_divergence js",
    "nll": "--loss sft",
    "tr_dpo": "--loss sigmoid",
}

# Losses with the chosen answers' likelihood as a part. It would not be one if some tokens counted less.
FINE_TUNING = ("sft", "orpo", "cpo")

# What each option of Settings must be.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "label_smoothing": (lambda x: 0 <= x <= 0.5, "from 0 to 0.5"),
    "discopop_tau": (lambda x: x > 0, "more than 0"),
    "beta_momentum": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "beta": (lambda x: x > 0, "more than 0"),
}


@dataclass(frozen=True)
class Term:
    """One of the losses that a run sums."""

    name: str
    loss: Loss
    weight: float
    settings: Settings


def losses_of(options: Options) -> list[Term]:
    """The losses that the run sums. Raises UserError for an unknown one, for weights that do not match, and for an
    option that none of them takes."""
    names = [name.strip() for name in options.loss.split(",")]
    for name in names:
        if name not in LOSSES:
            raise UserError(_unknown(name))
        if names.count(name) > 1:
            raise UserError(f"--loss names {name} twice: name it once, with its weight in --loss_weights")
    weights = _weights(options, names)
    if options.sft_weight is not None:
        if "sft" in names:
            raise UserError("--sft_weight adds sft to the losses, but --loss names it too: leave out one of them")
        names, weights = [*names, "sft"], [*weights, options.sft_weight]
    _require_taken(options, names)
    terms = [
        Term(name, LOSSES[name], weight, LOSSES[name].settings(options))
        for name, weight in zip(names, weights, strict=True)
    ]
    for term in terms:
        _check(term, options)
    option = next(
        (n for n in ("reference_model", "reference_adapter", "reference_table") if getattr(options, n)), "reference"
    )
    asked = getattr(options, option)
    if asked not in ("auto", "none") and not any(term.loss.reference for term in terms):
        raise UserError(
            f"--{option} {asked} has no effect on --loss {','.join(names)}, which reads no reference: leave it out"
        )
    if options.wpo and not all(term.loss.weighted for term in terms):
        raise UserError("--wpo weights single pairs, but --loss aot and aot_unpaired sort them: leave out one of them")
    if options.ld_alpha is not None and (tuned := [name for name in names if name in FINE_TUNING]):
        raise UserError(
            f"--ld_alpha counts some tokens of an answer less, but {tuned[0]} learns all of a chosen answer's tokens: "
            "leave out one of them"
        )
    return terms


def reads_reference(options: Options) -> bool:
    """Whether one of the run's losses compares the policy with a reference."""
    return any(term.loss.reference for term in losses_of(options))


def _unknown(name: str) -> str:
    if not name:
        return "--loss has an empty name: write the names with a comma between them, as in sigmoid,sft"
    spelling = name.lower().replace("-", "_")
    if known := KNOWN_AS.get(spelling):
        return f"--loss has no {one_line(name, None)}; it is {known}"
    [nearest] = difflib.get_close_matches(spelling, LOSSES, n=1, cutoff=0.0)
    return f"--loss has no {one_line(name, None)}; did you mean {nearest}? It takes {', '.join(LOSSES)}"


def _weights(options: Options, names: list[str]) -> list[float]:
    if options.loss_weights is None:
        return [1.0] * len(names)
    try:
        weights = [float(weight) for weight in options.loss_weights.split(",")]
    except ValueError:
        raise UserError(f"--loss_weights is {one_line(options.loss_weights)}: write numbers, as in 1,0.1") from None
    if len(weights) != len(names):
        raise UserError(
            f"--loss_weights has {len(weights)} numbers, but --loss names {len(names)}: give each loss its weight"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"--loss_weights is {one_line(options.loss_weights)}: each weight must be more than 0")
    return weights


def _require_taken(options: Options, names: list[str]) -> None:
    """Raises UserError for an option of losses that none of the run's losses takes."""
    taken = {name for loss in names for name in LOSSES[loss].options}
    taken |= {"beta"} if any(LOSSES[name].beta for name in names) else set()
    for entry in dataclasses.fields(Settings):
        if getattr(options, entry.name) is None or entry.name in taken:
            continue
        takers = [name for name, loss in LOSSES.items() if entry.name in loss.options]
        if entry.name == "beta":
            takers = [name for name, loss in LOSSES.items() if loss.beta]
        raise UserError(
            f"--{entry.name} has no effect on --loss {','.join(names)}: leave it out, or choose one of "
            f"{', '.join(takers)}"
        )


def _check(term: Term, options: Options) -> None:
    """Raises UserError for values that a loss cannot work with."""
    for name in ("beta", *term.loss.options):
        value = getattr(term.settings, name)
        holds, wanted = _RANGES.get(name, (lambda x: x >= 0, "0 or more"))
        if isinstance(value, float) and not (math.isfinite(value) and holds(value)):
            raise UserError(f"--{name} is {value}, but must be {wanted}")
    if term.name == "exo_pair" and term.settings.label_smoothing == 0:
        raise UserError("--loss exo_pair needs --label_smoothing above 0; its paper takes 0.001")
    if term.name == "robust" and term.settings.label_smoothing == 0.5:
        raise UserError("--loss robust needs --label_smoothing below 0.5: at that, labels say nothing")
    if options.f_alpha is not None and options.f_divergence != "alpha":
        raise UserError("--f_alpha is for --f_divergence alpha: add that, or leave out --f_alpha")
    if term.name == "plackett_luce" and options.pairs != "adjacent":
        raise UserError("--loss plackett_luce reads whole rankings: add --pairs adjacent")
    if options.reference == "none" and term.loss.reference:
        free = [name for name, loss in LOSSES.items() if not loss.reference]
        raise UserError(
            f"--loss {term.name} compares the policy with a reference, but --reference is none: leave that out, or "
            f"choose one of {', '.join(free)}"
        )


assert {entry.name for entry in dataclasses.fields(Settings)} <= {*FIELDS}, "each setting is an option of a run"
