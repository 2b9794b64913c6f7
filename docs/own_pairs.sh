#!/usr/bin/env bash
# What docs/own_pairs.md shows, on drawn pictures, below a new folder:
#     bash docs/own_pairs.sh FOLDER
set -euo pipefail
out=$(realpath -m "${1:?give a new folder to write to}")
mkdir "$out"
cd "$(dirname "$0")/.."
runs=(--checkpoint_path "$out/logs" --device cpu --num_workers 0 --batch_size 128)

# A small CLIP that knows other drawings, in place of OpenAI's
python dataset/make_scenes.py --out "$out/source" --domain source --train 6000
python main_CLIP.py --dataset f30k --dataset_root "$out/source" --vision_model tiny \
    --epochs 2 --lr 1e-3 "${runs[@]}" --experiments initial
model=$out/logs/initial/best.pt

# 600 pictures with five captions each, of which 20 % are shuffled: pairs.csv and photos/.
# 300 more pictures, whose captions are all right, are for the final test
python dataset/make_scenes.py --out "$out/scenes" --train 600 --dev 1 --test 300
python construct_noise.py --dataset f30k --dataset_root "$out/scenes" --noise_ratio 0.2
ln -s scenes/images "$out/photos"
split=$out/scenes/annotations/scan_split
right=$split/train_caps.txt given=$split/0.2_noise_train_caps.txt
{
    echo image,caption
    awk 'FILENAME == ARGV[1] {name[FNR - 1] = $0} FILENAME == ARGV[2] {id[FNR - 1] = $0}
         FILENAME == ARGV[3] {print name[id[int((FNR - 1) / 5)]] "," $0}' \
        "$split/image_name.txt" "$split/train_ids.txt" "$given"
} > "$out/pairs.csv"

# Which pairs are wrong?
python dataset/prepare_pairs.py --pairs "$out/pairs.csv" --images "$out/photos" --root "$out/mine"
find=(--dataset_root "$out/mine" --vision_model "$model" --judge_lr 3e-4 --device cpu
      --num_workers 0 --out "$out/noise")
python find_noise.py "${find[@]}"

# Answers to the 100 pairs of the page's random sample, as by a person who is always right
python - "$out" "$right" "$given" <<'END'
import csv, sys
out, *files = sys.argv[1:]
right, given = (open(file).read().splitlines() for file in files)
rows = list(csv.DictReader(open(f"{out}/noise/suspicious_pairs.csv", newline="")))
with open(f"{out}/decisions.csv", "w", newline="") as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    for row in rows:
        if row["stratum"]:
            k = int(row["row"])
            table.writerow(row | {"decision": "right" if right[k] == given[k] else "wrong"})
END
python find_noise.py "${find[@]}" --labels "$out/decisions.csv" --write_clean "$out/mine_cleaned"

# Train on all pairs and on the kept ones, then test on pictures whose captions are right
runs+=(--vision_model "$model" --lr 3e-4)
python main_CLIP.py --dataset_root "$out/mine" "${runs[@]}" --experiments all
python main_CLIP.py --dataset_root "$out/mine_cleaned" "${runs[@]}" --experiments cleaned
python main_NPC.py --recipe robust --dataset_root "$out/mine" "${runs[@]}" --experiments robust
for run in all cleaned robust; do
    python main_CLIP.py --eval --resume "$out/logs/$run/best.pt" --dataset f30k \
        --dataset_root "$out/scenes" --checkpoint_path "$out/logs" --experiments "test_$run"
done

# Pictures
python search.py --resume "$out/logs/cleaned/best.pt" --dataset_root "$out/mine" \
    --top 5 --out "$out/search.png" "a red star above a blue ring"
for tab in worst sample; do
    chromium --headless --no-sandbox --disable-gpu --disable-background-networking \
        --window-size=1000,640 --screenshot="$out/$tab.png" \
        "file://$out/noise/suspicious_pairs.html#tab=$tab"
done
