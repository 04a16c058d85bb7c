"""Policy and reference as DeepSpeed engines: the only file that calls deepspeed.initialize.

Models load partitioned under ZeRO-3 (transformers does it while an HfDeepSpeedConfig is alive), never whole on every
rank. Dropout is off: policy and reference must be one function of the tokens.
"""

import contextlib
import ctypes
import gc
import io
import shutil
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from dpo_ds import world
from dpo_ds.config import Options
from dpo_ds.lora import add_lora
from dpo_ds.models import torch_dtype
from dpo_ds.scoring import attention
from dpo_ds.scoring.packed import PackedBatch
from dpo_ds.scoring.scorer import PairScorer
from dpo_ds.tiers import reference_config, swap_folders

FIRST_PARAMETER_ID = 1_000_000  # far above a reference's, which may be alive beside the policy


class Engine:
    """A DeepSpeed engine that scores packed batches and, if it is a policy's, learns from them."""

    def __init__(self, engine, config: dict | None = None):
        self.deepspeed = engine
        self.swap_folders = swap_folders(config or {})

    @property
    def device(self) -> torch.device:
        return torch.device(self.deepspeed.device)

    @property
    def model(self):
        """The transformers model, or peft's wrapper of it."""
        return self.deepspeed.module.model

    def __call__(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """logps [B, 2] with a graph, to be followed by `backward`; and the router's loss [B], where a run wants it."""
        found = self.deepspeed(batch.to(self.device))
        return found if isinstance(found, tuple) else (found, None)

    def score(self, batch: PackedBatch) -> torch.Tensor:
        """logps [B, 2] without a graph. Under ZeRO-3 a policy must have been through `backward` once before."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                return self.deepspeed(batch.to(self.device))
        finally:
            self.deepspeed.train()

    def score_base(self, batch: PackedBatch) -> torch.Tensor:
        """logps [B, 2] of LoRA's base weights: the adapters are scaled to 0, which keeps ZeRO-3's trace (unlike
        disable_adapter, which invalidates it at every switch)."""
        layers = [(module, dict(module.scaling)) for module in self.model.modules() if hasattr(module, "lora_A")]
        for module, scaling in layers:
            module.scaling = dict.fromkeys(scaling, 0.0)
        try:
            return self.score(batch)
        finally:
            for module, scaling in layers:
                module.scaling = scaling

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the loss's gradients to the step's; `last` says that `step` comes next."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def step(self) -> tuple[torch.Tensor, bool]:
        """Applies the step's gradients. Returns their norm before clipping, fp32 on some device, and whether the step
        was applied (not if they overflowed)."""
        norm = None
        if isinstance(self.deepspeed.optimizer, torch.optim.Optimizer):  # stage 0 in fp32: DeepSpeed keeps no norm
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(norm, dtype=torch.float32), self.deepspeed.was_step_applied()

    @property
    def learning_rate(self) -> float:
        return self.deepspeed.get_lr()[0]

    def close(self) -> None:
        """Gives the engine's memory back, to the allocator and from there to the machine."""
        engine, self.deepspeed = self.deepspeed, None
        optimizer, parameters = engine.optimizer, list(engine.module.parameters())
        engine.destroy()
        free_swap_buffers(parameters)
        # ZeRO's hooks and groups form cycles with all they hold, and some outlive the engine: empty the holders.
        for holder in (optimizer, getattr(engine, "basic_optimizer", None)):
            if holder is not None:
                vars(holder).clear()
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype)
            parameter.grad = None
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor = None
        del engine, optimizer, parameters
        clear_swap_folders(self.swap_folders)
        release_memory()


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps freed blocks for itself otherwise
    except OSError:
        pass


def free_swap_buffers(parameters: list) -> None:
    """DeepSpeed locks the buffers through which parameters come from NVMe in memory, and never gives them back."""
    for swapper in {id(s): s for p in parameters if (s := getattr(p, "nvme_swapper", None))}.values():
        swapper.synchronize_writes()
        for handle, buffer in (
            (swapper.aio_read_handle, swapper.buffers),
            (swapper.aio_write_handle, swapper.partitioned_swap_buffer),
        ):
            if buffer is not None:
                handle.free_cpu_locked_tensor(buffer)
        swapper.buffers = swapper.partitioned_swap_buffer = swapper.partitioned_swap_pool = None


