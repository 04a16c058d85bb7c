"""The forms of an optimizer on the host, under ZeRO-3: where its gradients are. gradients.py has their code.

DeepSpeed's own offload holds each gradient twice on the host: summed over the micro-batches, and as Adam's own in fp32.
Sums go to the host and back with every micro-batch. The others hold them once, and every weight gets the same bits.
Host bytes a parameter:

    gpu, gpu_bf16   12: masters and moments. Gradients are summed on the GPU, in fp32 or bf16. In the step they pass
                    through two blocks on the host, a sub-group at a time.
    host            16: the fp32 sums are Adam's gradients.
    deepspeed       20, or 18 with bf16 sums: its own.
"""

from importlib.metadata import version

GPU, GPU_BF16, HOST, OWN = "gpu", "gpu_bf16", "host", "deepspeed"
KNOWN = ("0.19.8",)  # versions of DeepSpeed whose methods gradients.py replaces; they are not public
# Options with optimizers of their own: of offload_optimizer and of zero_optimization.
OTHERS = ("super_offload", "zenflow")


def known() -> bool:
    """Whether the installed DeepSpeed is one whose optimizer gradients.py knows."""
    return version("deepspeed").partition("+")[0] in KNOWN


def on_host(config: dict) -> bool:
    """Whether a filled config has an optimizer that can have these forms: ZeRO-3's, on the host."""
    zero = config["zero_optimization"]
    offload = zero.get("offload_optimizer") or {}
    others = any(section.get(key) for key in OTHERS for section in (zero, offload))
    return zero["stage"] == 3 and offload.get("device") == "cpu" and not others
