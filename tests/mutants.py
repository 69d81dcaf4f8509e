"""Plant faults in the losses, one at a time, and print those that no test finds.

    python tests/mutants.py [--family sae] [--file _gated.py] [--n 60] [--seed 0]

A fault is an operator, a constant, an axis, a reduction, a sign or a detach that is another one, at
a random place of src. Run are the tests of its file: tests/<family>/test_<file>.py, and the laws of
what the file's functions are declared to be; of a file that declares none, those of the files that
import it. A survivor is a test that is missing, or a change that changes nothing.
"""

import argparse
import ast
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/termwise"
FAMILIES = ("joint_embedding", "sae", "energy", "lm")
LAWS = (
    "tests/core/test_laws.py",
    "tests/core/test_every_loss.py",
    "tests/distributed/test_variants_over_ranks.py",
)
SECONDS = 600

OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Lt: "<=", ast.LtE: "<",
    ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.And: "or", ast.Or: "and",
}  # fmt: skip
WORDS = {
    "sum": "mean", "mean": "sum", "amax": "amin", "amin": "amax", "maximum": "minimum",
    "minimum": "maximum", "exp": "expm1", "log": "log1p", "square": "abs", "cumsum": "cumprod",
}  # fmt: skip
REDUCTIONS = {"sum", "mean", "amax", "amin", "softmax", "log_softmax", "logsumexp", "argmax"}
# What says nothing of a loss: a text, an annotation, an error and what leads to it.
SKIPPED = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.AnnAssign)

Change = tuple[int, int, str, str]
"""Where in the text it starts and ends, what stands there instead, and what kind it is."""
Place = tuple[Path, Change]


class Finder(ast.NodeVisitor):
    """Collects all changes of a file."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0]
        for line in text.encode().splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Change] = []
        self.visit(ast.parse(text))

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def change(self, node: ast.AST, instead: str, kind: str) -> None:
        start, end = self.at(node.lineno, node.col_offset), self.at(
            node.end_lineno, node.end_col_offset
        )  # fmt: skip
        self.found.append((start, end, instead, kind))

    def between(self, one: ast.AST, other: ast.AST, old: str, new: str) -> None:
        """Change the operator between two parts of an expression."""
        start = self.at(one.end_lineno, one.end_col_offset)
        end = self.at(other.lineno, other.col_offset)
        gap = self.text.encode()[start:end].decode()
        if found := re.search(rf"(?<![\w*/<>=!]){re.escape(old)}(?![\w*/<>=])", gap):
            place = start + len(gap[: found.start()].encode())
            self.found.append((place, place + len(old), new, "operator"))

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, SKIPPED):
            return
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body]:
            self.visit(part)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in node.body:
            self.visit(part)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if not all(isinstance(part, ast.Raise) for part in node.body):
            self.visit(node.test)
        for part in [*node.body, *node.orelse]:
            self.visit(part)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if new := OPERATORS.get(type(node.op)):
            old = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}[type(node.op)]
            self.between(node.left, node.right, old, new)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        old = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==",
               ast.NotEq: "!="}  # fmt: skip
        for op, right in zip(node.ops, node.comparators, strict=True):
            if type(op) in old:
                self.between(left, right, old[type(op)], OPERATORS[type(op)])
            left = right
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old = "and" if isinstance(node.op, ast.And) else "or"
        self.between(node.values[0], node.values[1], old, OPERATORS[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub | ast.Not):
            self.change(node, f"({ast.unparse(node.operand)})", "sign")
        if not isinstance(node.operand, ast.Constant):
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.change(node, str(not node.value), "constant")
        elif isinstance(node.value, int | float):
            self.change(
                node, repr(node.value + 1 if node.value == 0 else node.value * 2), "constant"
            )

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name == "detach":
            self.change(node, ast.unparse(node.func.value), "detach")
        if name in WORDS:
            end = self.at(node.func.end_lineno, node.func.end_col_offset)
            self.found.append((end - len(name), end, WORDS[name], "reduction"))
        axes = [key.value for key in node.keywords if key.arg == "dim"]
        if name in REDUCTIONS:
            axes += node.args[-1:]
        for axis in axes:
            if isinstance(axis, ast.Constant) and axis.value in (0, 1):
                self.change(axis, str(1 - axis.value), "axis")
        self.generic_visit(node)


def changes(path: Path) -> Iterator[Change]:
    """Yield what can be changed in a file, and is Python then."""
    text = path.read_text()
    for change in dict.fromkeys(Finder(text).found):
        try:
            ast.parse(changed(text, change))
        except SyntaxError:
            continue
        yield change


def changed(text: str, change: Change) -> str:
    start, end, instead, _ = change
    raw = text.encode()
    return (raw[:start] + instead.encode() + raw[end:]).decode()


def importers(path: Path) -> list[Path]:
    """List the files of a family that import this one, directly or through others, and itself."""
    imports = {
        other: {
            name
            for node in ast.parse(other.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.level == 1
            for name in ([node.module] if node.module else [alias.name for alias in node.names])
        }
        for other in path.parent.glob("_*.py")
    }
    found = [path]
    for one in found:  # which grows
        found += [o for o, names in imports.items() if one.stem in names and o not in found]
    return found


def tests_of(path: Path) -> tuple[list[str], list[str]]:
    """Return the test files of a source file, and the names of what it declares."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests/core")]
    from declared import DECLARED

    def of(paths: list[Path]) -> tuple[list[str], list[str]]:
        modules = {f"termwise.{one.parent.name}.{one.stem}" for one in paths}
        names = [name for name, one in DECLARED.items() if one.function.__module__ in modules]
        files = [
            str(file)
            for one in paths
            for file in sorted((ROOT / "tests" / one.parent.name).glob("test_*.py"))
            if one.stem.endswith(file.stem.removeprefix("test"))  # _vocab_projection: _projection
        ]
        return files, names

    files, names = of([path])
    if files and names:
        return files, names
    more_files, more_names = of(importers(path))
    return files or more_files, names or more_names


