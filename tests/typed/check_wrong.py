"""Compare what pyright says of the wrong calls in wrong/ with what each line says it should.

    python tests/typed/check_wrong.py

A wrong line ends in `# error: <rule>: <a part of the message>`. What pyright lets pass, what it
reports for another reason, and what it reports on a line without a mark are all failures.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "wrong"
MARK = re.compile(r"# error: (?P<rule>\w+): (?P<text>.+)$")


def expected() -> dict[tuple[str, int], tuple[str, str]]:
    """Read the rule and the text that each marked line wants."""
    return {
        (path.name, number): (found["rule"], found["text"])
        for path in sorted(FOLDER.glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (found := MARK.search(line))
    }


def reported() -> dict[tuple[str, int], list[tuple[str, str]]]:
    """Ask pyright."""
    command = ["pyright", "--outputjson", "--project", str(FOLDER / "pyrightconfig.json")]
    answer = json.loads(subprocess.run(command, capture_output=True, check=False).stdout)
    found: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for one in answer["generalDiagnostics"]:
        place = Path(one["file"]).name, one["range"]["start"]["line"] + 1
        found.setdefault(place, []).append((one.get("rule", "syntax"), one["message"]))
    return found


def problems() -> list[str]:
    """Say where the two differ."""
    wanted, found = expected(), reported()
    if not wanted:
        return [f"no line of {FOLDER} is marked"]
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
    return different + unmarked


if __name__ == "__main__":
    lines = problems()
    print("\n".join(lines) or f"{len(expected())} wrong calls, each refused for its reason")
    sys.exit(bool(lines))
