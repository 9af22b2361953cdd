"""The documents of the project, and the examples in them: blocks between lines of ```.

A test takes an example by `example(document, heading, number)`, written so in one line. test_readme.py
looks for these calls and so knows which examples no test runs.
"""
import re
from typing import Dict, List, NamedTuple, Tuple

from harness import ROOT

README = "README.md"
REFERENCE = "docs/reference.md"
DOCUMENTS = (README, REFERENCE, "CONTRIBUTING.md", "CHANGELOG.md")
FENCE = re.compile(r"```(\w*)\n(.*?)```\n", re.DOTALL)


class Example(NamedTuple):
    """A block of a document: the language that stands behind its first line of ```, and its text."""

    language: str
    text: str


def read_document(document: str) -> str:
    """Return the text of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def examples_of(document: str) -> Dict[Tuple[str, int], Example]:
    """Return all examples of a document, by the heading above them and their number below it."""
    examples: Dict[Tuple[str, int], Example] = {}
    for section in re.split(r"(?m)^#+ (?=.*$)", hide_comments(read_document(document)))[1:]:
        heading, _, text = section.partition("\n")
        for number, block in enumerate(FENCE.findall(text.replace("\x00", "#"))):
            examples[heading, number] = Example(*block)
    return examples


def hide_comments(text: str) -> str:
    """Replace what begins a comment in an example, which would look like a heading."""
    return FENCE.sub(lambda block: block[0].replace("#", "\x00"), text)


def example(document: str, heading: str, number: int = 0) -> Example:
    """Return an example of a document."""
    return examples_of(document)[heading, number]


def headings_of(document: str) -> List[str]:
    """Return the headings of a document, as GitHub writes them in links."""
    headings = re.findall(r"(?m)^#+ (.*)$", hide_comments(read_document(document)))
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def links_of(document: str) -> List[str]:
    """Return where the links and images of a document lead, but for other sites."""
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read_document(document)))
    return [link for link in links if "://" not in link]
