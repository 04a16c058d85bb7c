"""Packed, prefix-shared scoring against two plain forwards: values, gradients, and layouts that must fail."""

import sys

import numpy as np
import oracle
import pytest
import tiny
import torch
from packed_pairs import GROUPS, PACKED, packed_model, random_groups, random_pairs
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_ds.config import Options
from dpo_ds.data.pairs import Group
from dpo_ds.errors import UserError
from dpo_ds.models.lora import add_lora
from dpo_ds.plan.activations import LiveBytes
from dpo_ds.scoring import attention
from dpo_ds.scoring.head import FEWEST_COLUMNS, HeadInputs, LogitBudget, fused_logps
from dpo_ds.scoring.packed import layout_of, pack, shared_tokens
from dpo_ds.scoring.rotary import fix_frequencies
from dpo_ds.scoring.scorer import Scorer
from dpo_ds.scoring.twin import _kernel_problem, choose_kernel, randomise, require_exact


@pytest.fixture(scope="module", params=tiny.NAMES)
def folder(request, tmp_path_factory):
    return tiny.make(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_values_and_gradients_equal_two_plain_forwards(folder, checkpointing):
    groups = random_groups()
    plain = oracle.load(folder)
    batch = pack(groups)
    expected = oracle.answers_logps(plain, groups)
    oracle.losses(expected[batch.pairs], torch.zeros(len(batch.pairs), 2), 0.1).sum().backward()

    scorer = packed_model(folder)
    if checkpointing:
        scorer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        scorer.train()
        for module in scorer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    logps = scorer(batch).answers
    oracle.losses(logps[batch.pairs], torch.zeros(len(batch.pairs), 2), 0.1).sum().backward()

    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=1e-6)  # sums of up to 14 token log-probabilities
    gradients = dict(scorer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_each_token_within_1e5(folder):
    groups = random_groups()
    expected = [
        oracle.token_logps(oracle.load(folder), group.prompt, answer)[slice(None) if scored is None else scored]
        for group in groups
        for answer, scored in zip(group.answers, group.scored, strict=True)
    ]
    scorer = packed_model(folder)
    batch = pack(groups)
    hidden = scorer.model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.segments, use_cache=False
    ).last_hidden_state[0]
    tokens = scorer.model.get_output_embeddings()(hidden[batch.rows], batch.targets)
    torch.testing.assert_close(tokens, torch.cat(expected), atol=1e-5, rtol=0)


def test_an_answer_scores_the_same_in_any_pack(folder):
    """Together, group by group, each answer alone with its prompt, and in another order."""
    groups = random_groups()
    scorer = packed_model(folder)
    alone = [
        Group(group.prompt, [answer], np.zeros((0, 2), dtype=np.int64), [scored])
        for group in groups
        for answer, scored in zip(group.answers, group.scored, strict=True)
    ]
    turned = [Group(g.prompt, g.answers[::-1], g.pairs, g.scored[::-1]) for g in groups[::-1]]
    with torch.no_grad():
        together = scorer(pack(groups)).answers
        by_group = torch.cat([scorer(pack([group])).answers for group in groups])
        by_answer = torch.cat([scorer(pack([group])).answers for group in alone])
        reversed_ = scorer(pack(turned)).answers.flip(0)
    for other in (by_group, by_answer, reversed_):
        torch.testing.assert_close(together, other, atol=2e-5, rtol=1e-6)


def positions_not_reset(batch):
    batch.position_ids = torch.arange(batch.input_ids.shape[1])[None]


def an_answer_sees_the_one_before(batch):
    """The second answer of the first group joins the segment of the first one."""
    first, second, *others = batch.segments[0, 0].tolist()
    batch.segments = torch.tensor([[first[0] + second[0], 0, 0], *others], dtype=torch.int32)[None, None]


def an_answer_scored_from_anothers_last_row(batch):
    second = int((batch.token_answers == 1).nonzero()[0])
    batch.rows[second] = batch.rows[second - 1] + 1


def an_answer_without_its_prompt(batch):
    batch.segments[..., 2] = 0


