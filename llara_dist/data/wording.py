"""Templates: the wordings of the task, three a domain in `templates/<domain>.yaml`, and where they may be cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from llara_dist.errors import InputError

DOMAINS = ("movie", "game", "artist")

_CUT = re.compile(r"(?<=\S) ")
_FIELDS = ("{history}", "{num_candidates}", "{candidates}")


@dataclass(frozen=True)
class Template:
    """One wording of the task; text in `templates/<domain>.yaml`.

    The history and the candidates are titles joined by ", "; the answer follows the text after one space.
    """

    text: str

    def __post_init__(self) -> None:
        """Refuse a wording that cannot be cut at spaces; InputError says what is wrong."""
        for field in _FIELDS:
            if self.text.count(field) != 1:
                raise InputError(f"template {self.text!r}: must hold {field} exactly once")
        if self.text.index("{history}") > self.text.index("{candidates}"):
            raise InputError(f"template {self.text!r}: {{history}} must come before {{candidates}}")
        for field in ("{history}", "{candidates}"):
            if not re.search(r"\S " + re.escape(field) + r"(?!\w)", self.text):
                raise InputError(f"template {self.text!r}: {field} must follow a word and one space, and end a word")
        if self.text != self.text.strip():
            raise InputError(f"template {self.text!r}: begins or ends with a space; the answer's space is added")
        if "  " in self.text:
            raise InputError(f"template {self.text!r}: holds a double space")

    def parts(self, num_candidates: int) -> tuple[str, str, str, str, str]:
        """The text between the titles for a number of candidates: (head, history tail, middle, candidate tail, end).

        A tail belongs to the unit of the last title of its list; middle and end begin with a space or are empty.
        """
        text = self.text.replace("{num_candidates}", str(num_candidates))
        head, rest = text.split(" {history}")
        between, after = rest.split(" {candidates}")
        history_tail, middle = _split_tail(between)
        candidate_tail, end = _split_tail(after)
        return head, history_tail, middle, candidate_tail, end

    def render(self, history: Sequence[str], candidates: Sequence[str]) -> str:
        """The text-only prompt, without the answer."""
        text = self.text.replace("{num_candidates}", str(len(candidates)))
        head, rest = text.split("{history}")
        between, after = rest.split("{candidates}")
        return head + ", ".join(history) + between + ", ".join(candidates) + after


def _split_tail(text: str) -> tuple[str, str]:
    """Split the text after a title at its first cut; the title before it counts as a non-space."""
    match = _CUT.search("x" + text)
    return (text, "") if match is None else (text[: match.start() - 1], text[match.start() - 1 :])


def load_templates(domain: str) -> list[Template]:
    """The package's templates of a domain ("movie", "game", "artist"), or those of a YAML file of the same form.

    Raises:
        InputError: an unknown domain, or a file that holds no list `templates` of valid wordings.
    """
    import yaml

    if domain in DOMAINS:
        source = f"templates/{domain}.yaml"
        text = resources.files("llara_dist.data").joinpath(source).read_text(encoding="utf-8")
    else:
        source = domain
        if not Path(domain).is_file():
            raise InputError(f"templates for {domain!r}: neither one of {', '.join(DOMAINS)} nor a YAML file")
        text = Path(domain).read_text(encoding="utf-8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not YAML ({str(error).splitlines()[0]})") from None
    wordings = value.get("templates") if isinstance(value, dict) else None
    if not isinstance(wordings, list) or not wordings or not all(isinstance(wording, str) for wording in wordings):
        raise InputError(f"{source}: expected a list `templates` of texts with {', '.join(_FIELDS)}")
    return [Template(wording) for wording in wordings]
