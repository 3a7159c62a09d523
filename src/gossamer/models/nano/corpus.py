"""Collect the corpus: permissively licensed Python source of installed distributions.

A distribution is taken when its own metadata states a permissive licence, and a file when it
looks written by a person. Whole distributions are held out, so that held-out text shares no
project with the training text.
"""

import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

HELDOUT = ("flask", "joblib", "networkx", "rich", "seaborn", "tomlkit", "trio")
"""Distributions the model never trains on: mid-size, readable, permissive."""

CALIBRATION = (
    "aiohttp", "celery", "django", "fonttools", "pydantic", "pytest", "requests", "scikit-learn",
    "sphinx", "sqlalchemy", "tornado", "werkzeug", "xarray",
)  # fmt: skip
"""Training distributions whose files form the packaged calibration text."""

_PERMISSIVE = {
    *("MIT", "MIT-CMU", "BSD-2-CLAUSE", "BSD-3-CLAUSE", "0BSD", "APACHE-2.0", "PSF-2.0"),
    *("PYTHON-2.0", "ISC", "ZLIB", "CC0-1.0", "BSL-1.0", "LLVM-EXCEPTION", "UNLICENSE", "HPND"),
}
_CLASSIFIERS = {
    "MIT License": "MIT",
    "BSD License": "BSD",
    "Apache Software License": "Apache-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "ISC License (ISCL)": "ISC",
}
_FREE_TEXT = (
    (re.compile(r"(the )?mit( license)?", re.I), "MIT"),
    (
        re.compile(r"(new |modified )?(3[- ]clause )?bsd([- ]?[23][- ]clause)?( license)?", re.I),
        "BSD",
    ),
    (re.compile(r"apache([- ](license,? )?(version )?2(\.0)?)?( license)?", re.I), "Apache-2.0"),
    (re.compile(r"psf(-2\.0)?", re.I), "PSF-2.0"),
    (re.compile(r"isc( license)?", re.I), "ISC"),
)
# Vendored copies would leak held-out projects into training, under licences nobody stated.
_VENDORED = re.compile(
    r"^(_?vendor(ed|s)?|_?externals?|extern|_?third_?party|thirdparty_files|_vendored_packages"
    r"|_distutils|blib2to3|lib2to3)$"
)
_OTHER_LICENCE = re.compile(
    r"General Public License|Mozilla Public|\bL?GPL|\bMPL\b|Creative Commons|CC[ -]BY|proprietary",
    re.I,
)
_GENERATED = re.compile(
    r"(auto(matically)?|machine)[- ]?generated|generated (by|from)|do not edit|@generated",
    re.I,
)
_LICENCE_FILE = re.compile(r"(licen[sc]e|notice|copying|authors)", re.I)


@dataclass(frozen=True)
class Package:
    """One distribution: what it is, what it may be used for, and its kept files.

    Attributes
    ----------
    name, version, licence : str
        From the distribution's own metadata.
    files : tuple of (str, str)
        Path inside the distribution, and text.
    notices : str
        The licence and notice files it ships.
    """

    name: str
    version: str
    licence: str
    files: tuple[tuple[str, str], ...]
    notices: str


