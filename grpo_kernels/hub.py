"""Models and datasets by their names on the Hugging Face Hub, and what is said where one cannot be had."""

from __future__ import annotations

import functools
import ssl
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config


def check_folder(key: str, name: str) -> None:
    """Raises ValueError, with the recipe's key, for a path to nothing; a name on the Hub has at most one slash."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/")
    if is_path and not Path(name).expanduser().exists():
        raise ValueError(f"{key} {name!r} cannot be loaded: no such folder")


def use_cache_if_unreachable() -> None:
    """Goes offline for good where the Hub does not answer: the libraries would try for half a minute for each file."""
    if not constants.is_offline_mode() and not _answers():
        constants.HF_HUB_OFFLINE = True
    if constants.is_offline_mode() and "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def check_loaded(loading_info: dict[str, Any], name: str) -> None:
    """Raises ValueError where ``from_pretrained`` has filled weights that the files lack with random numbers."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{name} lacks weights of the model: {', '.join(missing[:3])}{more}")


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer, padding on the left; one that was saved without a class of its own is what its file says."""
    # AutoTokenizer would take the class of the model's family for it, which splits and joins words in its own way
    saved = get_tokenizer_config(name).get("tokenizer_class")
    kind = PreTrainedTokenizerFast if saved in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer
    return kind.from_pretrained(name, padding_side="left", trust_remote_code=trust_remote_code)


@functools.cache
def _answers() -> bool:
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5.0):  # seconds, to answer at all
            return True
    except HTTPError:  # an answer, if not the best
        return True
    except OSError as error:  # the libraries may have certificates of their own
        return isinstance(error, URLError) and isinstance(error.reason, ssl.SSLError)