def a_token_that_is_not_learned_is_scored(batch):
    masked = int((batch.token_answers == 4).nonzero()[0])
    batch.rows[masked], batch.targets[masked] = batch.rows[masked] - 1, batch.input_ids[0, batch.rows[masked]]


@pytest.mark.parametrize(
    "broken",
    [
        positions_not_reset,
        an_answer_sees_the_one_before,
        an_answer_scored_from_anothers_last_row,
        an_answer_without_its_prompt,
        a_token_that_is_not_learned_is_scored,
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_negative_controls_move_the_scores(name, broken, tmp_path):
    folder = tiny.make(name, tmp_path)
    groups = random_groups(GROUPS[:2])
    batch = pack(groups)
    broken(batch)
    with torch.no_grad():
        moved = (packed_model(folder)(batch).answers - oracle.answers_logps(oracle.load(folder), groups)).abs().max()
    assert moved > 0.01, f"{broken.__name__} went unnoticed"


VOCABULARY = 2 * FEWEST_COLUMNS + 101  # at least three tiles, the last one narrower


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.0625, None), (1.0, 3.0), (0.5, 3.0)])
@pytest.mark.parametrize(
    ("tile", "kept"), [(64, 0), (10**6, 0), (64, 37 * FEWEST_COLUMNS), (10**6, 10**6)], ids="tiles one some all".split()
)
def test_fused_head_against_float64(adapter, bias, scale, softcap, tile, kept):
    torch.manual_seed(0)
    hidden, weight, low, up = (
        torch.randn(n, width, dtype=torch.float64, requires_grad=True)
        for n, width in ((37, 16), (VOCABULARY, 16), (37, 3), (VOCABULARY, 3))
    )
    b = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True) if bias else None
    targets, outer = torch.randint(0, VOCABULARY, (37,)), torch.randn(37, dtype=torch.float64)
    inputs = [hidden, weight, *([b] if bias else []), *([low, up] if adapter else [])]

    logits = torch.nn.functional.linear(hidden, weight, b)
    logits = scale * (logits + low @ up.t() if adapter else logits)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected_grads = torch.autograd.grad((expected * outer).sum(), inputs)

    fast = [x.detach().float().requires_grad_() for x in inputs]
    further = dict(zip(("low", "up"), fast[-2:], strict=True)) if adapter else {}
    logps = fused_logps(
        HeadInputs(fast[0], fast[1], targets, fast[2] if bias else None, scale, softcap, LogitBudget(tile, kept)),
        **further,
    )
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=1e-5)
    for again in (True, False):  # the first backward uses up the tiles that were kept
        grads = torch.autograd.grad((logps * outer.float()).sum(), fast, retain_graph=again)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad.double(), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.0625, None), (1.0, 3.0), (0.5, 3.0)])
@pytest.mark.parametrize(("tile", "kept"), [(64, 0), (10**6, 0), (64, 10**6)], ids="tiles one all".split())
def test_collisions_against_float64(adapter, bias, scale, softcap, tile, kept):
    """log of the sum over the vocabulary of p^2, where p is both flat and sharp. Scores and gradients do not change."""
    torch.manual_seed(0)
    sharpness = torch.logspace(-2, 1, 37)[:, None]
    hidden, low = (sharpness * torch.randn(37, width) for width in (16, 3))
    weight, up = (torch.randn(VOCABULARY, width) for width in (16, 3))
    b = torch.randn(VOCABULARY) if bias else None
    targets = torch.randint(0, VOCABULARY, (37,))

    logits = hidden.double() @ weight.double().t()
    logits = logits + b.double() if bias else logits
    logits = scale * (logits + low.double() @ up.double().t() if adapter else logits)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = (2 * logits.log_softmax(-1)).logsumexp(-1)
    assert expected.min() < -5 and (softcap or scale < 1 or expected.max() > -0.01), "flat and sharp"

    further = {"low": low, "up": up} if adapter else {}
    weight.requires_grad_()
    found, scores, gradients = torch.empty(37), [], []
    for collisions in (found, None):
        inputs = HeadInputs(hidden, weight, targets, b, scale, softcap, LogitBudget(tile, kept), collisions=collisions)
        scores.append(fused_logps(inputs, **further))
        gradients += torch.autograd.grad(scores[-1].sum(), weight)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(*scores) and torch.equal(*gradients) and not found.requires_grad


