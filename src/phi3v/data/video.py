"""Frames of a video clip."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from phi3v.data.conversations import DataError

JPEG_QUALITY = 95
"""Frames are stored as JPEG of this quality: visibly the same, a tenth of PNG's bytes."""

MAX_FRAMES = 1_000_000
"""A longer clip is refused: nine hours at 30 frames a second."""


def frame_indices(total: int, wanted: int) -> list[int]:
    """The recipe's choice: arange(0, n, n / 8), truncated."""
    return [int(index) for index in np.arange(0, total, total / wanted)[:wanted]]


def sample_frames(path: Path, wanted: int = 8) -> list[bytes]:
    """JPEG bytes of `wanted` frames spread over a clip, its first frame included.

    Raises DataError when the clip does not decode or has fewer frames. The number of frames is what decodes, not what
    the header says: a header that is right costs one pass, a wrong one two.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video stream")
            promised = container.streams.video[0].frames
        indices = frame_indices(promised, wanted) if promised >= wanted else []
        total, frames = _decode(path, set(indices))
        if total < wanted:
            raise DataError(f"{path}: {total} frames; expected at least {wanted}")
        if total != promised:
            indices = frame_indices(total, wanted)
            again, frames = _decode(path, set(indices))
            if again != total:
                raise DataError(f"{path}: {again} frames in a second pass; expected {total} as in the first")
        return [frames[index] for index in indices]
    except (av.FFmpegError, ValueError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: does not decode: {error}") from None


def _decode(path: Path, keep: set[int]) -> tuple[int, dict[int, bytes]]:
    """(number of frames, JPEG bytes of those to keep)."""
    import av

    frames: dict[int, bytes] = {}
    total = 0
    with av.open(str(path)) as container:
        # One thread a clip: the converter runs clips side by side.
        container.streams.video[0].thread_count = 1
        for frame in container.decode(video=0):
            if total in keep:
                buffer = io.BytesIO()
                frame.to_image().save(buffer, "JPEG", quality=JPEG_QUALITY)
                frames[total] = buffer.getvalue()
            total += 1
            if total > MAX_FRAMES:
                raise DataError(f"{path}: more than {MAX_FRAMES} frames")
    return total, frames
