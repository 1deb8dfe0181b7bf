"""A file that arrives in pieces."""

import hashlib
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from client.models import ArtifactFile
from client.partial import PartialFile


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=300),
    piece_bytes=st.integers(1, 120),
    order=st.randoms(use_true_random=False),
    restart_every=st.integers(1, 5),
)
def test_pieces_in_any_order_over_any_restarts_give_the_file(
    data: bytes, piece_bytes: int, order: object, restart_every: int
) -> None:
    file = ArtifactFile(name="x", sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), url="")
    with tempfile.TemporaryDirectory() as folder:
        written = 0
        part = PartialFile(Path(folder), file, piece_bytes)
        missing = part.missing()
        order.shuffle(missing)
        while missing:
            piece = missing.pop()
            have = part.present(piece)
            part.write(piece.start + have, data[piece.start + have : piece.end])
            part.finish(piece)
            written += piece.end - piece.start - have
            if written // piece_bytes % restart_every == 0:
                part = PartialFile(Path(folder), file, piece_bytes)
                missing = part.missing()
                order.shuffle(missing)
                if not data:
                    break
        assert written == len(data), "a piece came twice"
        assert part.is_intact()
        part.move_to(Path(folder) / "out" / "x")
        assert (Path(folder) / "out" / "x").read_bytes() == data
        assert [path.name for path in Path(folder).iterdir()] == ["out"]
