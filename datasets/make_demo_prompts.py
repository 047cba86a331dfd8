"""Writes the demo prompts: held-out problems of `demo_task.py` with their right answers.

    python datasets/make_demo_prompts.py

Makes `datasets/demo/prompts.jsonl` (one {"id", "prompt", "answer"} a line) and `datasets/demo/prompts.h5` (prompts
format version 1, same rows in the same order). The same seed and count give the same rows.
"""

import argparse
import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
from demo_task import draw_unique_prompts, solve

FORMAT = "hpcinfer-prompts"
VERSION = 1
CHUNK_BYTES = 64 * 1024
DEFAULT_FOLDER = Path(__file__).resolve().parent / "demo"


def demo_rows(seed: int, num_rows: int) -> list[dict[str, str]]:
    """Returns the rows: different held-out prompts, each with its right answer."""
    prompts = draw_unique_prompts(seed, num_rows, held_out=True)
    return [{"id": f"demo-{row:05d}", "prompt": p, "answer": solve(p)} for row, p in enumerate(prompts)]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pack_texts(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (data u1 [bytes], offsets i8 [n + 1]): text i is the UTF-8 of `data[offsets[i]:offsets[i + 1]]`."""
    encoded = [text.encode() for text in texts]
    offsets = np.zeros(len(texts) + 1, dtype="<i8")
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), dtype="u1"), offsets


def write_texts(group: h5py.Group, texts: list[str]) -> str:
    """Writes packed texts as `data` and `offsets` into a group.

    Returns:
        The SHA-256, in hexadecimal, of the offsets' bytes followed by the data's.
    """
    data, offsets = pack_texts(texts)
    for name, values in (("data", data), ("offsets", offsets)):
        # maxshape: HDF5 refuses a chunk that is larger than a dataset of fixed size.
        chunks = (CHUNK_BYTES // values.itemsize,)
        group.create_dataset(name, data=values, chunks=chunks, maxshape=(None,), fletcher32=True)
    return hashlib.sha256(offsets.tobytes() + data.tobytes()).hexdigest()


def write_prompts_h5(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes a prompts file of version 1: `/prompts`, `/id` and `/meta/answer`, each packed texts."""
    with h5py.File(path, "w") as file:
        fingerprint = write_texts(file.create_group("prompts"), [row["prompt"] for row in rows])
        write_texts(file.create_group("id"), [row["id"] for row in rows])
        write_texts(file.create_group("meta/answer"), [row["answer"] for row in rows])
        file.attrs.update(format=FORMAT, version=VERSION, n_rows=len(rows), fingerprint=fingerprint)


def main() -> None:
    """Writes both files and says where they are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="folder to write into")
    parser.add_argument("--rows", type=int, default=1000, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = demo_rows(args.seed, args.rows)
    write_jsonl(args.folder / "prompts.jsonl", rows)
    write_prompts_h5(args.folder / "prompts.h5", rows)
    print(f"{len(rows)} rows in {args.folder}")


if __name__ == "__main__":
    main()