def test_collisions_of_certain_and_of_even_predictions():
    """One token has all of the probability: log 1. All tokens have the same: log 1 / V."""
    hidden, weight = torch.tensor([[1.0], [0.0]]), torch.zeros(VOCABULARY, 1)
    weight[VOCABULARY - 3] = 1e4
    found = torch.empty(2)
    inputs = HeadInputs(hidden, weight, torch.tensor([3, 5]), budget=LogitBudget(64), collisions=found)
    assert fused_logps(inputs)[0] == -1e4
    torch.testing.assert_close(found, torch.tensor([0.0, -np.log(VOCABULARY)], dtype=torch.float32))


def test_the_head_takes_no_rows_at_all():
    hidden, weight = torch.zeros(0, 16, requires_grad=True), torch.randn(VOCABULARY, 16, requires_grad=True)
    logps = fused_logps(HeadInputs(hidden, weight, torch.zeros(0, dtype=torch.int64)))
    logps.sum().backward()
    assert logps.shape == (0,) and hidden.grad.shape == (0, 16) and not weight.grad.any()


def test_fused_head_in_bf16_is_as_good_as_its_inputs():
    """The sum of 128 log-probabilities is within 0.001 of float64's on the same bf16 inputs."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(128, 64).bfloat16(), (torch.randn(4096, 64) / 8).bfloat16()
    targets = torch.randint(0, 4096, (128,))
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None]).sum()
    assert abs(fused_logps(HeadInputs(hidden, weight, targets)).double().sum() - exact) < 1e-3


def test_the_logits_matrix_never_exists():
    """No tensor of forward and backward comes near the size of one [N, V] matrix."""
    N, V, H = 512, 32768, 8
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest.append(x.numel())
            return out

    with Watch():
        fused_logps(HeadInputs(hidden, weight, targets, budget=LogitBudget(2**18))).sum().backward()
    assert max(largest) <= max(2**18, V * H) < N * V / 8


def test_a_model_that_drops_the_layout_is_refused():
    with pytest.raises(ValueError, match="cannot be scored"):
        attention.packed_attention(None, torch.nn.Linear(1, 1), torch.zeros(1, 1, 2, 4), None, None, None)


@pytest.mark.parametrize("name", ["gpt2", "mistral-v0.1"])
def test_the_segments_survive_what_hooks_do_to_a_tensor(name, tmp_path):
    """ZeRO-3's hooks give a module copies of its inputs. Checkpointing gives it detached ones."""
    scorer, batch = packed_model(tiny.make(name, tmp_path)), pack(random_groups())
    with torch.no_grad():
        expected = scorer(batch).answers
    scorer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    scorer.train()

    def copy(value):
        return (
            value.detach().clone().view(value.shape)
            if isinstance(value, torch.Tensor) and value.dtype == torch.int32
            else value
        )

    def copies(module, args, kwargs):
        return tuple(map(copy, args)), {key: copy(value) for key, value in kwargs.items()}

    for module in scorer.model.modules():
        module.register_forward_pre_hook(copies, with_kwargs=True)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(scorer(batch).answers, expected, atol=1e-5, rtol=0)


ROPES = {
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40, "factor": 12.8,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.5, 2.0, 4.0, 8.0, 16.0, 32.0],
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_are_those_of_max_length_whatever_shares_the_row(kind):
    """One pair is within the original context of 40, one is longer, and one has a response on either side of it."""
    shape = {**tiny.COMMON, "max_position_embeddings": 40, "rope_parameters": ROPES[kind]}
    groups = random_groups([(10, 5, 6), (50, 6, 7), (34, 4, 20)])

    def scores(fixed: bool):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), attn_implementation="eager").eval()
        randomise(model)
        if fixed:
            fix_frequencies(model, 64)
        with torch.no_grad():
            plain = oracle.answers_logps(model, groups)
            model.set_attn_implementation(PACKED)
            return plain, Scorer(model)(pack(groups)).answers

    plain, packed = scores(fixed=True)
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-6)
    plain, packed = scores(fixed=False)
    assert (packed - plain).abs().max() > 0.01, "negative control: transformers' frequencies change with the row"
    # Beyond the original context, the fixed frequencies are those of transformers for a plain sequence of max_length.
    require_exact("x", LlamaConfig(**shape))


