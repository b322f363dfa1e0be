"""Files of weights, told from others by their first bytes: nothing is executed, and PyTorch is not needed."""

from pathlib import Path


def no_weights(path: Path) -> str | None:
    """What is wrong with a file by its first bytes; None where it begins as weights do, or is cut before that shows."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        return f"can't be read ({error.strerror or error})"
    if not head:
        return "the file is empty; fetch it again"
    if head.lstrip().startswith(b"<"):
        return "it holds a web page, no weights; fetch the file itself"
    if not _begins_a_pickle(head) and head[8:9] not in (b"", b"{"):  # safetensors: the header's length in 8 bytes, then JSON
        return "no file of weights, neither of safetensors nor of torch.save"
    return None


def is_pickled(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later, or as the zip archive of pickles that torch.save writes."""
    with path.open("rb") as file:
        return _begins_a_pickle(file.read(9))


def _begins_a_pickle(head: bytes) -> bool:
    """Of the first 9 bytes or more."""
    if head[4:9] == b"\0\0\0\0{":  # safetensors whose header's length begins like a pickle
        return False
    return head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))
