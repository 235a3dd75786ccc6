"""Writes the list of files of the standard-library corpus: ``python -m seqzoo.data.stdlib_list``.

Run once per Python version that the corpus is to serve; the result, stdlib_files.txt, is committed.
Modules that share passages or a subject are one family and stay in one split. Families are split
by a hash of their name, nobody chose them.
"""

import hashlib
import pathlib
import sys

from seqzoo.data.stdlib import LIST, library_folder

# At most these shares of the bytes; the rest is for training.
_HELD_OUT = {"test": 0.11, "valid": 0.05}

_NO_CODE = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
# Tables that a program wrote, and what differs from machine to machine.
_TABLES = {
    "html/entities.py",
    "lib2to3/pgen2/token.py",
    "pydoc_data/topics.py",
    "re/_casefix.py",
    "stringprep.py",
    "keyword.py",
    "token.py",
}
_TABLE_MARK = b"gencodec.py"  # stands in every generated codec
_MACHINE = "_sysconfigdata"

FAMILIES = {
    "archives": "bz2 lzma gzip _compression zipfile tarfile zipimport zipapp",
    "build": "distutils sysconfig site _osx_support _aix_support _bootsubprocess ensurepip venv "
    "compileall py_compile ctypes",
    "calendar": "datetime _strptime calendar zoneinfo",
    "debug": "bdb pdb cmd code codeop cProfile profile pstats trace tracemalloc timeit",
    "decimal": "_pydecimal decimal fractions numbers",
    "docs": "inspect pydoc pydoc_data doctest xml xmlrpc",
    "files": "ntpath posixpath genericpath nturl2path pathlib os stat fnmatch glob shutil filecmp "
    "tempfile fileinput linecache",
    "grammar": "lib2to3 tokenize _compat_pickle tabnanny ast symtable dis opcode",
    "imports": "importlib imp pkgutil modulefinder runpy",
    "io": "_pyio io codecs encodings",
    "mail": "email mailbox mailcap mimetypes quopri uu base64 cgi cgitb imghdr sndhdr smtpd "
    "asynchat asyncore",
    "options": "argparse optparse getopt",
    "pickling": "pickle pickletools copyreg copy shelve dbm",
    "protocols": "ftplib poplib smtplib imaplib nntplib telnetlib netrc",
    "regex": "re sre_compile sre_constants sre_parse",
    "sockets": "asyncio socket ssl selectors socketserver",
    "sound": "aifc sunau wave chunk",
    "threads": "threading _threading_local queue sched multiprocessing concurrent subprocess "
    "signal contextvars",
    "toolkits": "tkinter turtle turtledemo idlelib curses sqlite3",
    "translation": "locale gettext",
    "types": "abc _py_abc _collections_abc collections types typing enum dataclasses functools "
    "operator weakref _weakrefset",
    "web": "http wsgiref urllib webbrowser html _markupbase",
}


def _write() -> None:
    root = library_folder()
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        content = path.read_bytes()
        if _is_code(name, content):
            found[name] = content
    split = _split_of_families({name: len(content) for name, content in found.items()})
    lines = [
        f"# Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}; "
        "written by seqzoo.data.stdlib_list: split, sha256, bytes, file",
        *(
            f"{split[family_of(name)]} {hashlib.sha256(content).hexdigest()} {len(content)} {name}"
            for name, content in found.items()
        ),
    ]
    LIST.write_text("\n".join(lines) + "\n", encoding="utf-8")


def family_of(name: str) -> str:
    """Returns the family of a file, by its top-level module."""
    module = pathlib.PurePosixPath(name).parts[0].removesuffix(".py")
    for family, members in FAMILIES.items():
        if module in members.split():
            return family
    return module


def _is_code(name: str, content: bytes) -> bool:
    parts = name.split("/")
    if _NO_CODE & set(parts) or parts[0].startswith((_MACHINE, "config-")) or not content.strip():
        return False
    if name in _TABLES or _TABLE_MARK in content:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _split_of_families(sizes: dict[str, int]) -> dict[str, str]:
    families: dict[str, int] = {}
    for name, size in sizes.items():
        families[family_of(name)] = families.get(family_of(name), 0) + size
    total = sum(families.values())
    room = {name: share * total for name, share in _HELD_OUT.items()}
    split = {}
    for family in sorted(families, key=lambda f: hashlib.sha256(f.encode()).digest()):
        split[family] = "train"
        for held_out in room:
            if families[family] <= room[held_out]:
                split[family] = held_out
                room[held_out] -= families[family]
                break
    return split


if __name__ == "__main__":
    _write()
