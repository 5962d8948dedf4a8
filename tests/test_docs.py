"""The documentation is true: snippets run, commands, files and links exist, the API reference is current."""

import re
import runpy
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin
from typer.testing import CliRunner

import llamagen_cli
from llamagen_cli import stages


ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "spaces/**/*.md", "src/**/README.md")
PAGES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
PROSE = [path for path in PAGES if path.parent.name != "api"]
# Pages whose snippets are run, with the least number of Python blocks, so that none is skipped unnoticed.
RUNNABLE = {
    ROOT / "docs" / "quick_start.md": 6,
    ROOT / "docs" / "how_it_works.md": 6,
    ROOT / "docs" / "evaluation.md": 2,
    ROOT / "docs" / "cascade.md": 6,
    ROOT / "docs" / "guides.md": 2,
    ROOT / "docs" / "quantization.md": 1,
}
GROUP = typer.main.get_command(llamagen_cli.app)

# GitHub gives headings of all levels an anchor.
markdown = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> list[Token]:
    """List the blocks of a page, each followed by its inline parts."""
    blocks = markdown.parse(path.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or ()))]


def blocks_of_code(path: Path, *languages: str) -> list[tuple[Token, bool]]:
    """List fenced blocks, and whether a comment before them says that they are not run."""
    tokens, found = read(path), []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "fence" and token.info in languages:
            is_marked = before is not None and before.type == "html_block" and "not run:" in before.content
            found.append((token, is_marked))
    return found


def compile_block(token: Token, path: Path):
    """Compile a Python block so that tracebacks show the page's line numbers."""
    return compile("\n" * (token.map[0] + 1) + token.content, name(path), "exec")


def shell_commands(text: str) -> list[list[str]]:
    """Split each `llamagen` command into words; a script of `pipelines/` counts as its command."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["llamagen"]:
            commands.append(words[1:])
        for place, word in enumerate(words):
            if script := re.fullmatch(r"pipelines/(\w+)\.py", word):
                commands.append([script[1].replace("_", "-"), *words[place + 1 :]])
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNNABLE, ids=name)
def test_snippets_run(path, tmp_path, monkeypatch):
    """Run Python and shell snippets from top to bottom in one folder, as a reader would."""
    monkeypatch.chdir(tmp_path)
    namespace, ran = {}, 0
    for token, is_marked in blocks_of_code(path, "python", "bash"):
        if is_marked:
            continue
        if token.info == "python":
            exec(compile_block(token, path), namespace)
            ran += 1
            continue
        for words in shell_commands(token.content):
            result = CliRunner().invoke(llamagen_cli.app, words)
            assert result.exit_code == 0, f"{name(path)}:{token.map[0] + 1}: {shlex.join(words)}\n{result.output}"
    assert ran >= RUNNABLE[path]


@pytest.mark.parametrize("path", PROSE, ids=name)
def test_python_snippets_are_python(path):
    for token, _ in blocks_of_code(path, "python"):
        if not token.content.startswith(">>>"):
            compile_block(token, path)


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A checkout with the reader's own recipe as the working directory; stages only parse their flags."""
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    shutil.copy(ROOT / "pipelines" / "recipes" / "own_images.yaml", tmp_path / "my_recipe.yaml")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", PROSE, ids=name)
def test_commands_exist(path, recipes):
    for token, _ in blocks_of_code(path, "bash", "sh"):
        for words in shell_commands(token.content):
            check_command(words)
    for token in read(path):
        # Running text abbreviates commands, puts options in brackets, and lists alternatives: "a | b".
        words = token.content.replace("[", "").replace("]", "").split()
        if token.type == "code_inline" and words[:1] == ["llamagen"] and len(words) > 1:
            check_options(words[1], [word for word in words if word.startswith("--")])


def check_command(words: list[str]) -> None:
    """Parse a command's flags as the command line does, without running it."""
    command, *arguments = words
    assert command in GROUP.commands, f"there is no `llamagen {command}`"
    if command not in stages.HELP:
        GROUP.commands[command].make_context(command, arguments)
    else:
        stages.read_stage(command, arguments)  # without the work


def check_options(command: str, options: list[str]) -> None:
    assert command in GROUP.commands, f"there is no `llamagen {command}`"
    if command not in stages.HELP:
        known = {option for parameter in GROUP.commands[command].params for option in parameter.opts}
        assert set(options) <= known | {"--help"}, f"`llamagen {command}` has no such option"


@pytest.mark.parametrize(
    "text, message",
    [
        ("llamagen generate 'a cat' --sead 7", "sead"),
        ("cd ..\nllamagen paint", "paint"),
        ("python pipelines/train_generator.py \\\n  --config my_recipe.yaml --max_train_stops 1", "^2$"),
    ],
)
def test_commands_that_do_not_exist_are_found(text, message, recipes):
    (words,) = shell_commands(text)
    with pytest.raises((Exception, SystemExit), match=message):
        check_command(words)