def test_a_model_loaded_without_a_packed_kernel_is_a_bug_not_a_slow_path(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny.make("llama", tmp_path))
    with pytest.raises(AssertionError, match="attn_implementation"):
        Scorer(model)


def adapted(folder, implementation):
    """The model with a random adapter on its output head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    model = add_lora(model, Options(model="llama", lora=True, lora_r=3, lora_targets="q_proj,lm_head")).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama", "command-r-plus", "gemma2", "llama with an adapter"])
def test_certainty_is_the_oracles(name, tmp_path):
    """exp of the mean over an answer's learned tokens of log p(token) - log sum p^2, from full logits. Heads are tied,
    plain, scaled and soft-capped."""
    folder = tiny.make(name.split()[0], tmp_path)
    if "adapter" in name:
        plain, packed = adapted(folder, "eager"), adapted(folder, PACKED)
    else:
        plain = oracle.load(folder)
        packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=PACKED)
    groups, expected = random_groups(), []
    for group in groups:
        for answer, scored in zip(group.answers, group.scored, strict=True):
            ids = torch.from_numpy(np.concatenate([group.prompt, answer]).astype(np.int64))
            with torch.no_grad():
                logits = plain(input_ids=ids[None], use_cache=False).logits[0, len(group.prompt) - 1 : -1].double()
            log_p = logits.log_softmax(-1)
            token = log_p.gather(1, torch.from_numpy(answer.astype(np.int64))[:, None])[:, 0]
            each = token - log_p.exp().square().sum(-1).log()
            expected.append((each if scored is None else each[torch.from_numpy(scored)]).mean().exp())

    scorer = Scorer(packed, certainty=True).train()
    for module in scorer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = scorer(pack(groups))
    torch.testing.assert_close(found.certainty.double(), torch.stack(expected), atol=1e-6, rtol=1e-4)
    assert found.answers.requires_grad and not found.certainty.requires_grad
    assert scorer.eval()(pack(groups)).certainty is None, "it is for training"


def test_tokens_sum_to_answers(tmp_path):
    scorer, batch = packed_model(tiny.make("llama", tmp_path)), pack(random_groups())
    assert scorer(batch).tokens is None
    scorer.tokens = True
    found = scorer(batch)
    sums = torch.zeros(batch.answers).index_add(0, batch.token_answers, found.tokens)
    torch.testing.assert_close(found.answers, sums)


def test_shared_tokens_by_hand():
    """Answers of 3, 1 and 4 learned tokens: tokens 0 to 2, 3, and 4 to 7. Their pairs share 1, 3 and 1."""
    lengths = np.array([3, 1, 4])
    found = shared_tokens(lengths, np.array([[0, 1], [2, 0], [1, 2]]))
    assert found.dtype == np.int64 and found.tolist() == [
        *([0, 0], [3, 1]),  # the first pair: chosen 0, rejected 1
        *([4, 2], [5, 2], [6, 2], [0, 3], [1, 3], [2, 3]),
        *([3, 4], [4, 5]),
    ]
    assert shared_tokens(lengths, []).shape == (0, 2)


def test_a_pack_shares_tokens_if_it_is_asked_to():
    """Of learned tokens: of the third answer of a group, every other token is learned."""
    groups = random_groups()
    assert pack(groups).shared.shape == (0, 2)
    batch = pack(groups, shared=True)
    assert torch.equal(batch.shared, torch.from_numpy(shared_tokens(batch.lengths.numpy(), batch.pairs.numpy())))
    token, side = batch.shared.unbind(1)
    assert torch.equal(batch.token_answers[token], batch.pairs.view(-1)[side]), "each is a token of that pair's answer"
    counts = torch.zeros(2 * len(batch.pairs), dtype=torch.int64).index_add(0, side, torch.ones_like(side))
    assert torch.equal(counts.view(-1, 2), batch.lengths[batch.pairs].amin(1, keepdim=True).expand(-1, 2))


class KernelConfig:
    """Stands in for a config: it has what the choice of a kernel reads."""

    def __init__(self, **facts):
        vars(self).update({"hidden_size": 4096, "num_attention_heads": 32, **facts})

    def get_text_config(self):
        return self


EVERY_WORD = frozenset().union(*(kernel.words for kernel in attention.KERNELS.values()))


@pytest.mark.parametrize(
    ("capability", "installed", "facts", "chosen"),
    [
        (None, {"flash_attn"}, {}, "sdpa"),
        ((8, 0), {"flash_attn", "flash_attn_interface"}, {}, "flash_attention_2"),
        ((9, 0), {"flash_attn", "flash_attn_interface"}, {}, "flash_attention_3"),
        ((9, 0), {"flash_attn"}, {}, "flash_attention_2"),
        ((9, 0), {"torch.nn.attention.varlen"}, {}, "varlen"),
        ((9, 0), {"torch.nn.attention.varlen"}, {"attn_logit_softcapping": 50.0}, "sdpa"),
        ((9, 0), {"flash_attn"}, {"attn_logit_softcapping": 50.0}, "flash_attention_2"),
        ((9, 0), {"flash_attn"}, {"head_dim": 512}, "sdpa"),
        ((9, 0), {"flash_attn"}, {"head_dim": 100}, "sdpa"),
        ((9, 0), {"flash_attn"}, {"kv_lora_rank": 512}, "sdpa"),
        ((7, 5), {"flash_attn", "torch.nn.attention.varlen"}, {}, "sdpa"),
        ((8, 0), set(), {}, "sdpa"),
    ],
)
def test_the_fastest_kernel_that_will_do_is_chosen(monkeypatch, capability, installed, facts, chosen):
    monkeypatch.setattr(attention, "_arguments", lambda module, _: EVERY_WORD if module in installed else None)
    assert attention.usable("auto", KernelConfig(**facts), torch.bfloat16, capability)[0] == chosen
    assert attention.usable("auto", KernelConfig(**facts), torch.float32, capability) == ["sdpa"]
    assert attention.usable("sdpa", KernelConfig(**facts), torch.bfloat16, capability) == ["sdpa"]


@pytest.mark.parametrize(
    ("wanted", "capability", "says"),
    [
        ("flash_attention_2", None, "needs a GPU; what works here: auto, sdpa"),
        ("flash_attention_3", (8, 0), "is not for GPUs of compute capability 8.0"),
        ("flash_attention_2", (8, 0), "is not installed .pip install flash-attn"),
    ],
)
def test_a_kernel_that_will_not_do_is_refused_with_what_works(monkeypatch, wanted, capability, says):
    monkeypatch.setattr(
        attention, "_arguments", lambda module, _: EVERY_WORD if module == "torch.nn.attention.varlen" else None
    )
    with pytest.raises(UserError, match=f"--attention {wanted} {says}"):
        attention.usable(wanted, KernelConfig(), torch.bfloat16, capability)


FROM_HUB = """
from types import SimpleNamespace

