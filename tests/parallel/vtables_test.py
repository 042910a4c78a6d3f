# SPDX-License-Identifier: Apache-2.0
"""Our objects define nothing of Gloo's: the headers are of another version than the library inside libtorch, and a class of theirs
written out by our compiler would take its place. Python's standard library only.

usage: vtables_test.py OBJECT...
"""
import re
import subprocess
import sys

# Weak and strong definitions of virtual tables, type information and functions of namespace gloo (or of c10d's classes on it).
OURS = re.compile(r"^[0-9a-f]+ [A-TV-Zu-z] (?:vtable for |typeinfo for |typeinfo name for )?(?:gloo::|c10d::ProcessGroupGloo)", re.MULTILINE)


def definitions(text):
    return [line for line in text.splitlines() if OURS.match(line)]


def main():
    bad = "0000000000000000 V vtable for gloo::rendezvous::Store\n0000000000000000 W c10d::ProcessGroupGloo::GlooStore::get(int)\n"
    good = "                 U gloo::Context::setTimeout(int)\n0000000000000010 t alambic::parallel::(anonymous namespace)::TcpMeeting::gloo()\n"
    assert len(definitions(bad)) == 2 and not definitions(good), "this check sees nothing"
    looked, found = 0, []
    for path in sys.argv[1:]:
        text = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        looked += "c10d::ProcessGroupGloo::" in text
        found += [f"{path}: {line}" for line in definitions(text)]
    assert looked, "no object uses ProcessGroupGloo: the wrong files were given"
    print("\n".join(found) or "no definition of Gloo's")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
