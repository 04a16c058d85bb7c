"""What a run's options say about losses: which losses, with which weights and settings, and what is refused."""

import subprocess
import sys
from dataclasses import fields

import launching
import pytest

from dpo_ds.config import FIELDS, help_of, parse_options
from dpo_ds.errors import UserError
from dpo_ds.losses import formulas
from dpo_ds.losses.table import KNOWN_AS, LOSSES, Settings, losses_of, reads_reference


def options(**words):
    return parse_options(["--model=none", *(f"--{name}={value}" for name, value in words.items())])


def refusal(**words) -> str:
    with pytest.raises(UserError) as refused:
        losses_of(options(**words))
    line = str(refused.value)
    assert "\n" not in line
    return line


# ---------------------------------------------------------------------------------------------------- names and weights


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("sigmod", "sigmoid"),
        ("SimPO", "simpo"),
        ("beta-dpo", "beta_dpo"),
        ("bco_pairs", "bco_pair"),
        ("aot-unpaired", "aot_unpaired"),
        ("plackett-luce", "plackett_luce"),
    ],
)
def test_an_unknown_loss_is_refused_with_the_nearest(name, nearest):
    line = refusal(loss=name)
    assert line.startswith(f"--loss has no {name}; did you mean {nearest}? It takes sigmoid, hinge, ipo, ")
    assert all(loss in line for loss in LOSSES)


@pytest.mark.parametrize("name", [*KNOWN_AS, "DPO", "R-DPO", "f-dpo", "LD-DPO"])
def test_a_name_that_users_know_is_refused_with_ours(name):
    ours = KNOWN_AS[name.lower().replace("-", "_")]
    assert refusal(loss=name) == f"--loss has no {name}; it is {ours}"


@pytest.mark.parametrize("name", KNOWN_AS)
def test_what_a_known_name_is_said_to_be_is_accepted(name):
    for flags in KNOWN_AS[name].split(", or "):
        words = flags.split()
        losses_of(
            options(**{flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)})
        )


@pytest.mark.parametrize("loss", ["", "sigmoid,", ",sft", "sigmoid,,sft"])
def test_an_empty_name_is_refused(loss):
    assert refusal(loss=loss).startswith("--loss has an empty name: write the names with a comma")


def test_a_name_of_any_length_and_shape_ends_in_one_line():
    assert refusal(loss="a\nb").startswith("--loss has no a b; did you mean")


def test_a_loss_twice_is_refused():
    assert refusal(loss="sigmoid,sft,sigmoid") == (
        "--loss names sigmoid twice: name it once, with its weight in --loss_weights"
    )


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("1", "--loss_weights has 1 numbers, but --loss names 2: give each loss its weight"),
        ("1,1,1", "--loss_weights has 3 numbers, but --loss names 2: give each loss its weight"),
        ("1,much", "--loss_weights is 1,much: write numbers, as in 1,0.1"),
        ("1,", "--loss_weights is 1,: write numbers, as in 1,0.1"),
        ("", "--loss_weights is : write numbers, as in 1,0.1"),
        ("1,0", "--loss_weights is 1,0: each weight must be more than 0"),
        ("1,-2", "--loss_weights is 1,-2: each weight must be more than 0"),
        ("nan,1", "--loss_weights is nan,1: each weight must be more than 0"),
        ("1,inf", "--loss_weights is 1,inf: each weight must be more than 0"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, says):
    assert refusal(loss="sigmoid,sft", loss_weights=weights) == says


def test_sft_is_named_once():
    assert refusal(loss="sigmoid,sft", sft_weight=0.5) == (
        "--sft_weight adds sft to the losses, but --loss names it too: leave out one of them"
    )
    for weight in (0, -1, "nan"):
        with pytest.raises(UserError, match=r"--sft_weight is .*, but must be "):
            options(sft_weight=weight)


def test_names_and_weights_are_paired():
    def terms(**words):
        return [(term.name, term.weight) for term in losses_of(options(**words))]

    assert terms() == [("sigmoid", 1.0)]
    assert terms(loss="sigmoid, sft", loss_weights="1, 0.1") == [("sigmoid", 1.0), ("sft", 0.1)]
    assert terms(loss="hinge,ipo") == [("hinge", 1.0), ("ipo", 1.0)]
    assert terms(loss="ipo", loss_weights="2", sft_weight=0.3) == [("ipo", 2.0), ("sft", 0.3)]


# ------------------------------------------------------------------------------------------------------------- settings

DEFAULTS = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence": "reverse_kl"}
# What differs from DEFAULTS, and the loss's own options: from the papers and their code, see losses/table.py.
OWN = {
    "exo_pair": {"label_smoothing": 0.001},
    "nca_pair": {"beta": 0.01},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {"beta": 0.01},
    "sppo_hard": {"beta": 0.001},
    "discopop": {"beta": 0.05, "discopop_tau": 0.05},
    "sigmoid_norm": {"beta": 5.0},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0},
    "orpo": {"orpo_lambda": 0.1},
    "cpo": {"cpo_alpha": 1.0},
    "dpop": {"dpop_lambda": 50.0},
    "rdpo": {"length_alpha": 0.01},
    "beta_dpo": {"beta_alpha": 0.6, "beta_momentum": 0.9},
    "kto_pair": {"desirable_weight": 1.0, "undesirable_weight": 1.0},
    "odpo": {"offset_alpha": 1.0},
}


