"""Models and datasets by their names on the Hugging Face Hub, and what is said where one cannot be had."""

from __future__ import annotations

import functools
import ssl
import sys
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from huggingface_hub import constants
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

_SECONDS = 5.0  # for the Hub to answer at all


def is_folder_name(name: str) -> bool:
    """Whether a name cannot be one on the Hub, which has the form ``model`` or ``owner/model``."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/")


def check_folder(key: str, name: str) -> None:
    """Raises ValueError, with the recipe's key, where a name is neither there nor on the Hub by its form."""
    if is_folder_name(name) and not Path(name).expanduser().exists():
        raise ValueError(f"{key} {name!r} cannot be loaded: no such folder")


def use_cache_if_unreachable() -> None:
    """Goes offline, for the rest of the process, where the Hub does not answer.

    What is in the cache is found at once then, and for the rest nobody waits through the libraries' retries, half a
    minute for each file.
    """
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
    """A model's tokenizer, padding on the left; one that was saved without a class of its own is what its file says.

    ``AutoTokenizer`` would take the class of the model's family for it, which splits and joins words in its own way.
    """
    saved = get_tokenizer_config(name).get("tokenizer_class")
    kind = PreTrainedTokenizerFast if saved in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer
    return kind.from_pretrained(name, padding_side="left", trust_remote_code=trust_remote_code)


@functools.cache
def _answers() -> bool:
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):
            return True
    except HTTPError:  # an answer, if not the best
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the libraries may have certificates of their own
    except OSError:
        return False
