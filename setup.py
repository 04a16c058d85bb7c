"""Packaging. `pip install .` or `pip install -e '.[test]'`; `pip wheel --no-deps .` makes the wheel.

constraints.txt names the one set of versions that the tests run with; the ranges below are what should work.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# Read as text: importing the package to be built would need what it depends on.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "dpo_ds/__init__.py").read_text(), re.M).group(1)
README = ROOT / "README.md"

setup(
    name="dpo_ds",
    version=VERSION,
    description="Direct preference optimisation of language models, from GPT-2 to 70B, on DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The tiers lie at the checkout's top, where a user looks for them, and travel inside the package.
    packages=[*find_packages(include=["dpo_ds", "dpo_ds.*"]), "dpo_ds.ds_configs"],
    package_dir={"dpo_ds.ds_configs": "ds_configs"},
    package_data={
        "dpo_ds": ["model_shapes.json"]
        + [f"embedded/**/*.{kind}" for kind in ("json", "jsonl.gz", "safetensors", "txt", "md")],
        "dpo_ds.ds_configs": ["*.json"],
    },
    # pip installs dependencies first, so this takes the place of DeepSpeed's script (deepspeed_command.py).
    entry_points={"console_scripts": ["deepspeed = dpo_ds.deepspeed_command:main"]},
    install_requires=[
        "torch>=2.11,<3",
        "deepspeed>=0.19,<1",
        "transformers>=5.10,<6",
        "datasets>=4.0,<6",
        "peft>=0.18,<1",
        "huggingface_hub>=1.5,<3",
        "safetensors>=0.6,<1",
        "numpy>=2.0,<3",
        "rich>=13,<16",
        "pyyaml>=6.0,<7",
        "tqdm>=4.66,<5",
        "matplotlib>=3.8,<4",  # curves.png, and the histograms of python -m dpo_ds.data
        "packaging>=23",
        "filelock>=3.13",
        "xxhash>=3.2",
        "ninja>=1.11",  # DeepSpeed builds CPUAdam and its I/O library on first use
    ],
    extras_require={
        "flash": ["flash-attn>=2.7,<3"],
        "fa3": ["kernels>=0.17,<1"],  # flash-attention 3 on Hopper, from the hub
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "psutil>=5.9",
            "ruff>=0.9",
            "mypy>=1.18",
            "build>=1.2",
            "wheel>=0.43",
        ],
        "bench": ["trl>=1.16,<2"],
        # --report_to
        "tensorboard": ["tensorboard>=2.16,<3"],
        "wandb": ["wandb>=0.19,<1"],
        "mlflow": ["mlflow>=2.14,<4"],
        "trackio": ["trackio>=0.20,<1"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
