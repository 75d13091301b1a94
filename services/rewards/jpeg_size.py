"""Compressibility: how many bits a pixel needs as JPEG (DDPO, 2305.13301). Needs no weights; good for trying things out."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from services.reward import Item
from shared.image import encode
from shared.schema import RewardInfo, Score


class JpegSizeOptions(BaseModel):
    """`incompressible: true` rewards large files instead of small ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    incompressible: bool = False


class JpegSize:
    """Bits per pixel of the JPEG at quality 95, 4:4:4; lower is better unless `incompressible`."""

    def __init__(self, name: str, options: JpegSizeOptions) -> None:
        self.info = RewardInfo(
            name=name, higher_is_better=options.incompressible, preprocessing="jpeg-95-444", description="bits per pixel as JPEG"
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        del device
        return cls(name, JpegSizeOptions.model_validate(options))

    def score(self, batch: Sequence[Item]) -> list[Score]:
        out = []
        for item in batch:
            height, width, _ = item.image.shape
            out.append(Score.ok(8 * len(encode(item.image, "jpeg").data) / (height * width)))
        return out