def adjacent(name: str) -> dict:
    """What a loss needs of a run besides its name."""
    return {"pairs": "adjacent"} if name == "plackett_luce" else {}


@pytest.mark.parametrize("name", LOSSES)
def test_default_settings(name):
    (term,) = losses_of(options(loss=name, **adjacent(name)))
    expected = {**DEFAULTS, **OWN.get(name, {})}
    assert {key: getattr(term.settings, key) for key in expected} == expected
    assert set(OWN.get(name, {})) <= {"beta", *LOSSES[name].options}, "an option with a default of its own is an option"
    assert set(LOSSES[name].defaults) <= {"beta", *LOSSES[name].options}


@pytest.mark.parametrize("option", [entry.name for entry in fields(Settings)])
def test_an_options_help_says_its_default(option):
    assert FIELDS[option].default is None, "a loss's own default counts where the option is not given"
    if option not in ("beta", "label_smoothing"):  # these depend on the loss
        default = getattr(Settings(), option)
        said = f"{default:g}" if isinstance(default, float) else f"DPO's {default}"
        assert f"by default {said}." in help_of(option)


def test_options_reach_each_loss_that_takes_them():
    terms = losses_of(options(loss="simpo,rdpo,sft", beta=3.0, label_smoothing=0.1, length_alpha=0.5))
    simpo, rdpo, sft = (term.settings for term in terms)
    assert (simpo.beta, rdpo.beta) == (3.0, 3.0) and (simpo.label_smoothing, rdpo.label_smoothing) == (0.1, 0.1)
    assert rdpo.length_alpha == 0.5 and simpo.simpo_gamma == 1.0 and sft == Settings(beta=3.0)


@pytest.mark.parametrize("name", LOSSES)
def test_each_row_is_whole(name):
    loss = LOSSES[name]
    assert callable(getattr(formulas, name)) and loss.paper and loss.use
    assert set(loss.options) <= {entry.name for entry in fields(Settings)}
    assert (loss.beta is None) == (name in ("sft", "orpo"))
    assert reads_reference(options(loss=name, **adjacent(name))) == loss.reference


# ------------------------------------------------------------------------------------------------------------- refusals

VALUES = {
    "beta": 0.2,
    "label_smoothing": 0.2,
    "f_divergence": "js",
    "f_alpha": 0.3,
    "discopop_tau": 0.1,
    "simpo_gamma": 0.5,
    "orpo_lambda": 0.2,
    "cpo_alpha": 0.5,
    "dpop_lambda": 5.0,
    "length_alpha": 0.1,
    "beta_alpha": 0.5,
    "beta_momentum": 0.5,
    "offset_alpha": 0.5,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
}


