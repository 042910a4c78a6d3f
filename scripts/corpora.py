# SPDX-License-Identifier: Apache-2.0
"""Makes the sample corpora from packages that setup.sh fetches. Standard library only; nothing of it is committed.

  corpora.py dialogues PACKAGE_FOLDER LANGUAGE OUTPUT   the dialogues of the PyPI package chatterbot-corpus (BSD-3-Clause) as
                                                        train.jsonl and heldout.jsonl, one {"messages": [...]} a line
  corpora.py handbook HTML_FOLDER LANGUAGE OUTPUT       one language of Debian's debian-handbook (GPL-2.0-or-later or
                                                        CC-BY-SA-3.0) as train/*.txt and heldout/*.txt, a file a page

What is held out is decided by content, not by chance: dialogues with the same question stay on one side, and whole
chapters of the handbook are held out. Output is the same whenever and wherever it is made.
"""
import hashlib
import html.parser
import json
import pathlib
import re
import sys

# Kept for measuring, never trained on: chapter 11 (network services) and the conclusion, by the names of their pages.
HELD_OUT_PAGES = ("network-services", "sect.http-web-server", "sect.ftp-file-server", "sect.nfs-file-server", "sect.windows-file-server",
                  "sect.http-ftp-proxy", "sect.ldap-directory", "sect.rtc-", "conclusion")


def plain_scalar(text):
    """One YAML scalar on one line, as these files use them: bare, 'single' or "double" quoted."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if len(text) > 1 and text[0] == text[-1] == '"':
        return json.loads(text)
    return text


def read_dialogues(path):
    """The conversations of one file: a list of lists of turns. A line without a dash continues the turn before it."""
    dialogues, inside = [], False
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not line.strip():
            continue
        if not line[0].isspace() and not line.startswith("-"):
            inside = line.startswith("conversations:")
        elif inside:
            new = re.match(r"\s*- - ?(.*)$", line)
            turn = re.match(r"\s+- ?(.*)$", line)
            if new:
                dialogues.append([new[1]])
            elif turn and dialogues:
                dialogues[-1].append(turn[1])
            elif dialogues:
                dialogues[-1][-1] += " " + line.strip()
    return [[plain_scalar(turn) for turn in turns] for turns in dialogues]


def is_held_out(question, share=8):
    return int(hashlib.sha256(question.casefold().encode()).hexdigest(), 16) % share == 0


def dialogues(package, language, output):
    folder = package / "chatterbot_corpus" / "data" / language
    if not folder.is_dir():
        raise SystemExit(f"corpora.py: {folder}: no such language in the package")
    lines, seen = {"train": [], "heldout": []}, set()
    for path in sorted(folder.glob("*.yml")):
        for turns in read_dialogues(path):
            turns = [turn for turn in turns if turn]
            if len(turns) < 2 or tuple(turns) in seen:
                continue
            seen.add(tuple(turns))
            turns = turns[: len(turns) // 2 * 2]  # whole question-and-answer pairs
            messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
            lines["heldout" if is_held_out(turns[0]) else "train"].append(json.dumps({"messages": messages}, ensure_ascii=False))
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in lines.items():
        (output / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{output / name}.jsonl: {len(rows)} dialogues, {sum(len(row.encode()) for row in rows)} bytes")


class Paragraphs(html.parser.HTMLParser):
    """The running text of a handbook page: headings and paragraphs, without navigation, contents and program listings."""

    SKIPPED = {"banner", "docnav", "docnav top", "toc", "screen", "programlisting", "list-of-figures"}
    BLOCKS = {"div", "p", "h1", "h2", "h3", "h4", "li", "dt", "dd"}

    def __init__(self):
        super().__init__()
        self.texts, self.stack, self.text = [], [], ""

    def flush(self):
        text = re.sub(r"\s+", " ", self.text).strip()
        if text:
            self.texts.append(text)
        self.text = ""

    def handle_starttag(self, tag, attributes):
        if tag in ("br", "img", "hr", "meta", "link", "input"):
            return
        attributes = dict(attributes)
        skip = attributes.get("class") in self.SKIPPED or tag in ("pre", "head", "script") or attributes.get("id") in ("title", "banner")
        if tag in self.BLOCKS:
            self.flush()
        self.stack.append((tag, skip or bool(self.stack and self.stack[-1][1])))

    def handle_endtag(self, tag):
        while self.stack:
            opened, _ = self.stack.pop()
            if opened in self.BLOCKS:
                self.flush()
            if opened == tag:
                break

    def handle_data(self, data):
        if not (self.stack and self.stack[-1][1]):
            self.text += data


def page_paragraphs(path):
    page = Paragraphs()
    page.feed(path.read_text(encoding="utf-8"))
    page.flush()
    return page.texts


def handbook(root, language, output):
    if not (root / language).is_dir():
        raise SystemExit(f"corpora.py: {root / language}: no such language in the package")
    # A translation repeats English where it is unfinished; such paragraphs are left out of every other language.
    english = set() if language == "en-US" else {text for page in (root / "en-US").glob("*.html") for text in page_paragraphs(page)}
    count = {"train": [0, 0], "heldout": [0, 0]}
    for page in sorted((root / language).glob("*.html")):
        if page.name == "index.html":
            continue
        texts = list(dict.fromkeys(text for text in page_paragraphs(page) if text not in english))
        if sum(map(len, texts)) < 200:
            continue
        part = "heldout" if page.name.startswith(HELD_OUT_PAGES) else "train"
        (output / part).mkdir(parents=True, exist_ok=True)
        data = ("\n\n".join(texts) + "\n").encode()
        (output / part / f"{page.stem}.txt").write_bytes(data)
        count[part][0] += 1
        count[part][1] += len(data)
    for part, (pages, size) in count.items():
        print(f"{output / part}: {pages} pages, {size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in ("dialogues", "handbook"):
        raise SystemExit(__doc__)
    {"dialogues": dialogues, "handbook": handbook}[sys.argv[1]](pathlib.Path(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4]))