def killed(copy: Path, files: list[str], names: list[str]) -> bool:
    """Run the tests until one fails, on the copy of the sources."""
    laws = [*(str(ROOT / law) for law in LAWS), "-k", " or ".join(names)]
    for arguments in ([files] if files else []) + ([laws] if names else []):
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-pno:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
        if done.returncode not in (0, 5):  # 5: no test was there
            return True
    return False


def drawn(places: list[Place], n: int, chance: random.Random) -> list[Place]:
    """Draw places, as many of each kind as there are: most are constants."""
    of_kind: dict[str, list[Place]] = {}
    for place in chance.sample(places, len(places)):
        of_kind.setdefault(place[1][3], []).append(place)
    turns = itertools.zip_longest(*(of_kind[kind] for kind in sorted(of_kind)))
    return [place for turn in turns for place in turn if place][:n]


def main() -> int:
    """Plant the faults, and print each survivor."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--file", help="one file of the family, as _gated.py")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    families = [given.family] if given.family else FAMILIES
    paths = [path for family in families for path in sorted((SOURCE / family).glob("_[a-z]*.py"))]
    paths = [path for path in paths if given.file in (None, path.name)]
    places = [(path, change) for path in paths for change in changes(path)]
    chosen = drawn(places, given.n, random.Random(given.seed))
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(SOURCE, copy / "termwise")
        for number, (path, change) in enumerate(chosen, 1):
            text, target = path.read_text(), copy / "termwise" / path.relative_to(SOURCE)
            start, end, instead, kind = change
            line = text.encode()[:start].count(b"\n") + 1
            old = text.encode()[start:end].decode()
            target.write_text(changed(text, change))
            died = killed(copy, *tests_of(path))
            target.write_text(text)
            survivors += not died
            where = f"{path.relative_to(ROOT)}:{line}"
            source = text.splitlines()[line - 1].strip()
            print(
                f"{number}/{len(chosen)} {'killed' if died else 'SURVIVED'} {where} {kind}: "
                f"{' '.join(old.split())} -> {instead}" + ("" if died else f"\n    {source}"),
                flush=True,
            )
    print(f"{survivors} of {len(chosen)} survived")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
