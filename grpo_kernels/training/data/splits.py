"""A dataset's splits: of a file, a folder or a name on the Hub, read by the one rule of ``data.files``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from grpo_kernels.errors import described
from grpo_kernels.hub import check_folder, use_cache_if_unreachable
from grpo_kernels.rewards import reasoning_gym
from grpo_kernels.training.data.files import SUFFIXES, Row, json_splits, read_file, table_rows

_GSM8K = ("openai/gsm8k", "gsm8k")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ONLY = "train"  # what the split of a dataset that has one is called


class Splits(NamedTuple):
    """The splits of a dataset, none of which is read yet."""

    where: str  # names the dataset in errors
    readers: dict[str, Callable[[], list[Row]]]  # by the split's name
    is_single: bool = False  # it has one split and no name for it

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, of a part of one or of several: ``train``, ``train[:100]``, ``train+test[50%:]``."""
        names = dict.fromkeys(re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split))
        if not names.keys() <= self.readers.keys():
            known = ", ".join(self.readers)
            raise ValueError(f"{self.where} has no split {split!r}; it has {known}, and parts as {_ONLY}[:100]")
        rows = {name: self.readers[name]() for name in names}
        if split in rows:
            return rows[split]
        import datasets

        try:
            parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows[name]) for name in rows})
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{self.where}: split {split!r} cannot be read: {described(error)}") from error
        return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]


def open_dataset(
    name: str, config: str | None, text_columns: Sequence[str], known: Sequence[str] = (), *, seed: int = 0
) -> Splits:
    """The splits of a file, a folder or a name on the Hub; ``known`` are other names that would have been right."""
    path, where = Path(name).expanduser(), f"dataset {name!r}"
    if name.startswith(reasoning_gym.PREFIX):
        read = partial(reasoning_gym.generate_rows, name.removeprefix(reasoning_gym.PREFIX), config, seed)
        return Splits(where, {_ONLY: read}, is_single=True)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        names = json_splits(path) if suffix == ".json" else []
        read = partial(read_file, path, text_columns=text_columns)
        return Splits(where, {split: partial(read, split=split) for split in names or [_ONLY]}, is_single=not names)
    if path.is_file():
        raise ValueError(f"{where} is a file of another kind; {', '.join(SUFFIXES)} can be read")
    check_folder("dataset_name", name)
    import datasets  # seconds of import that only a run on a folder or a Hub name needs

    if not path.is_dir():
        use_cache_if_unreachable()
        config = "main" if config is None and name in _GSM8K else config
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    source = str(path.resolve()) if path.is_dir() else name
    try:
        dataset = datasets.load_from_disk(source) if is_saved else datasets.load_dataset_builder(source, config)
    except Exception as error:
        kinds = [f"a built-in task ({', '.join(known)})"] if known else []
        kinds += [f"a file ({', '.join(SUFFIXES)})", "a folder or a name on the Hub"]
        raise ValueError(f"dataset_name must be {', '.join(kinds)}, got {name!r}: {described(error)}") from error
    if is_saved:
        return _table_splits(dataset, where)
    return _builder_splits(dataset, path if path.is_dir() else None, where, text_columns)


def _table_splits(dataset: Any, where: str) -> Splits:
    """What ``save_to_disk`` wrote, or a builder prepared: one dataset or several by their split."""

    def rows(table: Any) -> list[Row]:
        return table_rows(table.with_format("arrow")[:]) if len(table) else []

    is_single = not isinstance(dataset, dict)
    tables = {_ONLY: dataset} if is_single else dataset
    return Splits(where, {str(name): partial(rows, table) for name, table in tables.items()}, is_single)


def _builder_splits(builder: Any, folder: Path | None, where: str, text_columns: Sequence[str]) -> Splits:
    """The files of a folder or of a Hub dataset: of these kinds they are read as single files are."""
    import datasets

    files = {str(split): [str(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()}
    kinds = {_kind(path) for paths in files.values() for path in paths}
    if folder is not None and not kinds.isdisjoint(SUFFIXES):  # datasets reads the files of one kind alone
        others = sorted(p.name for p in folder.iterdir() if p.is_file() and _kind(p.name) in {*SUFFIXES} - kinds)
        if others:
            raise ValueError(
                f"{where} has files of several kinds, {', '.join(sorted(kinds))} and {', '.join(others)}: "
                "name one file, or keep one kind"
            )

    def rows(split: str) -> list[Row]:
        try:
            paths = datasets.DownloadManager().download_and_extract(files[split])
        except Exception as error:
            raise ValueError(f"{where} cannot be read: {described(error)}") from error
        read = partial(read_file, split=split, text_columns=text_columns)
        pairs = zip(paths, files[split], strict=True)
        return [row for path, file in pairs for row in read(Path(path), suffix=_kind(file))]

    if files and kinds <= {*SUFFIXES}:
        return Splits(where, {split: partial(rows, split) for split in files})
    try:
        builder.download_and_prepare()
        return _table_splits(builder.as_dataset(), where)
    except Exception as error:
        raise ValueError(f"{where} cannot be read: {described(error)}") from error


def _kind(file: str) -> str:
    """A file's suffix, of a compressed one that of what is in it."""
    path = Path(file)
    return Path(path.stem if path.suffix.lower() in _COMPRESSED else path).suffix.lower()
