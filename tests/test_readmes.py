"""README.md and README_ja.md say the same, and what they say to type is there to be typed."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from kdcache.cli import main
from kdcache.config import ExtractConfig, TrainConfig

ROOT = Path(__file__).parents[1]
README, README_JA = TEXTS = [(ROOT / name).read_text() for name in ("README.md", "README_ja.md")]
STARTS = ("kdcache ", "make ", ".venv/", "torchrun ", "tensorboard ", "source ")
BLOCK = re.compile(r"^```\w*\n([\s\S]*?)^```$|((?:^ {4}.*\n|^\n(?= {4}))+)", re.M)
# Japanese writes as figures what English writes as words
WORDS = {"once": "1", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
WORDS |= {"eight": "8", "ten": "10", "sixteen": "16", "thirty": "30"}


def code(text):
    """The code blocks, indented ones without their indentation, a command of several lines as one."""
    found = BLOCK.findall(text)
    blocks = [fenced or re.sub("^ {4}", "", plain, flags=re.M) for fenced, plain in found]
    return re.sub(r" *\\\n *", " ", "\n".join(blocks))


def commands(text):
    lines = [line.split(" #")[0].rstrip() for line in code(text).splitlines()]
    return sorted(line for line in lines if line.startswith(STARTS))


def spans(text):
    """What stands between backticks, however its line is broken."""
    return sorted(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text)))


def links(text):
    return Counter(re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", text)))


def numbers(text):
    """Those of the prose; not those of names, such as B3 and float32."""
    prose = re.sub(r"`[^`]+`|\]\([^)]+\)", "", BLOCK.sub("", text))
    return Counter(re.findall(r"(?<![A-Za-z0-9.,_-])\d+(?:[.,]\d+)*(?:e-?\d+)?", prose))


def kdcache_commands(text):
    """Words after `kdcache`, of every command line and every span that is one."""
    written = "\n".join(commands(text) + spans(text))
    return [shlex.split(c) for c in re.findall(r"(?:^|-m |run )kdcache (.+)$", written, re.M)]


def test_both_have_the_same_commands():
    assert commands(README) == commands(README_JA)
    assert len(commands(README)) > 10


def test_both_have_the_same_inline_code():
    assert spans(README) == spans(README_JA)
    assert {"--masks DIR", "uv run kdcache demo"} <= set(spans(README))


@pytest.mark.parametrize("part", [r"^```python\n([\s\S]*?)^```$", r"^ {4}.* \d\.\d{3} .*\d$"])
def test_both_have_the_same_python_and_the_same_table_of_the_demo(part):
    found = [re.findall(part, text, re.M) for text in TEXTS]
    assert found[0] == found[1] != []


def test_both_name_the_same_files_and_each_is_there():
    files = [set(re.findall(r"\b\w+(?:\.py|/)", code(t).split("\nkdcache/\n")[1])) for t in TEXTS]
    assert files[0] == files[1] != set()
    for name in files[0]:
        assert (ROOT / name).exists() or (ROOT / "kdcache" / name).exists(), name


def test_both_link_to_the_same_places_and_to_each_other():
    assert links(README) - Counter(["README_ja.md"]) == links(README_JA) - Counter(["README.md"])
    assert links(README)["README_ja.md"] == links(README_JA)["README.md"] == 1


@pytest.mark.parametrize("text", TEXTS, ids=["en", "ja"])
def test_every_file_that_is_linked_to_is_there(text):
    files = [target for target in links(text) if "://" not in target]
    assert len(files) > 5
    assert [target for target in files if not (ROOT / target.split("#")[0]).exists()] == []


def test_both_state_the_same_numbers():
    words = re.findall(r"\b[a-z]+\b", BLOCK.sub("", README).lower())
    more = numbers(README_JA) - numbers(README)
    assert numbers(README) - numbers(README_JA) == Counter()
    assert more <= Counter(WORDS[word] for word in words if word in WORDS)
    assert {"2.07", "1.66", "6,400", "1e-3"} <= set(numbers(README))


@pytest.mark.parametrize("part", [r"^#+ ", r"^\| ", r"^\| ---", r"^- ", r"^\*\*"])
def test_both_have_as_many_sections_table_rows_tables_and_points(part):
    plain = [BLOCK.sub("", text) for text in TEXTS]
    assert len(re.findall(part, plain[0], re.M)) == len(re.findall(part, plain[1], re.M)) > 0


@pytest.mark.parametrize("text", TEXTS, ids=["en", "ja"])
def test_every_command_exists_with_its_options_and_settings(text):
    settings = set(ExtractConfig.model_fields) | set(TrainConfig.model_fields)
    options = {
        name: {option for given in command.params for option in given.opts + given.secondary_opts}
        for name, command in main.commands.items()
    }
    for name, *words in kdcache_commands(text):
        assert {word for word in words if word.startswith("-")} <= options[name], (name, words)
    assert {name for name, *_ in kdcache_commands(text)} >= {"plan", "extract", "train", "export"}
    written = "\n".join(commands(text) + spans(text))
    assert set(re.findall(r"--(?:set|grid) (\w+)=(?=\w)", written)) - {"key"} <= settings
    for option in re.findall(r"^--[\w-]+", "\n".join(spans(text)), re.M):
        assert any(option in known for known in options.values()), option
