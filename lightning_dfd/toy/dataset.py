"""The toy world as a folder of captioned videos, like the one a user brings.

python -m lightning_dfd.toy.dataset --output toy_videos --clips 600 --seed 0
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from lightning_dfd.data.writing import write_video
from lightning_dfd.files import replacing
from lightning_dfd.toy import world

RECORD = "world.json"


def write_world(folder: str | Path, clips: int, seed: int, right: bool = False, progress: bool = True) -> None:
    """Write the clips that `world.draw_clips(clips, seed, right)` draws as mp4 files with a metadata.jsonl.

    Every line of metadata.jsonl has `file_name`, `text` and the scene's factors. A folder that holds exactly
    these clips is left as it is; an interrupted run starts again.

    Raises:
        ValueError: the folder holds another world, or `clips` is below 1.
    """
    folder = Path(folder)
    if clips < 1:
        raise ValueError(f"need at least one clip, got {clips}")
    wanted = {"clips": clips, "seed": seed, "right": right}
    if (folder / RECORD).is_file():
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if found != wanted:
            raise ValueError(f"{folder} holds the world {found}, not {wanted}; name another folder or delete this one")
        return
    lines = []
    scenes = world.draw_scenes(clips, seed, right)  # one at a time, so that memory does not grow with the clips
    for number, scene in enumerate(tqdm(scenes, desc="toy videos", total=clips, disable=not progress)):
        name = f"{number:05d}.mp4"
        write_video(folder / name, world.render(scene), world.FPS, pix_fmt="yuv444p")
        lines.append(json.dumps({"file_name": name, "text": scene.caption, **asdict(scene)}))
    with replacing(folder / "metadata.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with replacing(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(wanted), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--right", action="store_true", help="only clips whose captions are right, as if curated")
    args = parser.parse_args()
    write_world(args.output, args.clips, args.seed, args.right)


if __name__ == "__main__":
    main()
