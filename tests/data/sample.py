#!/usr/bin/env python3
"""Cuts the first two weeks out of the three flights logs.

usage: sample.py SRC_DIR OUT_DIR

Reads flights.jsonl.zst, fleet.jsonl.zst and weather.jsonl.zst in SRC_DIR and writes files of the same names into OUT_DIR.
Of flights and weather it keeps the events before CUT; of fleet all, as that is reference data registered before the year starts.
Kept lines are the source's bytes, in the source's order. Needs the `zstd` command.
"""
import json, os, subprocess, sys

CUT = "2013-01-15T00:00:00Z"  # every `time` has this form, so comparing text compares time
SOURCES = {"flights": CUT, "fleet": None, "weather": CUT}


def lines(path):
    with subprocess.Popen(["zstd", "-dcq", path], stdout=subprocess.PIPE) as zstd:
        yield from zstd.stdout
    if zstd.returncode:
        sys.exit(f"zstd could not read {path}")


def time(line):
    text = json.loads(line)["time"]
    if len(text) != len(CUT) or not text.endswith("Z"):
        sys.exit(f"not a time like {CUT}: {text}")
    return text


def write(path, content):
    # --stream-size puts the length into the frame, as it would be for a file
    subprocess.run(["zstd", "-19", "-qf", f"--stream-size={len(content)}", "-o", path], input=content, check=True)


def main(src, out):
    if os.path.realpath(src) == os.path.realpath(out):
        sys.exit("SRC_DIR and OUT_DIR are the same")
    os.makedirs(out, exist_ok=True)
    for source, cut in SOURCES.items():
        name = f"{source}.jsonl.zst"
        kept = [line for line in lines(os.path.join(src, name)) if cut is None or time(line) < cut]
        write(os.path.join(out, name), b"".join(kept))
        print(name, len(kept))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