def flash_attn_varlen_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    return q

def get_kernel(name, version):
    assert (name, version) == ("kernels-community/flash-attn3", 1)
    {body}
"""


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("return SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)", True),
        ("raise RuntimeError('no build for this torch')", False),
    ],
)
def test_flash_attention_3_comes_from_the_hub_if_it_is_asked_for(body, found, monkeypatch, tmp_path):
    """A stand-in for the package `kernels`: the real one finds a build on a GPU alone."""
    (tmp_path / "kernels.py").write_text(FROM_HUB.format(body=body))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    attention._from_hub.cache_clear()
    facts = KernelConfig(), torch.bfloat16, (9, 0)
    try:
        assert attention.usable("auto", *facts)[0] == "varlen" and "kernels" not in sys.modules
        if found:
            assert attention.usable("flash_attention_3", *facts) == ["flash_attention_3"]
        else:
            with pytest.raises(
                UserError, match="flash_attention_3 cannot be had from the hub: no build for this torch"
            ):
                attention.usable("flash_attention_3", *facts)
    finally:
        sys.modules.pop("kernels", None)
        attention._from_hub.cache_clear()


def test_torchs_own_kernel_is_known_by_the_arguments_that_it_takes(monkeypatch):
    """torch 2.10's varlen_attn has no window. With fewer key heads 2.12's needs enable_gqa, which 2.11 lacks."""
    words = attention._arguments("torch.nn.attention.varlen", "varlen_attn")
    assert attention.KERNELS["varlen"].words <= words, "the installed torch takes them all"
    monkeypatch.setattr(attention, "_arguments", lambda module, _: frozenset({"query", "key", "scale"}))
    with pytest.raises(UserError, match="--attention varlen takes no window_size in the version that is installed"):
        attention.usable("varlen", KernelConfig(), torch.bfloat16, (9, 0))


def test_a_kernel_is_tried_on_the_twin():
    """On a CPU, torch's own kernel passes, one that does not write its result is wrong, and a GPU's kernel stops."""
    config, where = tiny.config("mistral-v0.1"), (torch.bfloat16, torch.device("cpu"), False)
    assert _kernel_problem(attention.SDPA, config, *where) is None
    assert "gives wrong log-probabilities" in _kernel_problem(attention.SIZES_ONLY, config, *where)
    assert "stops: " in _kernel_problem("varlen", config, *where)


def test_a_kernel_that_fails_on_the_twin_gives_way_to_the_next(monkeypatch):
    config, where = tiny.config("llama"), (torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(attention, "_obstacle", lambda *_: None)
    kernel, failed = choose_kernel("auto", config, *where)
    assert kernel == "sdpa" and len(failed) == 3 and all("stops: " in line for line in failed)
    with pytest.raises(UserError, match=r"--attention varlen: on this machine .* stops: .*; use --attention auto"):
        choose_kernel("varlen", config, *where)


def test_the_segments_stay_on_the_host_and_become_a_layout_once_a_device():
    batch = pack(random_groups([(3, 2, 4)] * 2))
    moved = batch.to("meta")
    assert moved.segments.device.type == "cpu" and moved.input_ids.device.type == "meta"
    layout = layout_of(moved.segments, torch.device("cpu"))
    assert layout is layout_of(batch.segments.clone(), torch.device("cpu"))
    assert layout.query_offsets == [0, 5, 9, 14, 18] and layout.key_offsets == [0, 5, 12, 17, 24]
    assert (layout.longest_query, layout.longest_key) == (5, 7)
    assert layout.key_rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, *range(9, 14), 9, 10, 11, 14, 15, 16, 17]


@pytest.mark.parametrize("tile", [2**16, 2**20])
def test_the_head_holds_one_tile_above_its_inputs_and_gradients(tile):
    """Memory is counted on the meta device. All logits would take fifty times the larger tile."""
    N, H, V = 512, 64, 102_400
    hidden, weight = (torch.zeros(n, H, device="meta", requires_grad=True) for n in (N, V))
    targets = torch.zeros(N, dtype=torch.int64, device="meta")
    with LiveBytes([hidden, weight, targets]) as live:
        logps = fused_logps(HeadInputs(hidden, weight, targets, budget=LogitBudget(tile)))
        forward = live.peak
        logps.sum().backward()
    one_tile, rows = 4 * max(tile, FEWEST_COLUMNS * N), 4 * N * H
    assert one_tile <= forward <= 1.1 * one_tile
    gradients = 4 * V * H + rows
    shared = rows  # the hidden states, each times its row's share of the loss
    assert live.peak <= 1.1 * one_tile + gradients + shared + rows


def test_what_the_head_keeps_for_backward_is_counted_and_gone_after_it():
    N, H, V, tile, kept = 512, 64, 102_400, 2**20, 2**23
    hidden, weight = (torch.zeros(n, H, device="meta", requires_grad=True) for n in (N, V))
    targets = torch.zeros(N, dtype=torch.int64, device="meta")
    with LiveBytes([hidden, weight, targets]) as live:
        logps = fused_logps(HeadInputs(hidden, weight, targets, budget=LogitBudget(tile, kept)))
        held = live.now
        logps.sum().backward()
        hidden.grad = weight.grad = logps = None
        assert live.now == 0
    assert 4 * kept <= held <= 1.01 * 4 * kept
    assert live.peak <= 1.1 * 4 * (kept + tile) + 4 * H * (V + 3 * N)
    with torch.no_grad(), LiveBytes([hidden, weight, targets]) as live:
        fused_logps(HeadInputs(hidden, weight, targets, budget=LogitBudget(tile, kept)))
    assert live.peak <= 1.1 * 4 * tile


def test_an_adapter_on_the_head_scores_and_learns_as_peft_has_it(tmp_path):
    """The adapter is not merged: every tile adds its product to the head's."""
    folder = tiny.make("llama", tmp_path)
    plain, packed = adapted(folder, "eager"), adapted(folder, PACKED)
    groups = random_groups()
    batch = pack(groups)
    expected, logps = oracle.answers_logps(plain, groups), Scorer(packed)(batch).answers
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=1e-5)
    for found in (expected, logps):
        (found[batch.pairs[:, 0]] - found[batch.pairs[:, 1]]).sum().backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            assert theirs[name].abs().max() > 1e-3
            torch.testing.assert_close(parameter.grad, theirs[name], atol=2e-4, rtol=1e-3)
    head = packed.get_base_model().lm_head
    head.scaling["default"] = 0.0  # as Engine.score_base does
    assert (Scorer(packed)(batch).answers - expected).abs().max() > 0.1


