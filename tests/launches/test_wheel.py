"""The package as a user gets it: a wheel, installed by pip into a fresh environment and used from elsewhere.

DeepSpeed is installed there too, for its commands. The other libraries are those of the tests' own environment, which
launch/setup.sh has installed by the same list. It needs a package registry.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import launching
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
VERSION = re.search(r'__version__ = "(.+)"', (CHECKOUT / "dpo_ds/__init__.py").read_text()).group(1)
(DEEPSPEED,) = re.findall(r"^deepspeed==.+$", (CHECKOUT / "constraints.txt").read_text(), re.M)

# Nothing of the checkout, and bytecode as a user has it.
HIDDEN = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in HIDDEN}

RANK_MODULE = """
import json, os, pathlib, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
ranks = torch.tensor([float(dist.get_rank())])
dist.all_reduce(ranks)
seen = {"argv": sys.argv[1:], "name": __name__, "world": dist.get_world_size(), "sum": ranks.item()}
pathlib.Path(os.environ["SEEN"], f"{dist.get_rank()}.json").write_text(json.dumps(seen))
dist.destroy_process_group()
"""

LOOK_AROUND = """
import json, sys
import dpo_ds
from dpo_ds.resources import tier_files

light = not {"torch", "deepspeed", "transformers", "numpy"} & set(sys.modules)
tiers = {name: json.loads(path.read_text()) for name, path in tier_files().items()}
folder = str({path.parent for path in tier_files().values()}.pop())
print(json.dumps([light, dpo_ds.__file__, dpo_ds.__version__, folder, tiers]))
"""


@dataclass
class Installed:
    """A fresh environment, what was built for it, and an empty folder to use it from."""

    root: Path

    def __post_init__(self) -> None:
        self.source, self.dist = self.root / "source", self.root / "dist"
        self.venv, self.away = self.root / "venv", self.root / "away"
        self.bin = self.venv / "bin"

    @property
    def wheel(self) -> Path:
        (wheel,) = self.dist.glob("*.whl")
        return wheel

    def run(self, script: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's commands in the empty folder."""
        return subprocess.run(
            [self.bin / script, *arguments],
            cwd=self.away,
            env={**ENVIRONMENT, **variables},
            capture_output=True,
            text=True,
            timeout=900,
        )

    def pip(self, command: str, *arguments: str | Path) -> None:
        """Run pip. Where no registry answers, the test is skipped; in CI, which must have one, it fails."""
        done = self.run("pip", command, *arguments)
        if done.returncode == 0:
            return
        output = done.stdout + done.stderr
        reason = next((line.strip() for line in output.splitlines() if "ERROR:" in line), output[-500:])
        if "connection broken" in output and not os.environ.get("CI"):
            pytest.skip(f"pip reaches no package registry: {reason}")
        pytest.fail(f"pip {command} failed: {reason}\n{output[-3000:]}")

    def look_around(self) -> tuple[bool, Path, str, Path, dict[str, dict]]:
        """What `import dpo_ds` finds: (no torch with it, its file, its version, the tiers' folder, tiers)."""
        done = self.run("python", "-c", LOOK_AROUND)
        assert done.returncode == 0, done.stderr
        light, file, version, folder, tiers = json.loads(done.stdout)
        return light, Path(file), version, Path(folder), tiers


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    made = Installed(tmp_path_factory.mktemp("wheel"))
    try:
        made.away.mkdir()
        copy_source(made.source)
        subprocess.run([sys.executable, "-m", "venv", made.venv], check=True, env=ENVIRONMENT)
        (packages,) = made.venv.glob("lib/python*/site-packages")
        (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
        made.pip("wheel", "--no-deps", "--wheel-dir", made.dist, made.source)
        # In the order of dependence, as pip installs them: both have a command `deepspeed`.
        for package in (DEEPSPEED, made.wheel):
            made.pip("install", "--no-deps", "--ignore-installed", package)
        yield made
    finally:
        shutil.rmtree(made.root)  # pytest would keep three of them


def copy_source(to: Path) -> None:
    """What packaging reads. pip builds in place and leaves build/, whose stale files enter the next wheel."""
    to.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (CHECKOUT / name).exists():
            shutil.copy(CHECKOUT / name, to)
    for name in ("dpo_ds", "ds_configs"):
        shutil.copytree(CHECKOUT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))


def checkout_tiers() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (CHECKOUT / "ds_configs").glob("*.json")}


def test_wheel_holds_every_module_and_data_file(installed: Installed) -> None:
    package = installed.source / "dpo_ds"
    modules = {*package.rglob("*.py")} | {path for path in package.glob("embedded/**/*") if path.is_file()}
    expected = {str(path.relative_to(installed.source)) for path in modules}
    expected.add("dpo_ds/model_shapes.json")
    expected |= {f"dpo_ds/ds_configs/{name}.json" for name in checkout_tiers()}
    held = {name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_its_requirements_are_those_that_are_installed(installed: Installed) -> None:
    done = installed.run("pip", "check")
    assert done.returncode in (0, 1), done.stderr
    assert not [line for line in done.stdout.splitlines() if line.startswith("dpo_ds ")], done.stdout


def test_import_is_light_and_finds_the_tiers(installed: Installed) -> None:
    light, file, version, folder, tiers = installed.look_around()
    assert light
    assert file.is_relative_to(installed.venv)
    assert folder.is_relative_to(installed.venv)
    assert version == VERSION
    assert tiers == checkout_tiers() != {}


def test_deepspeed_m_runs_two_ranks(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package/rank.py").write_text(RANK_MODULE)
    own = ["--model", "X", "-m", "x", "--num_gpus", "3", "two words", "", "--help"]
    launcher = ["--num_gpus", "2", "--master_port", str(launching.free_port())]
    places = {"PYTHONPATH": str(tmp_path), "SEEN": str(tmp_path)}
    done = installed.run("deepspeed", *launcher, "-m", "some_package.rank", *own, **places)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        argv = [f"--local_rank={rank}", *own]  # DeepSpeed's launcher puts the first one there
        assert seen == {"argv": argv, "name": "__main__", "world": 2, "sum": 1.0}


def test_help_and_report_are_deepspeeds(installed: Installed) -> None:
    upstream = "import sys; sys.argv[0] = 'deepspeed'; from deepspeed.launcher import runner; runner.main()"
    printed = []
    for done in (installed.run("deepspeed", "--help"), installed.run("python", "-c", upstream, "--help")):
        assert done.returncode == 0, done.stderr
        # Above the usage, DeepSpeed may tell the time and which accelerator it found.
        printed.append(done.stdout[done.stdout.index("usage: deepspeed ") :])
    assert printed[0] == printed[1]
    report = installed.run("ds_report")
    assert report.returncode == 0, report.stdout + report.stderr


def test_editable_install_then_removal(installed: Installed) -> None:
    """Last, for it takes the wheel out again."""
    installed.pip("install", "--no-deps", "--editable", installed.source)
    light, file, _, folder, tiers = installed.look_around()
    assert light
    assert file == installed.source / "dpo_ds/__init__.py"
    assert folder == installed.source / "ds_configs"
    assert tiers == checkout_tiers()

    script = installed.bin / "deepspeed"
    assert "dpo_ds" in script.read_text()
    installed.pip("uninstall", "--yes", "dpo_ds")
    assert not script.exists()
    installed.pip("install", "--force-reinstall", "--no-deps", DEEPSPEED)
    assert "deepspeed.launcher.runner" in script.read_text()
