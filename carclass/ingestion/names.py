"""Names of photos and classes: normal forms for comparison, and names that are not those of photos."""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".hif",
    ".avif",
)  # fmt: skip
"""Endings that a label may omit or spell differently."""
JUNK_SUFFIXES = frozenset((
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".yml", ".yaml", ".toml", ".ini", ".cfg", ".xml", ".html", ".htm",
    ".css", ".js", ".md", ".rst", ".log", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".py", ".pyc", ".ipynb", ".sh",
    ".bat", ".db", ".sqlite", ".mat", ".npy", ".npz", ".pkl", ".pt", ".pth", ".h5", ".parquet", ".zip", ".tar", ".gz",
    ".tgz", ".7z", ".rar", ".mp4", ".mov", ".avi", ".mkv", ".mp3", ".wav", ".lnk", ".url", ".part", ".partial",
    ".crdownload", ".download", ".tmp", ".temp", ".bak", ".orig", ".swp",
))  # fmt: skip
"""Endings of text, tables, programs, archives, video, sound, unfinished downloads and backups."""
JUNK_FOLDERS = frozenset((
    "__macosx", "__pycache__", "@eadir", "@tmp", "@recycle", "#recycle", "$recycle.bin", "recycler", "lost+found",
    "found.000", "system volume information", "network trash folder", "temporary items", "cvs", "thumbs.db",
    "ehthumbs.db", "desktop.ini", "icon\r",
))  # fmt: skip
"""Folders of operating systems and programs, and names of their files, in lower case."""
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
"""Characters of no width."""
_UNUSUAL = re.compile(r"//|:|^[/.\s]|/[.\s]|\s$|\s/|[^\x00-\x7f]")
"""Parts of a path that `normalise_key` may change."""
_SEPARATORS = re.compile(r"[\s_\-]+")
_LEADING_ZEROS = re.compile(r"^0+(?=\d)")


def remove_invisible(text: str) -> str:
    """Return a text in NFC without blanks around it and characters of no width."""
    return text.strip() if text.isascii() else unicodedata.normalize("NFC", text.translate(_INVISIBLE)).strip()


def has_control_characters(text: str) -> bool:
    """Return True if a text has line breaks or other control characters."""
    return not text.isprintable() and any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in text)


def is_utf8(name: str) -> bool:
    """Return False if a name has bytes that are not UTF-8, as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def normalise_path(path: str) -> str:
    """Return `normalise_key` of a path in which folders may end with a backslash, as on Windows."""
    return normalise_key(path.replace("\\", "/"))


def normalise_key(path: str) -> str:
    """Return a path in NFC with single slashes, without scheme, leading slash, `./` and blanks around its parts."""
    if not _UNUSUAL.search(path):
        return path
    path = remove_invisible(path)
    path = re.sub(r"^[A-Za-z][A-Za-z0-9+.\-]+://", "", path)
    return "/".join(part for part in map(str.strip, path.split("/")) if part not in ("", "."))


def fold_case(path: str) -> str:
    """Return the normalised path without distinction of upper and lower case."""
    return unicodedata.normalize("NFC", normalise_path(path).casefold())


def remove_suffix(path: str) -> str:
    """Return `fold_case` of the path without the ending of an image."""
    path = fold_case(path)
    return next((path[: -len(suffix)] for suffix in IMAGE_SUFFIXES if path.endswith(suffix)), path)


def image_suffix(path: str) -> str:
    """Return the ending of an image, in lower case; none if there is another ending."""
    return next((suffix for suffix in IMAGE_SUFFIXES if path.lower().endswith(suffix)), "")


def remove_zeros(path: str) -> str:
    """Return `remove_suffix` of the path without leading zeros and a trailing `.0` if the name is a number."""
    folder, slash, name = remove_suffix(path).rpartition("/")
    number = name.removesuffix(".0")
    return folder + slash + (_LEADING_ZEROS.sub("", number) if number.isdecimal() else name)


def is_plain_number(path: str) -> bool:
    """Return True if the name, apart from its ending, is a number as a spreadsheet writes it: no leading zeros."""
    name = remove_suffix(path).rpartition("/")[2].removesuffix(".0")
    return name.isdecimal() and (name == "0" or name[0] != "0")


def source_prefixes(source: str) -> tuple[str, ...]:
    """Return the path of a source and all ends of it, longest first, each with a slash appended."""
    folders = normalise_path(source).split("/")
    return tuple("/".join(folders[start:]) + "/" for start in range(len(folders)))


def remove_prefix(path: str, prefixes: tuple[str, ...]) -> str | None:
    """Return the normalised path without the first of the prefixes that it begins with; None if it has none."""
    path = normalise_path(path)
    if not path.startswith(prefixes):
        return None
    return next(path.removeprefix(prefix) for prefix in prefixes if path.startswith(prefix))


def is_junk(path: str) -> bool:
    """Return True if the name is not that of a photo: hidden, of an operating system, or of another kind of file."""
    *folders, name = path.rstrip("/").split("/")
    if "/." in f"/{path}" and any(part.startswith(".") and part not in (".", "..") for part in (*folders, name)):
        return True
    ending = name[name.rfind(".") :].lower()
    if ending in JUNK_SUFFIXES or name == "Icon\r" or name.endswith("~"):
        return True
    return not JUNK_FOLDERS.isdisjoint(map(str.lower, folders))


def may_be_photo(path: str) -> bool:
    """Return True if the name has the ending of an image, or none."""
    return "." not in path.rpartition("/")[2] or bool(image_suffix(path))


def similar_names(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield groups of names that differ only in case, blanks, underscores or hyphens."""
    groups = defaultdict(list)
    for name in names:
        groups[_SEPARATORS.sub("", unicodedata.normalize("NFKC", name).casefold())].append(name)
    return (group for group in groups.values() if len(group) > 1)


def difference_text(name: str, keys: Sequence[str]) -> str:
    """Return the difference between a label's name and the most similar of some keys as a sentence."""
    stems = {remove_suffix(key).rpartition("/")[2]: key for key in reversed(keys)}
    if (key := stems.get(remove_suffix(name).rpartition("/")[2])) is not None:
        folders = [normalise_path(path).rpartition("/")[0] or "none" for path in (name, key)]
        return f"the label {name!r} and the file {key!r} are in different folders ({folders[0]}, {folders[1]})."
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0)
    return f"the label {name!r} and the file {close[0]!r} have different names." if close else "all files are junk."