def test_backwards_in_any_order_find_their_own_forwards_gradient(tmp_path):
    """Embedding and head share a weight. Some tokens are padding tokens, whose embedding does not learn."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**tiny.TIED, "pad_token_id": 5}), dtype=torch.float32)
    randomise(model)
    model.save_pretrained(tmp_path)
    scorer = packed_model(tmp_path)
    groups = [Group.of_pair(*(np.where(part % 7 == 0, 5, part) for part in pair)) for pair in random_pairs()]
    plain = oracle.load(tmp_path)
    (oracle.answers_logps(plain, groups[:2]).sum() + 2 * oracle.answers_logps(plain, groups[2:]).sum()).backward()
    first, second = scorer(pack(groups[:2])).answers, scorer(pack(groups[2:])).answers
    with torch.no_grad():
        scorer(pack(groups))  # another forward in between, as of an evaluation
    first.sum().backward(retain_graph=True)
    first.sum().backward()
    (4 * second.sum()).backward()  # twice the loss of `plain`, as the two backwards before
    weight = scorer.model.get_output_embeddings().weight
    torch.testing.assert_close(weight.grad / 2, plain.get_output_embeddings().weight.grad, atol=1e-4, rtol=1e-4)
    # Negative control: without the embedding's rows, the gradient is another.
    scorer.model.zero_grad()
    embedding = scorer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, ids, out: out.detach())
    scorer(pack(groups[:2])).answers.sum().backward()
    plain.zero_grad()
    oracle.answers_logps(plain, groups[:2]).sum().backward()
    off = (weight.grad - plain.get_output_embeddings().weight.grad).abs().amax(1)
    looked_up = np.unique(np.concatenate([part for group in groups[:2] for part in (group.prompt, *group.answers)]))
    assert off[looked_up[looked_up != 5]].median() > 1e-2 and off[5] < 1e-4


def test_a_tied_weight_has_one_gradient_at_a_time():
    """The embedding's rows are added to the head's gradient. There is no second one."""
    config = LlamaConfig(**{**tiny.TIED, "vocab_size": 50_000, "num_hidden_layers": 1})
    with torch.device("meta"):
        sizes_only = attention.implementation(attention.SIZES_ONLY)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=sizes_only)
        scorer = Scorer(model, budget=LogitBudget(2**20))
    with LiveBytes([*scorer.parameters(), *scorer.buffers()]) as live:
        scorer(pack(random_groups()).to("meta")).answers.sum().backward()
    gradient, tile = 4 * 50_000 * tiny.COMMON["hidden_size"], 4 * 2**20
    assert gradient < live.peak < 1.5 * gradient + tile
