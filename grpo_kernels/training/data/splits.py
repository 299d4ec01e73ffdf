"""A dataset's splits: of a file, a folder or a name on the Hub, read by the one rule of ``dataset_files``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_kernels.errors import described
from grpo_kernels.hub import check_folder, use_cache_if_unreachable
from grpo_kernels.rewards.reasoning_gym import PREFIX, generate_rows
from grpo_kernels.training.data.files import SUFFIXES, Row, json_splits, read_file, table_rows

_GSM8K = ("openai/gsm8k", "gsm8k")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ONLY = "train"  # what the split of a dataset that has one is called


class Splits(NamedTuple):
    """The splits of a dataset, none of which is read yet.

    Args:
        where: Names the dataset in errors.
        readers: By the split's name, what reads its rows.
        is_single: The dataset has one split and no name for it.
    """

    where: str
    readers: dict[str, Callable[[], list[Row]]]
    is_single: bool = False

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, of a part of one or of several: ``train``, ``train[:100]``, ``train+test[50%:]``.

        Raises:
            ValueError: There is no such split, its part cannot be read, or a file cannot.
        """
        names = dict.fromkeys(re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split))
        for name in names:
            if name not in self.readers:
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
    """What splits there are under a name.

    Args:
        name: A file, a folder, a name on the Hub, or ``reasoning_gym/`` and a dataset of reasoning-gym.
        config: The configuration of a dataset that has several; GSM8K's is "main" unless another is named.
        text_columns: As for ``read_file``.
        known: Other names that would have been right, for the message.
        seed: Of a dataset that is generated.

    Raises:
        ValueError: There is nothing of that name, or nothing that can be read.
    """
    path, where = Path(name).expanduser(), f"dataset {name!r}"
    if name.startswith(PREFIX):
        return Splits(where, {_ONLY: lambda: generate_rows(name.removeprefix(PREFIX), config, seed)}, is_single=True)
    if path.suffix.lower() in SUFFIXES:
        return _of_file(path, where, text_columns)
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
        return _of_tables(dataset, where)
    if path.is_dir():
        _check_one_kind(path, dataset, where)
    return _of_files(dataset, where, text_columns)


def _of_file(path: Path, where: str, text_columns: Sequence[str]) -> Splits:
    names = json_splits(path) if path.suffix.lower() == ".json" else []

    def reader(split: str) -> Callable[[], list[Row]]:
        return lambda: read_file(path, split=split, text_columns=text_columns)

    return Splits(where, {name: reader(name) for name in names or [_ONLY]}, is_single=not names)


def _of_tables(dataset: Any, where: str) -> Splits:
    """What ``save_to_disk`` wrote, or a builder prepared: one dataset or several by their split."""
    single = not isinstance(dataset, dict)
    tables = {_ONLY: dataset} if single else dataset

    def reader(table: Any) -> Callable[[], list[Row]]:
        return lambda: table_rows(table.with_format("arrow")[:]) if len(table) else []

    return Splits(where, {str(name): reader(table) for name, table in tables.items()}, is_single=single)


def _of_files(builder: Any, where: str, text_columns: Sequence[str]) -> Splits:
    """The files of a folder or of a Hub dataset: of these kinds they are read as single files are."""
    import datasets

    files = {str(name): [str(path) for path in paths] for name, paths in (builder.config.data_files or {}).items()}
    if not files or any(_kind(path) not in SUFFIXES for paths in files.values() for path in paths):
        try:
            builder.download_and_prepare()
            return _of_tables(builder.as_dataset(), where)
        except Exception as error:
            raise ValueError(f"{where} cannot be read: {described(error)}") from error

    def reader(split: str) -> Callable[[], list[Row]]:
        def read() -> list[Row]:
            try:
                paths = datasets.DownloadManager().download_and_extract(files[split])
            except Exception as error:
                raise ValueError(f"{where} cannot be read: {described(error)}") from error
            pairs = zip(map(Path, paths), map(_kind, files[split]), strict=True)
            options = {"split": split, "text_columns": text_columns}
            return [row for path, kind in pairs for row in read_file(path, suffix=kind, **options)]

        return read

    return Splits(where, {split: reader(split) for split in files})


def _kind(file: str) -> str:
    """A file's suffix, of a compressed one that of what is in it."""
    path = Path(file)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _COMPRESSED else path.suffix.lower()


def _check_one_kind(folder: Path, builder: Any, where: str) -> None:
    """Raises ValueError where a folder has files of several kinds, of which datasets reads one alone."""
    taken = {Path(str(path)).resolve() for paths in (builder.config.data_files or {}).values() for path in paths}
    kinds = {_kind(str(path)) for path in taken}
    others = sorted(p.name for p in folder.iterdir() if p.is_file() and _kind(p.name) in {*SUFFIXES} - kinds)
    if others and kinds & {*SUFFIXES}:
        raise ValueError(f"{where} has files of several kinds, {', '.join(sorted(kinds))} and {', '.join(others)}: "
                         "name one file, or keep one kind")  # fmt: skip
