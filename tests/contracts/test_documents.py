"""The documents do what they print: every Python block of a page runs, in order, in one namespace, on the
CPU; every command exists, with its options. And they keep to the form of the house: width, and tables that
can be read."""

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDTH, WORDS = 110, 25
NEEDS_GPU = "# needs a GPU"  # the first line of a block that cannot run here: the reader sees it too
COMMANDS = r"`((?:\w+=\S+ )*(?:make|python|pytest|reward-forcing) [^`]+)`"  # within a line or a table


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """(first line, text) of every fenced block of a language."""
    text = path.read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
        yield text[: found.start(1)].count("\n") + 1, found.group(1)


def with_python():
    return [path for path in PAGES if any(blocks(path, "python"))]


@pytest.mark.parametrize("path", with_python(), ids=name)
def test_python_of_a_page_runs_as_printed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    torch.manual_seed(0)
    for line, text in blocks(path, "python"):
        # a traceback then names the line of the page
        code = compile("\n" * (line - 1) + text, name(path), "exec")
        if not text.startswith(NEEDS_GPU) or torch.cuda.is_available():
            exec(code, namespace)


def test_the_blocks_that_need_a_gpu_are_few():
    texts = [text for path in PAGES for _, text in blocks(path, "python")]
    assert len(texts) >= 8 and sum(text.startswith(NEEDS_GPU) for text in texts) <= 3


def test_every_python_block_is_marked_as_one():
    """An indented block is a formula or a drawing; code that no test runs would rot there."""
    wrong = [
        f"{name(path)}: {line.strip()}"
        for path in PAGES
        for line in path.read_text().splitlines()
        if re.match(r"    .*\b(import \w|rf\.\w+\(|torch\.\w+\(|cache\.\w+\()", line)
        if line not in "\n".join(text for _, text in blocks(path, "python")).splitlines()
    ]
    assert not wrong


def commands():
    """(page, command) of every shell block, and of all code within a line that is a command of ours."""
    for path in PAGES:
        shell = "\n".join(text for _, text in blocks(path, "sh")).replace("\\\n", " ")
        inline = re.findall(COMMANDS, path.read_text())
        for line in [*shell.splitlines(), *inline]:
            if words := shlex.split(line, comments=True):
                yield path, words


@functools.cache
def help_of(*command):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    arguments = [sys.executable, *command, "--help"]
    run = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{command}: {run.stderr}"
    return run.stdout


def knows(entry, option):
    """Whether a program has an option: its source says so, or else its help (which takes seconds)."""
    if entry[0] == "-m":
        spec = importlib.util.find_spec(entry[1])
        files = [
            Path(spec.origin),
            *(Path(folder) / "__main__.py" for folder in spec.submodule_search_locations or ()),
        ]
    else:
        files = [ROOT / entry[0]]
    pattern = re.compile(rf"{option}(?![\w-])")
    return any(f'"{option}"' in f.read_text() for f in files if f.is_file()) or bool(
        pattern.search(help_of(*entry))
    )


def fault(words):
    """What is wrong with a command, or None."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        return next((f"no target {word}" for word in rest if "=" not in word and word not in targets), None)
    if program == "reward-forcing":
        program, rest = "python", ["-m", "reward_forcing.cli", *rest]
    if program == "torchrun":
        program, rest = "python", rest[rest.index("-m") :]
    if program == "python" and rest[:2] == ["-m", "pytest"]:
        program, rest = "pytest", rest[2:]
    if program == "pytest":
        paths = [word for word in rest if word.startswith("tests")]
        return next((f"no file {word}" for word in paths if not (ROOT / word.split("::")[0]).exists()), None)
    if program == "python" and rest[:1] == ["-m"]:
        if rest[1].split(".")[0] not in ("rf_kernels", "reward_forcing", "benchmarks"):
            return None if importlib.util.find_spec(rest[1]) else f"no module {rest[1]}"
        subcommand = rest[2:3] if rest[1] == "reward_forcing.cli" else []
        entry, rest = ["-m", rest[1], *subcommand], rest[2 + len(subcommand) :]
    elif program == "python":
        if not (ROOT / rest[0]).is_file():
            return f"no file {rest[0]}"
        entry, rest = rest[:1], rest[1:]
    else:
        return None if program in ("pip", "git", "cd", ".") else f"unknown program {program}"
    options = [word.partition("=")[0] for word in rest if word.startswith("--")]
    unknown = [option for option in options if not knows(entry, option)]
    return f"no option {unknown}" if unknown else None


def test_every_command_exists():
    found = list(commands())
    wrong = [f"{name(path)}: {' '.join(words)}: {why}" for path, words in found if (why := fault(words))]
    assert len(found) > 30 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    ["make tset", "pytest tests/none.py", "python -m rf_kernels.doctor --jsn", "python none.py", "mkae test"],
)
def test_a_wrong_command_is_noticed(command):
    assert fault(command.split())


def headings(path):
    """The anchors of a page, as a renderer forms them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path, text):
    """Links of a page that lead nowhere in the repository."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if "://" not in link and not (target.exists() and (not anchor or anchor in headings(target))):
            yield f"{name(path)}: {link}"


def test_links_lead_somewhere():
    assert not [fault for path in PAGES for fault in broken_links(path, path.read_text())]
    wrong = "[a](none.md) [b](docs/cache.md#none) [c](docs/cache.md#how-it-works) [d](https://e.org/f)"
    assert len(list(broken_links(ROOT / "README.md", wrong))) == 2


def listed():
    """Documents that git knows, or that lie there when this is no checkout."""
    run = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    found = [ROOT / line for line in run.stdout.splitlines()] if run.returncode == 0 else ROOT.rglob("*")
    return sorted(
        path
        for path in found
        if path.suffix in (".md", ".rst") and path.is_file() and ".venv" not in path.parts
    )


def faults_of_form(text):
    """Lines that are too wide (tables and URLs apart), cells with too many words."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            yield from (f"{number}: {len(cell.split())} words" for cell in cells if len(cell.split()) > WORDS)
        elif len(line) > WIDTH and "://" not in line:
            yield f"{number}: {len(line)} columns"


def test_documents_are_wrapped_and_tables_can_be_read():
    wrong = [f"{name(path)}:{fault}" for path in listed() for fault in faults_of_form(path.read_text())]
    assert len(listed()) > 15 and not wrong, "\n".join(wrong)


def test_a_wide_line_and_a_full_cell_are_noticed():
    assert (
        len(
            list(faults_of_form(f"{'w' * 111}\n| a | {'word ' * 26} |\n| {'w' * 120} |\nhttps://{'u' * 120}"))
        )
        == 2
    )


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