class Addresses(HTMLParser):
    """Targets of the links and images in HTML, and its anchors."""

    def __init__(self, html: str):
        super().__init__()
        self.links, self.anchors = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[key] for key in ("href", "src") if key in attributes]
        self.anchors += [attributes[key] for key in ("id", "name") if key in attributes]


def links(path: Path) -> list[str]:
    found = []
    for token in read(path):
        if token.type == "link_open":
            found.append(token.attrs["href"])
        elif token.type == "image":
            found.append(token.attrs["src"])
        elif token.type in ("html_block", "html_inline"):
            found += Addresses(token.content).links
    return found


def anchors(path: Path) -> set[str]:
    tokens = read(path)
    html = [token.content for token in tokens if token.type in ("html_block", "html_inline")]
    return {token.attrs["id"] for token in tokens if token.type == "heading_open"} | set(
        Addresses("".join(html)).anchors
    )


def broken_links(path: Path) -> list[str]:
    """List the relative links of a page that lead nowhere. Absolute ones are not checked."""
    broken = []
    for link in links(path):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        is_there = not parts.path or (target.exists() and target.is_relative_to(ROOT))
        if not is_there or (parts.fragment and parts.fragment not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n\n[there](#a-title) [not there](#title) [gone](gone.md) <img src='gone.png'>\n")
    assert broken_links(page) == ["#title", "gone.md", "gone.png"]


FOLDERS = ("benchmarks", "docs", "pipelines", "spaces", "src", "tests")


@pytest.mark.parametrize("path", PROSE, ids=name)
def test_files_in_running_text_exist(path):
    paths = [token.content for token in read(path) if token.type == "code_inline"]
    paths = [text for text in paths if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", text)]
    assert [text for text in paths if not any(ROOT.glob(text.rstrip("/")))] == []


def tree(path: Path) -> list[Path]:
    """List the files and folders of a page's tree, whose lines hold a name and a description, indented by folder."""
    (block, *_) = [token for token in read(path) if token.type == "fence" and token.content.startswith("src/")]
    found, parents = [], []
    for line in block.content.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [line.split()[0]]
        found.append(Path(*parents))
    return found


def test_the_tree_of_the_package_shows_every_folder_and_every_module_beside_them():
    package = ROOT / "src" / "llamagen_hf"
    folders = {path.parent for path in package.rglob("__init__.py")}
    modules = {path for path in package.glob("*.py") if path.name != "__init__.py"}
    assert {ROOT / path for path in tree(ROOT / "docs" / "contributing.md")} == folders | modules


def modules(cell: str) -> list[str]:
    """List the modules in a cell, of which all but the first omit their package: "`a.b.c`, `d`"."""
    first, *rest = re.findall(r"`([\w.]+)`", cell)
    return [first, *(f"{first.rpartition('.')[0]}.{name}" for name in rest)]


def test_modules_that_moved_are_where_the_changelog_says():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`llamagen_hf.*`) \| (`llamagen_hf.*`) \|$", text, re.MULTILINE)
    assert len(rows) > 20
    for before, now in rows:
        assert len(modules(before)) == len(modules(now))
        for module in modules(now):
            file = ROOT / "src" / module.replace(".", "/")
            assert file.with_suffix(".py").is_file() or (file / "__init__.py").is_file(), module


def test_commits_are_checked_by_the_ruff_that_the_project_pins():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (pinned,) = re.findall(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert hooks["repo"].endswith("/ruff-pre-commit") and hooks["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_every_page_is_in_the_index():
    docs = ROOT / "docs"
    linked = {(docs / link).resolve() for link in links(docs / "index.md")}
    assert set(docs.glob("*.md")) - {docs / "index.md"} <= linked
    listed = {(docs / "api" / urlsplit(link).path).resolve() for link in links(docs / "api" / "index.md")}
    assert set((docs / "api").glob("*.md")) - {docs / "api" / "index.md"} <= listed


@pytest.fixture(scope="module")
def make_api():
    pytest.importorskip("griffe", reason="the API reference is written with griffelib, of the extra 'docs'")
    return runpy.run_path(str(ROOT / "docs" / "make_api.py"))


def test_the_api_reference_is_what_the_docstrings_say(make_api):
    committed = {path.name: path.read_text(encoding="utf-8") for path in make_api["FOLDER"].iterdir()}
    assert make_api["Reference"]().pages() == committed, "docs/api is out of date; run `make docs`"


def test_cross_references_in_docstrings_resolve(make_api):
    assert make_api["broken_references"](make_api["load_package"]()) == []
