#!/usr/bin/env bash
# What docs/own_pairs.md shows, on drawn pictures, below a new folder:
#     bash docs/own_pairs.sh FOLDER
set -euo pipefail
npc=$(cd "$(dirname "$0")/.." && pwd)
mkdir "${1:?give a new folder to write to}"
cd "$1"
runs=(--device cpu --num_workers 0 --batch_size 128)

# A small CLIP that knows other drawings, in place of OpenAI's
python "$npc/dataset/make_scenes.py" --out source --domain source --train 6000
python "$npc/main_CLIP.py" --dataset f30k --dataset_root source --vision_model tiny \
    --epochs 2 --lr 1e-3 "${runs[@]}" --experiments initial
model=logs/initial/best.pt

# 600 pictures with five captions each, of which 20 % are shuffled: pairs.csv and photos/.
# 300 more pictures, whose captions are all right, are for the final test
python "$npc/dataset/make_scenes.py" --out scenes --train 600 --dev 1 --test 300
python "$npc/construct_noise.py" --dataset f30k --dataset_root scenes --noise_ratio 0.2
ln -s scenes/images photos
split=scenes/annotations/scan_split
right=$split/train_caps.txt given=$split/0.2_noise_train_caps.txt
table() {
    echo image,caption
    awk 'FILENAME == ARGV[1] {name[FNR - 1] = $0} FILENAME == ARGV[2] {id[FNR - 1] = $0}
         FILENAME == ARGV[3] {print name[id[int((FNR - 1) / 5)]] "," $0}' \
        "$split/image_name.txt" "$split/train_ids.txt" "$1"
}
table "$right" > right.csv
table "$given" > pairs.csv

# Which pairs are wrong?
python "$npc/dataset/prepare_pairs.py" --pairs pairs.csv --images photos --root mine
find=(--dataset_root mine --vision_model "$model" --judge_lr 3e-4 --device cpu
      --num_workers 0 --out noise)
python "$npc/find_noise.py" "${find[@]}"
for tab in $(command -v chromium > /dev/null && echo worst sample); do
    chromium --headless --no-sandbox --disable-gpu --disable-background-networking \
        --hide-scrollbars --window-size=1100,1000 --screenshot="$tab.png" \
        "file://$PWD/noise/suspicious_pairs.html#tab=$tab"
done

# Answers to the 100 pairs of the page's random sample, as by a person who is always right
python - "$right" "$given" <<'END'
import csv, sys
right, given = (open(file).read().splitlines() for file in sys.argv[1:])
rows = list(csv.DictReader(open("noise/suspicious_pairs.csv", newline="")))
with open("decisions.csv", "w", newline="") as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    for row in rows:
        if row["stratum"]:
            k = int(row["row"])
            table.writerow(row | {"decision": "right" if right[k] == given[k] else "wrong"})
END
python "$npc/find_noise.py" "${find[@]}" --labels decisions.csv --write_clean mine_cleaned
for file in pairs.csv mine_cleaned/cleaned.csv; do
    echo "$file has $(grep -cvxFf right.csv "$file") wrong captions"
done

# Train on all pairs and on the kept ones, then test on pictures whose captions are right
runs+=(--vision_model "$model" --lr 3e-4)
python "$npc/main_CLIP.py" --dataset_root mine "${runs[@]}" --experiments all
python "$npc/main_CLIP.py" --dataset_root mine_cleaned "${runs[@]}" --experiments cleaned
python "$npc/main_NPC.py" --recipe robust --dataset_root mine "${runs[@]}" --experiments robust
for run in all cleaned robust; do
    python "$npc/main_CLIP.py" --eval --resume "logs/$run/best.pt" --dataset f30k \
        --dataset_root scenes --experiments "test_$run"
done

# Search
python "$npc/search.py" --resume logs/cleaned/best.pt --dataset_root mine --top 5 \
    --out search.png "a yellow disc above a brown triangle"
