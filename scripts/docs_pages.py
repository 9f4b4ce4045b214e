"""The generated parts of the documentation: a hook of mkdocs, which reads hftl's source and imports none of it.

A page says where they go: `<!-- errors -->` for every message of an error, `<!-- flags -->` for hftl's own flags.
"""

from __future__ import annotations

import ast
import html
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
#: the exceptions whose message a person sees
ERRORS = ("UsageError", "DiskError", "Diverged")
#: … and tables of what stands inside such messages
REASONS = ("_ADVICE", "_DISK_ERRORS")
#: words of a message that its anchor is made of
_ANCHOR_WORDS = 7
#: title of a table of flags, by the class that has them
_CLASSES = {
    "TransferArguments": "All tasks",
    "ImageArguments": "Image tasks",
    "AudioArguments": "Audio tasks",
    "VideoArguments": "Video tasks",
    "ReadingArguments": "Tasks with texts or words",
    "ChoiceArguments": "Multiple choice, beside those of tasks with texts",
    "TextArguments": "Text classification, beside those of tasks with texts",
    "SimilarityArguments": "Image similarity, beside those of image tasks",
    "ImageTextArguments": "Image-text tasks, beside those of image and text tasks",
}


class Message(NamedTuple):
    """What an error says, with placeholders in braces, and the anchor of it."""

    text: str
    anchor: str


class Flag(NamedTuple):
    """A flag of hftl's own; `section` is the comment above its group."""

    section: str
    name: str
    aliases: tuple[str, ...]
    kind: str
    default: Any
    choices: tuple[str, ...]
    help: str


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page: its text with the generated parts in their places."""
    for marker, make in (("<!-- errors -->", errors_page), ("<!-- flags -->", flags_page)):
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


# --- errors ----------------------------------------------------------------------------------------------------------


def errors_page(package: Path = ROOT / "hftl") -> str:
    """Every message, by module."""
    parts = []
    for title, name, messages in error_messages(package):
        parts.append(f"## {title} {{ #{_module_anchor(name)} }}\n\nFrom `{name}`.")
        parts += [
            f'<p id="{message.anchor}"><code>{html.escape(message.text)}</code> '
            f'<a class="headerlink" href="#{message.anchor}" title="Permanent link">¶</a></p>'
            for message in messages
        ]
    return "\n\n".join(parts)


def error_messages(package: Path) -> list[tuple[str, str, list[Message]]]:
    """Of each module with errors: its docstring's first sentence, its path, and its messages in order."""
    modules = []
    taken: set[str] = set()
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = [message_of(call) for call in error_calls(tree)] + [*_reasons(tree)]
        name = str(path.relative_to(package.parent))
        taken.add(_module_anchor(name))
        messages = [Message(text, _free_anchor(text, taken)) for text in texts]
        if messages:
            modules.append((_first_sentence(ast.get_docstring(tree) or name), name, messages))
    return modules


def error_calls(tree: ast.AST) -> list[ast.Call]:
    """The calls that make an error, in the order of the source: most are raised there, some by who asked for them."""
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS
    ]
    return sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def _reasons(tree: ast.Module) -> Iterator[str]:
    """The reasons in a module's tables of them, which stand inside its messages."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) in REASONS
            and isinstance(node.value, ast.Dict)
        ):
            yield from map(_rendered, node.value.values)


def message_of(call: ast.Call) -> str:
    """The message that an error is made with."""
    return " ".join(_rendered(call.args[0]).split()) if call.args else "{message}"


def _rendered(node: ast.expr) -> str:
    """A text as it is written, what is filled in as `{name}`."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_rendered(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _rendered(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _rendered(node.left) + _rendered(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "did_you_mean":
        return "{ Did you mean …?}"
    names = [name for name in _names(node) if not name.startswith("__")]
    return f"{{{names[-1].lstrip('_')}}}" if names else "{…}"


def _names(node: ast.AST) -> Iterator[str]:
    """The names in an expression, what is inside before what is around it."""
    for child in ast.iter_child_nodes(node):
        yield from _names(child)
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[^.])\.(?:\s|$)|: see ", paragraph)[0]


def _slug(words: Iterable[str]) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", "-".join(words).lower()).strip("-")


def _module_anchor(name: str) -> str:
    """Without underscores, which Markdown takes for emphasis."""
    return _slug([name.replace("_", "-")])


def _free_anchor(text: str, taken: set[str]) -> str:
    """A slug of the first words that is not taken yet; it is taken now."""
    slug = _slug(re.sub(r"\{[^}]*\}", " ", text).split()[:_ANCHOR_WORDS]) or "message"
    numbered = (f"{slug}-{number}" for number in itertools.count(2))
    free = next(name for name in itertools.chain([slug], numbered) if name not in taken)
    taken.add(free)
    return free


# --- flags -----------------------------------------------------------------------------------------------------------


def flags_page(source: Path = ROOT / "hftl" / "arguments.py") -> str:
    """A table of flags for each class and group."""
    parts = []
    for title, flags in own_flags(source.read_text(encoding="utf-8")):
        parts.append(f"## {title}")
        for section, group in itertools.groupby(flags, key=lambda flag: flag.section):
            parts += [f"### {section}"] if section else []
            parts.append(_table(list(group)))
    return "\n\n".join(parts)


def own_flags(source: str) -> list[tuple[str, list[Flag]]]:
    """The flags in the source of `hftl.arguments`, by title of their class."""
    lines = source.splitlines()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return [(title, [*_flags(classes[name].body, lines)]) for name, title in _CLASSES.items()]


def _flags(body: Sequence[ast.stmt], lines: Sequence[str]) -> Iterator[Flag]:
    """The fields that are made by `_argument(default, help, *aliases, choices=…)`."""
    first = body[0].lineno
    for node in body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "_argument"):
            continue
        default, text, *aliases = (ast.literal_eval(value) for value in node.value.args)
        choices = next((ast.literal_eval(word.value) for word in node.value.keywords if word.arg == "choices"), ())
        section = _section(lines[first : node.lineno])
        kind = ast.unparse(node.annotation).replace(" | None", "")
        yield Flag(section, node.target.id, tuple(aliases), kind, default, tuple(choices), text)


def _section(lines: Sequence[str]) -> str:
    """The last comment that stands behind an empty line: the name of a group of fields."""
    pairs = itertools.pairwise(lines)
    found = [line.strip(" #") for before, line in pairs if not before.strip() and line.strip().startswith("# ")]
    return found[-1] if found else ""


def _table(flags: Sequence[Flag]) -> str:
    rows = ["| flag | default | what it does |", "| --- | --- | --- |"]
    for flag in flags:
        names = [f"`--{flag.name}`{{ #{flag.name} }}", *(f"`{alias}`" for alias in flag.aliases)]
        choices = f" One of {', '.join(f'`{choice}`' for choice in flag.choices)}." if flag.choices else ""
        kind = "" if flag.choices else f" *{flag.kind}*"
        text = html.escape(flag.help, quote=False).replace("|", "&#124;")
        rows.append(f"| {', '.join(names)}{kind} | {_default(flag.default)} | {text}{choices} |")
    return "\n".join(rows)


def _default(value: Any) -> str:
    """As it would be written on the command line; none where it is chosen later, or nothing."""
    return "" if value is None or value == "" else f"`{str(value).lower() if isinstance(value, bool) else value}`"
