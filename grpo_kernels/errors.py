"""Errors in what a run is given: a reward function, a chat template, a tokenizer, a dataset."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)
_LIBRARIES = (_PACKAGE, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
_LONGEST = 300  # characters of a third party's message


class ThirdPartyError(RuntimeError):
    """Something that a run was given has failed: the message says whose it is and where, the cause is its error."""


class ThirdPartyTypeError(ThirdPartyError, TypeError):
    """What a run was given has returned something else than it must."""


def third_party_error(whose: str, error: BaseException) -> ThirdPartyError:
    """The error to raise; ``whose`` says what failed on what: "reward function 'mine' failed on 8 completions"."""
    return ThirdPartyError(f"{whose}: {described(error)}")


def described(error: BaseException) -> str:
    """An error in one line: its type, its message, and the line of code or template where there is one to mend."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return (message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...") + _where(error)


def third_party_traceback(error: ThirdPartyError) -> str:
    """The traceback of what failed, without this package's frames before it."""
    cause = error.__cause__ or error
    frames = cause.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(cause), cause, frames or cause.__traceback__))


def _where(error: BaseException) -> str:
    """The innermost line that is neither this package's nor a library's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == "<template>":
            return f" (line {frame.lineno} of the template)"
        if not frame.filename.startswith(("<", *_LIBRARIES)):
            return f" ({Path(frame.filename).name}:{frame.lineno}, in {frame.name})"
    return ""