def test_every_option_of_losses_is_tested():
    assert set(VALUES) == {entry.name for entry in fields(Settings)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("option", VALUES)
def test_an_option_is_for_the_losses_that_read_it(option, name):
    words = {"loss": name, option: VALUES[option], **adjacent(name)}
    if option == "f_alpha":
        words["f_divergence"] = "alpha"
    takers = [other for other, loss in LOSSES.items() if option in loss.options or (option == "beta" and loss.beta)]
    if name in takers:
        (term,) = losses_of(options(**words))
        assert getattr(term.settings, option) == VALUES[option]
    elif option == "f_alpha":  # --f_divergence is refused first
        assert "has no effect on --loss" in refusal(**words)
    else:
        assert refusal(**words) == (
            f"--{option} has no effect on --loss {name}: leave it out, or choose one of {', '.join(takers)}"
        )


def test_an_option_is_refused_only_if_none_of_several_losses_takes_it():
    assert "--simpo_gamma has no effect on --loss sigmoid,sft" in refusal(loss="sigmoid,sft", simpo_gamma=0.5)
    assert "--beta has no effect on --loss sft" in refusal(loss="sft", beta=0.5)
    assert "--beta has no effect on --loss orpo,sft" in refusal(loss="orpo", sft_weight=1.0, beta=0.5)
    assert losses_of(options(loss="sigmoid,simpo", simpo_gamma=0.5))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"label_smoothing": 0.6}, "--label_smoothing is 0.6, but must be from 0 to 0.5"),
        ({"label_smoothing": -0.1}, "--label_smoothing is -0.1, but must be from 0 to 0.5"),
        ({"label_smoothing": "nan"}, "--label_smoothing is nan, but must be finite"),
        ({"loss": "discopop", "discopop_tau": 0}, "--discopop_tau is 0.0, but must be more than 0"),
        ({"loss": "beta_dpo", "beta_momentum": 1}, "--beta_momentum is 1.0, but must be from 0 to below 1"),
        ({"loss": "beta_dpo", "beta_alpha": -1}, "--beta_alpha is -1.0, but must be 0 or more"),
        ({"loss": "beta_dpo", "beta_alpha": "inf"}, "--beta_alpha is inf, but must be finite"),
        ({"loss": "simpo", "simpo_gamma": -1}, "--simpo_gamma is -1.0, but must be 0 or more"),
        ({"loss": "orpo", "orpo_lambda": -1}, "--orpo_lambda is -1.0, but must be 0 or more"),
        ({"loss": "cpo", "cpo_alpha": -1}, "--cpo_alpha is -1.0, but must be 0 or more"),
        ({"loss": "dpop", "dpop_lambda": -1}, "--dpop_lambda is -1.0, but must be 0 or more"),
        ({"loss": "rdpo", "length_alpha": -1}, "--length_alpha is -1.0, but must be 0 or more"),
        ({"loss": "odpo", "offset_alpha": -1}, "--offset_alpha is -1.0, but must be 0 or more"),
        ({"loss": "kto_pair", "desirable_weight": -1}, "--desirable_weight is -1.0, but must be 0 or more"),
        ({"loss": "kto_pair", "undesirable_weight": -1}, "--undesirable_weight is -1.0, but must be 0 or more"),
        ({"f_divergence": "alpha", "f_alpha": -1}, "--f_alpha is -1.0, but must be 0 or more"),
        ({"f_alpha": 0.3}, "--f_alpha is for --f_divergence alpha: add that, or leave out --f_alpha"),
        (
            {"f_alpha": 0.3, "f_divergence": "js"},
            "--f_alpha is for --f_divergence alpha: add that, or leave out --f_alpha",
        ),
        (
            {"loss": "exo_pair", "label_smoothing": 0},
            "--loss exo_pair needs --label_smoothing above 0; its paper takes 0.001",
        ),
        (
            {"loss": "robust", "label_smoothing": 0.5},
            "--loss robust needs --label_smoothing below 0.5: at that, labels say nothing",
        ),
        ({"loss": "plackett_luce"}, "--loss plackett_luce reads whole rankings: add --pairs adjacent"),
        ({"loss": "plackett_luce", "pairs": "all"}, "--loss plackett_luce reads whole rankings: add --pairs adjacent"),
    ],
    ids=str,
)
def test_values_that_a_loss_cannot_work_with_are_refused(words, says):
    assert refusal(**words) == says


@pytest.mark.parametrize("beta", [0, -1, "nan", "inf"])
def test_beta_is_above_0_and_finite(beta):
    with pytest.raises(UserError, match=r"--beta is .*, but must be (more than 0|finite)"):
        losses_of(options(beta=beta))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reference])
def test_a_loss_that_needs_a_reference_is_refused_without_one(name):
    assert refusal(loss=name, reference="none", **adjacent(name)) == (
        f"--loss {name} compares the policy with a reference, but --reference is none: leave that out, or choose one "
        "of sft, simpo, orpo, cpo"
    )
    assert f"--loss {name} compares" in refusal(loss=f"simpo,{name}", reference="none", **adjacent(name))


@pytest.mark.parametrize("reference", ["precomputed", "live", "base"])
def test_a_loss_without_a_reference_is_refused_with_one(reference):
    lora = {"lora": "true"} if reference == "base" else {}
    assert refusal(loss="simpo,sft", reference=reference, **lora) == (
        f"--reference {reference} has no effect on --loss simpo,sft, which reads no reference: leave it out"
    )
    assert losses_of(options(loss="simpo,sigmoid", reference=reference, **lora))
    assert "--reference_model other has no effect on --loss sft" in refusal(loss="sft", reference_model="other")
    for free in ("auto", "none"):
        assert losses_of(options(loss="simpo,sft", reference=free))


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sigmoid,aot"])
def test_wpo_is_refused_with_losses_that_sort(loss):
    line = "--wpo weights single pairs, but --loss aot and aot_unpaired sort them: leave out one of them"
    assert refusal(loss=loss, wpo="true") == line
    assert losses_of(options(loss="sigmoid", wpo="true")) and losses_of(options(loss=loss))


@pytest.mark.parametrize(
    "words", [{"loss": "sigmoid,sft"}, {"sft_weight": 0.1}, {"loss": "orpo"}, {"loss": "cpo"}], ids=str
)
def test_ld_alpha_is_refused_where_a_likelihood_is_learned(words):
    """LD-DPO changes the log-probabilities that all of the run's losses read."""
    name = "sft" if "sft" in str(words) else words["loss"]
    assert refusal(ld_alpha=0.5, **words) == (
        f"--ld_alpha counts some tokens of an answer less, but {name} learns all of a chosen answer's tokens: leave "
        "out one of them"
    )
    assert losses_of(options(**words)) and losses_of(options(ld_alpha=0.5))


def test_the_table_needs_no_torch():
    """So that a wrong option is refused at once."""
    code = (
        "import sys; from dpo_ds.config import Options; from dpo_ds.losses.table import losses_of; "
        "losses_of(Options(model='none')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=launching.ROOT)
