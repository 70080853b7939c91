"""Converters of the hub's parquet files: the_cauldron's configurations and the mini DocVQA set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from phi3v.data.conversations import DataError, shown
from phi3v.data.samples import Inputs, Picture, Rejection, Sample, SampleTurn, each_row

BATCH_ROWS = 32
"""Rows held in memory at a time."""


def _rows(inputs: Inputs, columns: list[str]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(where, number over all files, row) of parquet files. Raises DataError for a file without the columns."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    for path in inputs.files:
        if path.suffix != ".parquet":
            raise DataError(f"{path}: not a .parquet file; expected the parquet files of the source only")
        try:
            with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                missing = set(columns) - set(file.schema_arrow.names)
                if missing:
                    raise DataError(
                        f"{path}: column `{sorted(missing)[0]}`: missing; expected {', '.join(columns)}; got "
                        f"{', '.join(file.schema_arrow.names)}"
                    )
                for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        yield f"{path.name}: row {number}", number, row
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as parquet: {error}") from None


def _picture(value: Any, where: str, field: str) -> Picture:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise DataError(f"{where}: field `{field}.bytes`: got {shown(data)}; expected the picture's encoded bytes")
    return Picture(data)


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field `{field}`: got {shown(value)}; expected some text")
    return value


def without_markers(text: str) -> str:
    """The text without `<image>` marks before and after it: pictures stand in front of the text by the format's own
    rule."""
    text = text.strip()
    while text.startswith("<image>"):
        text = text.removeprefix("<image>").lstrip()
    while text.endswith("<image>"):
        text = text.removesuffix("<image>").rstrip()
    return text


def cauldron(inputs: Inputs) -> Iterator[Sample | Rejection]:
    """the_cauldron: `images` (list of {bytes, path}) and `texts` (list of {user, assistant, source}), all QAs of a row
    as turns.

    The pictures go with the first turn.
    """

    def build(where: str, number: int, row: dict[str, Any]) -> Sample:
        images, texts = row["images"], row["texts"]
        if not isinstance(images, list) or not images:
            raise DataError(f"{where}: field `images`: got {shown(images)}; expected a list of pictures")
        if not isinstance(texts, list) or not texts:
            raise DataError(f"{where}: field `texts`: got {shown(texts)}; expected a list of questions and answers")
        pictures = tuple(_picture(image, where, f"images[{index}]") for index, image in enumerate(images))
        turns = []
        for index, text in enumerate(texts):
            if not isinstance(text, dict):
                raise DataError(f"{where}: field `texts[{index}]`: got {shown(text)}; expected user and assistant")
            user = without_markers(_text(text.get("user"), where, f"texts[{index}].user"))
            answer = _text(text.get("assistant"), where, f"texts[{index}].assistant").strip()
            turns.append(SampleTurn(() if index else pictures, user, (answer,)))
        return Sample(where, inputs.row_id(number), tuple(turns))

    return each_row(_rows(inputs, ["images", "texts"]), build)


def docvqa_mini(inputs: Inputs) -> Iterator[Sample | Rejection]:
    """The mini DocVQA set: `image` {bytes, path}, `query` {en, …} and `answers`; every answer is accepted, the first
    one trains."""

    def build(where: str, number: int, row: dict[str, Any]) -> Sample:
        query = row["query"]
        question = _text(query.get("en") if isinstance(query, dict) else query, where, "query.en")
        answers = row["answers"]
        if not isinstance(answers, list) or not answers:
            raise DataError(f"{where}: field `answers`: got {shown(answers)}; expected a list of accepted answers")
        accepted = tuple(
            dict.fromkeys(_text(answer, where, f"answers[{k}]").strip() for k, answer in enumerate(answers))
        )
        picture = _picture(row["image"], where, "image")
        turn = SampleTurn((picture,), f"{question.strip()}\nAnswer briefly.", accepted)
        return Sample(where, inputs.row_id(number), (turn,))

    return each_row(_rows(inputs, ["image", "query", "answers"]), build)
