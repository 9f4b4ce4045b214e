#!/usr/bin/env bash
# Sets up .venv if need be, then fine-tunes an image model and a text model on the built-in data and shows what came out.
# Under five minutes on two CPU cores once everything is installed; runs again as often as you like.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
cd "$root"
py=$root/.venv/bin/python
began=$SECONDS

echo
echo "quickstart 1/2: handwritten digits, EfficientNet-Lite0 trained whole"
"$py" recipes/image_classification.py --model builtin:efficientnet_lite0 --dataset builtin:digits \
    --method full --image_size 96 --horizontal_flip false --output_dir runs/quickstart-digits --overwrite

echo
echo "quickstart 2/2: sentences about films, MiniLM trained whole on 2,000 of them"
"$py" recipes/text_classification.py --model builtin:minilm --dataset builtin:movie-snippets \
    --method full --max_train_samples 2000 --output_dir runs/quickstart-movie-snippets --overwrite

echo
"$py" - runs/quickstart-digits runs/quickstart-movie-snippets <<'PYTHON'
import json
import sys
from pathlib import Path

print(f"{'run':<34}{'accuracy':>9}{'training':>10}")
for folder in sys.argv[1:]:
    metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    scores = metrics.get("test") or metrics["validation"]
    print(f"{folder:<34}{scores['accuracy']:>9.3f}{metrics['train']['seconds']:>8.0f} s")
print(f"""
Each folder is an ordinary model; plain transformers loads it:

    from transformers import pipeline
    classify = pipeline("text-classification", "{sys.argv[2]}")
    print(classify("a film that stays with you"))
""")
PYTHON
echo "quickstart: done in $((SECONDS - began)) s. Next: the same commands with your own --dataset (a folder or a table)."
