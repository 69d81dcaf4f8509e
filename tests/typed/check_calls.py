"""Check what pyright and mypy say of calls: right ones have their types, wrong ones their errors.

    python tests/typed/check_calls.py

Those of calls.py are written from signatures, anew at each run; those in wrong/ by hand. A wrong
line ends in `# error: <rule>: <a part of the message>`. What pyright lets pass, what it reports for
another reason, and what it reports on a line without a mark are all failures.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import calls

ROOT = Path(__file__).parents[2]
BY_HAND = Path(__file__).parent / "wrong"
MARK = re.compile(r"# error: (?P<rule>\w+): (?P<text>.+)$")
CONFIG = {
    "include": ["."],
    "extraPaths": [str(ROOT / "src")],
    "stubPath": str(ROOT / "typings"),
    "pythonVersion": "3.11",
}


def pyright(folder: Path, mode: str) -> list[dict]:
    """Return what pyright says of the files of a folder."""
    (folder / "pyrightconfig.json").write_text(json.dumps({**CONFIG, "typeCheckingMode": mode}))
    command = ["pyright", "--outputjson", "--project", str(folder)]
    answer = subprocess.run(command, capture_output=True, check=False, cwd=folder).stdout
    return json.loads(answer)["generalDiagnostics"]


def problems_of_right_calls(folder: Path) -> list[str]:
    """Say what either checker finds in calls that are right."""
    for family in calls.families():
        (folder / f"right_{family}.py").write_text(calls.right(family))
    said = [
        f"{Path(one['file']).name}:{one['range']['start']['line'] + 1}: {one['message']}"
        for one in pyright(folder, "strict")
        if one.get("rule") != "reportUnusedImport"
    ]
    command = ["mypy", "--no-error-summary", "--config-file", str(ROOT / "pyproject.toml")]
    files = sorted(map(str, folder.glob("*.py")))
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    return [*said, *done.stdout.splitlines()]


def problems_of_wrong_calls(folder: Path) -> list[str]:
    """Say where what is marked and what is reported differ."""
    for path in BY_HAND.glob("*.py"):
        (folder / path.name).write_text(path.read_text())
    for family in calls.families():
        (folder / f"wrong_{family}.py").write_text(calls.wrong(family))
    wanted = {
        (path.name, number): (found["rule"], found["text"])
        for path in sorted(folder.glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (found := MARK.search(line))
    }
    found: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for one in pyright(folder, "basic"):
        place = Path(one["file"]).name, one["range"]["start"]["line"] + 1
        found.setdefault(place, []).append((one.get("rule", "syntax"), one["message"]))
    different = [
        f"{place[0]}:{place[1]}: wanted {rule}: {text}; got {found.get(place, 'nothing')}"
        for place, (rule, text) in wanted.items()
        if not any(rule == other and text in message for other, message in found.get(place, []))
    ]
    unmarked = [
        f"{place[0]}:{place[1]}: not marked, got {found[place]}"
        for place in found
        if place not in wanted
    ]
    print(f"{len(wanted)} wrong calls")
    return different + unmarked


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as right, tempfile.TemporaryDirectory() as wrong:
        lines = [*problems_of_right_calls(Path(right)), *problems_of_wrong_calls(Path(wrong))]
    print("\n".join(lines) or "each right call has its type, each wrong one is refused as it says")
    sys.exit(bool(lines))
