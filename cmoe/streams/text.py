"""Words as hashed ids, and bytes as overlapping windows."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

PADDING = 256  # behind the last byte; predicting it counts for nothing
BEGIN = 257  # before the first byte
BYTE_VOCABULARY = 258

_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")


def hash_words(texts: Sequence[str], vocabulary: int, length: int) -> np.ndarray:
    """Words of each text, in lower case, hashed into 1 .. vocabulary-1 (MurmurHash3; Weinberger et al. 2009).

    Args:
        texts: n strings.
        vocabulary: token ids in all; 0 is padding.
        length: words a text keeps; shorter ones are padded behind.

    Returns:
        (n, length) int32.
    """
    from sklearn.utils import murmurhash3_32

    known: dict[str, int] = {}
    ids = np.zeros((len(texts), length), dtype=np.int32)
    for row, text in enumerate(texts):
        for column, word in enumerate(_WORD.findall(text.lower())[:length]):
            if word not in known:
                known[word] = 1 + murmurhash3_32(word, seed=0, positive=True) % (vocabulary - 1)
            ids[row, column] = known[word]
    return ids


def windows(text: bytes, length: int) -> np.ndarray:
    """A text as windows that overlap by one token, so that each byte is predicted exactly once.

    The first window starts with `BEGIN`, the last is filled up with `PADDING`.

    Args:
        text: the bytes.
        length: predictions a window has.

    Returns:
        (n, length + 1) int16: inputs are [:, :-1], targets [:, 1:].
    """
    count = -(-len(text) // length)
    tokens = np.full(count * length + 1, PADDING, dtype=np.int16)
    tokens[0] = BEGIN
    tokens[1 : 1 + len(text)] = np.frombuffer(text, dtype=np.uint8)
    index = np.arange(count)[:, None] * length + np.arange(length + 1)[None, :]
    return tokens[index]


def thirds(text: bytes, validation: float, test: float, blocks: int = 50) -> tuple[bytes, bytes, bytes]:
    """Train, validation and test bytes: a text cut into equal blocks, of which evenly spread ones are held out.

    Args:
        text: the bytes.
        validation: share of what is not test.
        test: share.
        blocks: how many blocks; shares are rounded to them.

    Returns:
        The blocks of each, joined in their order.
    """

    def spread(of: list[int], share: float) -> set[int]:
        return {b for i, b in enumerate(of) if int((i + 1) * share + 1e-9) > int(i * share + 1e-9)}

    tested = spread(list(range(blocks)), test)
    held = spread([b for b in range(blocks) if b not in tested], validation)
    edges = [len(text) * b // blocks for b in range(blocks + 1)]
    parts: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])
    for b in range(blocks):
        parts[2 if b in tested else 1 if b in held else 0].append(text[edges[b] : edges[b + 1]])
    return b"".join(parts[0]), b"".join(parts[1]), b"".join(parts[2])