def write_atomic(target: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def permissive_licence(metadata) -> str | None:
    """Name the licence if every statement in the metadata is permissive, else None.

    An unclear statement counts as a refusal: a licence text pasted into the field, or no
    statement at all, is not guessed at.
    """
    expression = metadata.get("License-Expression")
    if expression:
        choices = [re.split(r"\s+(?:AND|WITH)\s+", part) for part in expression.split(" OR ")]
        fine = any(
            all(term.strip("() ").upper() in _PERMISSIVE for term in part) for part in choices
        )
        return expression if fine else None
    stated = [
        line.split("::")[-1].strip()
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::") and line.strip() != "License :: OSI Approved"
    ]
    if stated:
        names = [_CLASSIFIERS[one] for one in stated if one in _CLASSIFIERS]
        return " AND ".join(dict.fromkeys(names)) if len(names) == len(stated) else None
    text = (metadata.get("License") or "").strip()
    if text.upper() in _PERMISSIVE:
        return text
    return next((name for pattern, name in _FREE_TEXT if pattern.fullmatch(text)), None)


def clean(data: bytes) -> str | None:
    """Return a file's text with plain newlines, or None if a person did not write it to be read.

    Drops files that are not UTF-8, tiny, huge, generated, under another licence, minified, or
    mostly numbers (lookup tables).
    """
    if not 200 <= len(data) <= 150_000:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n") + "\n"
    if "\x1e" in text or "\x00" in text:
        return None
    head = text[:3000]
    if _OTHER_LICENCE.search(head) or _GENERATED.search(head):
        return None
    lines = text.split("\n")
    letters = sum(map(str.isalpha, text))
    digits = sum(map(str.isdigit, text))
    visible = len(text) - sum(map(str.isspace, text))
    if max(map(len, lines)) > 400 or digits > 0.15 * visible or letters < 0.55 * visible:
        return None
    return text


def collect(folders: Iterable[Path], most: int = 16_000_000) -> list[Package]:
    """Gather the permissive distributions installed in some folders, without duplicate files.

    Parameters
    ----------
    folders : site-packages folders; where two hold the same distribution, the first counts.
    most : bytes kept of one distribution, so that no project's habits dominate.

    Returns
    -------
    list of Package
        Held-out distributions first, then by name. A training file of which a third of the long
        lines also stand in held-out files is dropped, as is any exact copy of an earlier file.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    for folder in folders:
        for dist in importlib.metadata.distributions(path=[str(folder)]):
            found.setdefault(dist.metadata["Name"].lower().replace("_", "-"), dist)
    names = sorted(found, key=lambda name: (name not in HELDOUT, name))
    seen: set[bytes] = set()
    heldout_lines: set[int] = set()
    packages = []
    for name in names:
        dist = found[name]
        licence = permissive_licence(dist.metadata)
        if licence is None:
            continue
        files, notices = [], []
        for entry in sorted(dist.files or [], key=str):
            path = PurePosixPath(str(entry))
            if ".." in path.parts or path.is_absolute():
                continue
            if "dist-info" in path.parts[0] and _LICENCE_FILE.search(path.name):
                notices.append(
                    Path(str(dist.locate_file(entry))).read_text("utf-8", errors="replace")
                )
            if path.suffix != ".py" or any(_VENDORED.match(part) for part in path.parts):
                continue
            source = Path(str(dist.locate_file(entry)))
            text = clean(source.read_bytes()) if source.is_file() else None
            if text is None:
                continue
            digest = hashlib.sha256(text.encode()).digest()
            long_lines = [hash(line.strip()) for line in text.split("\n") if len(line.strip()) > 40]
            repeated = sum(line in heldout_lines for line in long_lines)
            if digest in seen or (name not in HELDOUT and 3 * repeated > len(long_lines) > 0):
                continue
            seen.add(digest)
            if name in HELDOUT:
                heldout_lines.update(long_lines)
            files.append((str(path), text))
        size = 0
        files.sort(key=lambda file: order(file[0]))
        for count, (_, text) in enumerate(files):
            size += len(text.encode())
            if size > most:
                del files[count:]
                break
        if files:
            version = dist.metadata["Version"]
            notice = "\n\n".join(notices)
            packages.append(Package(name, version, licence, tuple(files), notice))
    return packages


def order(name: str) -> bytes:
    """Shuffle key of a file: a hash of its name, so that every machine draws the same order."""
    return hashlib.sha256(name.encode()).digest()


def excerpt(packages: Iterable[Package], size: int) -> tuple[bytes, list[Package]]:
    """Draw whole files, one package after the other, until about ``size`` bytes are reached.

    Returns
    -------
    bytes
        The gzip-compressed text, each document preceded by U+001E and its file name.
    list of Package
        The packages with the drawn files only.
    """
    queues = {}
    for package in packages:
        readable = [file for file in package.files if 2_000 <= len(file[1]) <= 24_000]
        queues[package] = sorted(readable, key=lambda file: order(file[0]), reverse=True)
    drawn: dict[Package, list[tuple[str, str]]] = {package: [] for package in queues}
    total = 0
    while total < size and any(queues.values()):
        for package, queue in queues.items():
            if queue and total < size:
                drawn[package].append(queue.pop())
                total += len(drawn[package][-1][1].encode())
    text = "".join(f"\x1e{name}\n{text}" for files in drawn.values() for name, text in files)
    used = [
        Package(one.name, one.version, one.licence, tuple(files), one.notices)
        for one, files in drawn.items()
        if files
    ]
    return gzip.compress(text.encode(), 9, mtime=0), used


def licences(texts: dict[str, list[Package]]) -> bytes:
    """Credit the packages whose files are shipped, with the notices their licences ask for."""
    parts = ["Sources of the packaged texts, and their licences.\n"]
    packages = {one.name: one for used in texts.values() for one in used}
    for name, used in texts.items():
        rows = [
            f"  {one.name} {one.version} ({one.licence}), {len(one.files)} files" for one in used
        ]
        parts.append("\n".join([f"{name}.txt.gz holds unchanged files of:", *rows]) + "\n")
    bodies: dict[str, list[str]] = {}
    for one in packages.values():
        bodies.setdefault(one.notices.strip(), []).append(f"{one.name} {one.version}")
    for body, owners in bodies.items():
        parts.append(f"{'=' * 80}\n{', '.join(owners)}\n{'=' * 80}\n\n{body}\n")
    return "\n".join(parts).encode()


def tokenise(packages: list[Package], tokenizer) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Encode both splits, a separator after every document.

    Parameters
    ----------
    packages : result of `collect`.
    tokenizer : tokenizers.Tokenizer, with ``<|endoftext|>`` as id 0.

    Returns
    -------
    dict of str to numpy.ndarray
        ``train`` and ``val``, uint16, documents in hash order.
    dict of str to int
        Tokens of each package.
    """
    splits: dict[str, list] = {"train": [], "val": []}
    for one in packages:
        split = "val" if one.name in HELDOUT else "train"
        splits[split] += [(order(name), one.name, text) for name, text in one.files]
    tokens: dict[str, int] = {}
    arrays = {}
    for split, documents in splits.items():
        documents.sort()
        pieces = []
        for start in range(0, len(documents), 256):
            part = documents[start : start + 256]
            for (_, name, _), code in zip(
                part, tokenizer.encode_batch_fast([text for *_, text in part]), strict=True
            ):
                pieces.append(np.array([*code.ids, 0], dtype=np.uint16))
                tokens[name] = tokens.get(name, 0) + len(pieces[-1])
        arrays[split] = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    return arrays, tokens


def save(target: Path, arrays: dict[str, np.ndarray], members: dict[str, bytes]) -> None:
    """Write the prepared corpus as one compressed file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            raw = io.BytesIO()
            np.save(raw, array, allow_pickle=False)
            archive.writestr(f"{name}.npy", raw.getvalue())
        for name, data in members.items():
            archive.writestr(name, data)
    write_atomic(target, buffer.getvalue())


def load(source: Path) -> tuple[np.ndarray, np.ndarray, dict, dict[str, bytes]]:
    """Read a prepared corpus.

    Returns
    -------
    train, val : numpy.ndarray of uint16
    meta : dict
        Packages, versions, licences, sizes.
    members : dict of str to bytes
        The tokenizer's files.
    """
    with zipfile.ZipFile(source) as archive:
        arrays = [
            np.load(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
            for name in ("train", "val")
        ]
        files = [name for name in archive.namelist() if name.startswith("tokenizer")]
        members = {name: archive.read(name) for name in files}
        return arrays[0], arrays[1], json.loads(archive.read("meta.json")), members
