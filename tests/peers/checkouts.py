"""The peers that are called from checkouts of their code: lejepa, DINOv2, DINOv3 and solo-learn.

The first three are on no package index; the solo-learn on PyPI is of 2021.

In a folder of your choice, once (they need nothing that the peers' environment has not):

    export TERMWISE_CHECKOUTS="$HOME/checkouts"
    python tests/peers/checkouts.py | sh

The script prints the `git clone` and `git checkout` of the commits below. Without the variable
the tests of these peers are skipped; with it, a run is refused where a checkout is missing or has
another commit. Their licences are their own, that of lejepa for non-commercial use; the tests call
their code, and none of it is here.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

COMMITS = {
    "lejepa": ("rbalestr-lab", "eddffdd857a19726342ef6526e01021fb3c32cae"),
    "dinov2": ("facebookresearch", "b8931f7bf91576930313be2c6d6af376033b35f0"),
    "dinov3": ("facebookresearch", "6876159a11b4df116f30f667f8c9888617df0751"),
    "solo-learn": ("vturrisi", "9187ea39c2c3f43c455ab06664d2b019a9802954"),
}
FOLDER = os.environ.get("TERMWISE_CHECKOUTS")


def commands() -> list[str]:
    """Return what makes the checkouts, a line for each."""
    return [
        f'git clone https://github.com/{owner}/{name} "$TERMWISE_CHECKOUTS/{name}" && '
        f'git -C "$TERMWISE_CHECKOUTS/{name}" checkout {commit}'
        for name, (owner, commit) in COMMITS.items()
    ]


def wrong() -> list[str]:
    """Return a sentence for each checkout that is missing, changed or at another commit."""
    if FOLDER is None:
        return []
    found = []
    for name, (_, commit) in COMMITS.items():
        git = ["git", "-C", f"{FOLDER}/{name}"]
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        is_at = (said.stdout or said.stderr).strip()
        if is_at != commit:
            found.append(f"{FOLDER}/{name} is not at {commit}: {is_at}")
    return found


def load(module: str) -> ModuleType:
    """Import a module of a checkout, or skip the tests of the file that asks for it."""
    if FOLDER is None:
        import pytest  # which the ranks do without

        pytest.skip(
            f"{module} is called from a checkout: set TERMWISE_CHECKOUTS to a folder and run "
            "`python tests/peers/checkouts.py | sh`",
            allow_module_level=True,
        )
    package = module.partition(".")[0]
    if package == "solo":  # without its __init__.py, which overwrites models of timm
        sys.modules.setdefault(package, ModuleType(package)).__path__ = [
            f"{FOLDER}/solo-learn/solo"
        ]
    elif (path := str(Path(FOLDER) / package)) not in sys.path:
        sys.path.append(path)
    return importlib.import_module(module)


def read(name: str, path: str) -> str:
    """Return the text of a file of a checkout."""
    return (Path(FOLDER or "") / name / path).read_text()


if __name__ == "__main__":
    print("\n".join(commands()))