def clear_swap_folders(folders: list[Path]) -> None:
    """Removes what an engine, or an earlier start's, wrote to NVMe; by all ranks together. DeepSpeed leaves its files
    behind, and would copy an earlier engine's into each checkpoint."""
    if not folders:
        return
    world.wait_for_all()  # no rank is using its files any more
    if world.from_environment().local_rank == 0:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: the run's other engine is in it
                folder.parent.rmdir()
    world.wait_for_all()  # before any rank makes its folders anew


def policy_engine(folder: Path, config: dict, options: Options, kernel: str, total_steps: int) -> Engine:
    """The model to train: all its weights, or LoRA adapters on frozen ones. `kernel` is attention's."""
    clear_swap_folders(swap_folders(config))
    # Swap files are named by these numbers: a policy's must be the same after a resume, whether or not a reference's
    # engine came before it.
    deepspeed.zero.Init.param_id = FIRST_PARAMETER_ID
    model = _load(folder, config, options, kernel)
    if options.lora:
        model = add_lora(model, options)
    if options.gradient_checkpointing == "on":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    scorer = PairScorer(model, balance=float(options.router_aux_loss_coef) > 0)
    engine = _initialize(
        model=scorer,
        model_parameters=_parameter_groups(scorer, options.weight_decay),
        config=config,
        lr_scheduler=lambda optimizer: get_scheduler(
            {"constant": "constant_with_warmup"}.get(options.lr_scheduler, options.lr_scheduler),
            optimizer,
            num_warmup_steps=round(options.warmup_ratio * total_steps),
            num_training_steps=total_steps,
        ),
    )
    if config["zero_optimization"]["stage"] == 0:
        if options.precision == "bf16":
            _forget_first_step(engine.basic_optimizer)
        # A rank alone has nobody to average its gradients with; DeepSpeed would lay them end to end and copy them back.
        engine.enable_backward_allreduce = world.from_environment().size > 1
    return Engine(engine, config)


def _initialize(**arguments):
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints memory tables while it builds engines
        engine, *_ = deepspeed.initialize(**arguments)
    return engine


def _forget_first_step(optimizer) -> None:
    """DeepSpeed's bf16 optimizer at stage 0 allocates Adam's state by a step with zero gradients, and leaves it
    counted: the first real update would come out at 0.74 of its size."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)  # FusedAdam counts here


def reference_engine(folder: Path, config: dict, options: Options, kernel: str) -> Engine:
    """The frozen model that DPO measures against, without an optimizer. `config` is the policy's."""
    config = reference_config(config)
    clear_swap_folders(swap_folders(config))
    model = _load(folder, config, options, kernel)
    model.requires_grad_(False)
    return Engine(_initialize(model=PairScorer(model), config=config), config)


def _load(folder: Path, config: dict, options: Options, kernel: str):
    # transformers looks for this object while it loads, and partitions under stage 3; it holds only a weak reference.
    alive = HfDeepSpeedConfig(config)
    if config["zero_optimization"]["stage"] != 3:
        unset_hf_deepspeed_config()
    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch_dtype(options.precision),
        attn_implementation=attention.implementation(kernel),
        trust_remote_code=options.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    del alive
    unset_hf_deepspeed_config()
    unfit = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
    if unfit:  # transformers has given them random values
        raise world.RunStopped(
            f"{folder}: {len(unfit)} tensors that its config.json asks for are not in its weights, or have another "
            f"shape, {unfit[0]} among them: config and weights are not of one model"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def _parameter_groups(scorer: PairScorer, weight_decay: float) -> list[dict]:
    """Trainable parameters; with weight decay, biases and norms (one dimension) in a group without it."""
    trained = [p for p in scorer.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": trained}]
    # Under ZeRO-3 a parameter is an empty placeholder: its real shape is in ds_shape.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
