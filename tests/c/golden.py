"""Prints the golden mask vectors as lines that kernels_test reads: seed offset first_word threshold count words..."""

import json
from pathlib import Path

VECTORS = Path(__file__).resolve().parents[2] / "fastdrop" / "vectors" / "masks.json"

for mask in json.loads(VECTORS.read_text())["masks"]:
    if 0 < mask["threshold"] < 2**32:  # the others are never drawn
        words = mask["words"]
        print(mask["seed"], mask["offset"], f"{mask['first_word']:x}", f"{mask['threshold']:x}", len(words), *words)
