"""Real text that every Python carries: English from its manual, and the source of its standard library.

Nothing is downloaded and nothing is shipped. `pydoc_data.topics` holds a large part of the language reference as
plain English; the library's own files are source with docstrings and comments. The split into training and
held-out documents goes by a hash of the title, so it is the same on every machine and for every Python version,
although the texts themselves grow a little from one version to the next.
"""

import hashlib
import re
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

HELDOUT_SHARE = 0.1

# Files that exist, with little change, in Python 3.11 and later. One that a build lacks is left out.
_SOURCE_FILES = """
_collections_abc _compat_pickle _markupbase _py_abc _pydatetime _pydecimal _pyio _strptime _threading_local
_weakrefset abc argparse ast base64 bdb bisect bz2 cProfile calendar cmd code codecs codeop colorsys compileall
configparser contextlib copy copyreg csv dataclasses datetime difflib dis doctest enum filecmp fileinput fnmatch
fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac imaplib inspect
io ipaddress linecache locale lzma mailbox mimetypes modulefinder netrc ntpath numbers opcode operator optparse os
pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc
queue quopri random reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib socket
socketserver ssl stat statistics string stringprep subprocess symtable tabnanny tarfile tempfile textwrap threading
timeit tokenize trace traceback tracemalloc turtle types typing uuid warnings wave weakref webbrowser zipapp
zipimport
asyncio/base_events asyncio/base_subprocess asyncio/events asyncio/futures asyncio/locks asyncio/proactor_events
asyncio/queues asyncio/runners asyncio/selector_events asyncio/sslproto asyncio/staggered asyncio/streams
asyncio/subprocess asyncio/taskgroups asyncio/tasks asyncio/timeouts asyncio/transports asyncio/unix_events
asyncio/windows_events
collections/__init__ concurrent/futures/_base concurrent/futures/process concurrent/futures/thread
ctypes/__init__ ctypes/util curses/textpad dbm/__init__ dbm/dumb
email/_encoded_words email/_header_value_parser email/_parseaddr email/_policybase email/charset
email/contentmanager email/feedparser email/generator email/header email/headerregistry email/message email/parser
email/policy email/utils
html/parser http/__init__ http/client http/cookiejar http/cookies http/server
importlib/__init__ importlib/_bootstrap importlib/_bootstrap_external importlib/abc importlib/metadata/__init__
importlib/util json/__init__ json/decoder json/encoder logging/__init__ logging/config logging/handlers
multiprocessing/connection multiprocessing/context multiprocessing/forkserver multiprocessing/heap
multiprocessing/managers multiprocessing/pool multiprocessing/process multiprocessing/queues
multiprocessing/reduction multiprocessing/shared_memory multiprocessing/sharedctypes multiprocessing/synchronize
multiprocessing/util re/__init__ re/_compiler re/_parser tomllib/_parser
unittest/async_case unittest/case unittest/loader unittest/main unittest/mock unittest/result unittest/runner
unittest/suite urllib/parse urllib/request urllib/robotparser wsgiref/handlers wsgiref/headers wsgiref/simple_server
wsgiref/validate
xml/dom/expatbuilder xml/dom/minidom xml/dom/pulldom xml/dom/xmlbuilder xml/etree/ElementPath
xml/etree/ElementTree xml/sax/expatreader xml/sax/handler xml/sax/saxutils xml/sax/xmlreader
xmlrpc/client xmlrpc/server zoneinfo/_common zoneinfo/_tzpath zoneinfo/_zoneinfo
"""

_HEADING = re.compile(r"^(\S[^\n]*)\n([*=\-~^\"])\2{3,}\n", re.MULTILINE)
_SHORTEST_SECTION = 200  # characters; below this a section is a bare heading


@dataclass(frozen=True)
class Document:
    """One document: its title, which names it in the split, its kind and its text.

    >>> document = Document("english:The try statement", "english", "The try statement ...")
    >>> document.heldout
    False
    """

    title: str
    kind: Literal["english", "source"]
    text: str

    @property
    def heldout(self) -> bool:
        """Whether the document belongs to the held-out part, by a hash of its title alone."""
        digest = hashlib.sha256(self.title.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


def documents(
    split: Literal["train", "heldout", "all"] = "train",
    kind: Literal["english", "source", "all"] = "all",
) -> list[Document]:
    """Documents of real text in a fixed order: about 0.3 MB of English and 7 MB of source.

    A piece of English is one section of a manual topic, a piece of source is one file. Topics quote one another, so
    a section that has mostly been seen is left out; otherwise held-out text would also be training text.

    Args:
        split: "train", "heldout" (about a tenth, chosen by a hash of the title) or "all".
        kind: "english", "source" or "all" (English first).

    Raises:
        ValueError: for a split or kind that does not exist.

    >>> from actome.tasks.corpus import documents
    >>> titles = {document.title for document in documents("heldout")}
    >>> titles & {document.title for document in documents("train")}
    set()
    >>> documents("all", kind="source")[0].title
    'source:_collections_abc'
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split={split!r} does not exist; choose 'train', 'heldout' or 'all'")
    if kind not in ("english", "source", "all"):
        raise ValueError(f"kind={kind!r} does not exist; choose 'english', 'source' or 'all'")
    chosen = (_english() if kind != "source" else ()) + (_source() if kind != "english" else ())
    return [document for document in chosen if split == "all" or document.heldout == (split == "heldout")]


@lru_cache(maxsize=1)
def _english() -> tuple[Document, ...]:
    sections: dict[str, Document] = {}
    seen: set[str] = set()
    for name in sorted(topics):
        for heading, text in _sections(topics[name]):
            paragraphs = {" ".join(paragraph.split()) for paragraph in text.split("\n\n")[1:]}
            size = sum(map(len, paragraphs))
            repeated = sum(map(len, paragraphs & seen))
            if size < _SHORTEST_SECTION or repeated > size / 2:
                continue
            seen |= paragraphs
            title = f"english:{heading}"
            if title in sections:
                # The same heading over another text; the topic tells them apart.
                title = f"english:{name}/{heading}"
            sections[title] = Document(title, "english", text)
    return tuple(sections.values())


def _sections(topic: str) -> list[tuple[str, str]]:
    """Splits one topic at its underlined headings, into (heading, text with its heading)."""
    headings = list(_HEADING.finditer(topic))
    ends = [heading.start() for heading in headings[1:]] + [len(topic)]
    return [
        (heading[1].strip(), topic[heading.start() : end].strip() + "\n")
        for heading, end in zip(headings, ends, strict=True)
    ]


@lru_cache(maxsize=1)
def _source() -> tuple[Document, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found = ((name, root / f"{name}.py") for name in _SOURCE_FILES.split())
    return tuple(
        Document(f"source:{name}", "source", path.read_text(encoding="utf-8")) for name, path in found if path.is_file()
    )
