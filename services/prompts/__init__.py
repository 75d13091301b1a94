"""What judges are asked, as versioned data: one YAML file each, read and checked before any weights load.

    name: forensic_chat
    version: 1
    source: where the question and its formula come from
    text: "<image> Is this a photograph? {prompt}"
    labels: {real: [real, Real], fake: [fake, Fake]}

`<image>` is where a picture goes (without it, pictures stand before the text), `{field}` where an item's text goes. What an item brings is
put in as it is: a brace or an <image> in it means nothing. `labels` names the answers; a word alone stands for all its spellings.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.engines.base import Chat, Picture

HERE = Path(__file__).parent
_SLOT = re.compile(r"\{([a-z_]+)\}")
_IMAGE = "<image>"


class Template(BaseModel):
    """One question."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    version: int = Field(ge=1)
    source: str = Field(min_length=1)
    text: str = Field(min_length=1)
    system: str | None = None
    labels: dict[str, str | list[str]] = {}

    @cached_property
    def id(self) -> str:
        """Name, version, and eight digits of what is in it: an edit without a new version shows too."""
        return f"{self.name}-{self.version}-{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]}"

    @property
    def fields(self) -> set[str]:
        return set(_SLOT.findall(self.text + (self.system or "")))

    @property
    def places(self) -> int:
        """Pictures that it names a place for."""
        return self.text.count(_IMAGE)

    def chat(self, images: Sequence[Picture], fields: Mapping[str, str] | None = None, continuation: str | None = None) -> Chat:
        """The question about these pictures. ValueError when their number is not that of the places; KeyError for a missing field."""
        values = fields or {}
        pieces = [_SLOT.sub(lambda found: values[found[1]], piece) for piece in self.text.split(_IMAGE)]
        if len(pieces) == 1:
            parts: list[str | Picture] = [*images, pieces[0]]
        elif len(pieces) - 1 == len(images):
            parts = [pieces[0]]
            for image, piece in zip(images, pieces[1:], strict=True):
                parts += [image, piece]
        else:
            raise ValueError(f"{self.name} has {len(pieces) - 1} places for pictures, and {len(images)} pictures came")
        system = None if self.system is None else _SLOT.sub(lambda found: values[found[1]], self.system)
        return Chat(tuple(part for part in parts if not isinstance(part, str) or part), system, continuation)


def read(source: str | Path, fields: Sequence[str] = (), images: int = 1, labels: Sequence[str] = ()) -> Template:
    """A template of this folder by name, or a file. `fields`, `images` and `labels` are what the reward offers and asks for.

    FileNotFoundError, or ValueError with what is wrong.
    """
    path = HERE / f"{source}.yaml" if isinstance(source, str) else source
    if not path.is_file():
        raise FileNotFoundError(
            f"no template {path}; there are {', '.join(sorted(p.stem for p in HERE.glob('*.yaml')))}, or give a file"
        )
    try:
        template = Template.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        said = (
            "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            if isinstance(error, ValidationError)
            else error
        )
        raise ValueError(f"{path} is no template: {said}") from error
    if unknown := template.fields - set(fields):
        raise ValueError(
            f"{path} has {{{min(unknown)}}}, which this reward does not fill; it fills: {', '.join(fields) or 'nothing'}"
        )
    if template.places not in (0, images):
        raise ValueError(f"{path} has {template.places} times {_IMAGE}; this reward shows {images}")
    if set(template.labels) != set(labels):
        raise ValueError(
            f"{path} must have the labels {', '.join(labels) or 'none'}; it has {', '.join(template.labels) or 'none'}"
        )
    return template
