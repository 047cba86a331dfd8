"""Writes the demo prompts: held-out problems of `demo_task.py` with their right answers.

    python datasets/make_demo_prompts.py

Makes `datasets/demo/prompts.jsonl` (one {"id", "prompt", "answer"} a line) and `datasets/demo/prompts.h5` (prompts
format version 1, same rows in the same order). The same seed and count give the same rows.
"""

import argparse
import json
from pathlib import Path

from demo_task import draw_unique_prompts, solve

from hpcinfer.data.prompts.prompts_writer import PromptsWriter

DEFAULT_FOLDER = Path(__file__).resolve().parent / "demo"


def demo_rows(seed: int, num_rows: int) -> list[dict[str, str]]:
    """Returns the rows: different held-out prompts, each with its right answer."""
    prompts = draw_unique_prompts(seed, num_rows, held_out=True)
    return [{"id": f"demo-{row:05d}", "prompt": p, "answer": solve(p)} for row, p in enumerate(prompts)]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_prompts_h5(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes a prompts file: `/prompts`, `/id` and `/meta/answer`."""
    with PromptsWriter(path) as writer:
        for row in rows:
            writer.append(row["prompt"], id=row["id"], meta={"answer": row["answer"]})


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
