"""What an editor shows of a name: its signature, its shapes, and what it is for.

    python -m pytest -n0 tests/typed/test_hover.py

Asks pyright's language server, over its standard input and output.
"""

import ast
import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from exports import CLASSES, EXPORTS, FAMILIES, FUNCTIONS, definition, first_line, members, shaped

import termwise

ROOT = Path(__file__).parents[2]
FILE = (Path(__file__).parent / "hovered.py").as_uri()  # never on the disk
SECONDS = 120
FIELDS = [
    (name, field)
    for name in CLASSES
    if issubclass(EXPORTS[name], termwise.Terms)
    for field in members(definition(name))
    if field in EXPORTS[name].__annotations__
]
NAMES = [*FUNCTIONS, *CLASSES, *(f"{name}.{field}" for name, field in FIELDS)]
SOURCE = [
    f"from termwise import {', '.join(FAMILIES)}".replace("termwise,", "", 1),
    "import termwise",
    "from torch import Tensor",
    *NAMES,
    "def uses(z: Tensor) -> None:",
    "    loss_fn = joint_embedding.VICRegLoss()",
    "    terms = loss_fn(z, z)",
    "    similar = terms.sim",
]


class Server:
    """One session of the language server."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.asked = 0

    def send(self, **message: object) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self.process.stdin.flush()

    def receive(self) -> dict:
        length = None
        while line := self.process.stdout.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name == b"Content-Length" else length
        assert length is not None, f"the server ended, or was ended after {SECONDS} s"
        return json.loads(self.process.stdout.read(length))

    def ask(self, method: str, **params: object) -> object:
        self.asked += 1
        self.send(id=self.asked, method=method, params=params)
        while (message := self.receive()).get("id") != self.asked or "method" in message:
            if "id" in message:  # the server asks too: for settings, of which we have none
                items = message.get("params", {}).get("items", [])
                self.send(id=message["id"], result=[None for _ in items])
        return message["result"]

    def hover(self, line: int, column: int) -> str:
        position = {"line": line, "character": column}
        shown = self.ask("textDocument/hover", textDocument={"uri": FILE}, position=position)
        return shown["contents"]["value"]


@pytest.fixture(scope="module")
def server():
    command = ["pyright-langserver", "--stdio"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
    # The command starts another one, which does the work: both are of one group.
    limit = threading.Timer(SECONDS, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    try:
        running = Server(process)
        running.ask(
            "initialize",
            processId=os.getpid(),
            rootUri=ROOT.as_uri(),
            workspaceFolders=[{"uri": ROOT.as_uri(), "name": "termwise"}],
            capabilities={"textDocument": {"hover": {"contentFormat": ["plaintext"]}}},
        )
        running.send(method="initialized", params={})
        text = "\n".join(SOURCE)
        document = {"uri": FILE, "languageId": "python", "version": 1, "text": text}
        running.send(method="textDocument/didOpen", params={"textDocument": document})
        yield running
    finally:
        limit.cancel()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def hover(server: Server, line: str) -> str:
    """Return what is shown of the last name in a line."""
    return server.hover(SOURCE.index(line), re.search(r"\w+$", line).start())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_shows_its_signature_its_shapes_and_its_first_line(server, name):
    shown, function = hover(server, name), definition(name)
    assert f"def {function.name}(" in shown
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        assert f" {argument.arg}: " in shown or f"({argument.arg}: " in shown
        if shape := shaped(argument.annotation):
            assert f"{argument.arg} ({shape}): " in shown
    if isinstance(function.returns, ast.Name):
        # Of a type variable Pyright says whose it is.
        assert re.search(rf"-> {function.returns.id}(@{function.name})?\n", shown)
    assert shaped(function.returns) in shown
    assert f"\n{first_line(ast.get_docstring(function))}\n" in f"{shown}\n"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_shows_its_first_line(server, name):
    shown = hover(server, name)
    assert shown.startswith(f"class {EXPORTS[name].__name__}")
    assert first_line(ast.get_docstring(definition(name))) in shown


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_field_shows_its_type_and_its_docstring(server, name, field):
    shown = hover(server, f"{name}.{field}")
    assert f"{field}: Tensor" in shown
    assert first_line(members(definition(name))[field]) in shown


def test_the_call_of_a_module_shows_its_record(server):
    line = SOURCE.index("    terms = loss_fn(z, z)")
    assert "terms: VICRegTerms" in server.hover(line, 4)
    assert "similar: Tensor" in server.hover(line + 1, 4)
