"""What a run costs: seconds, and images and captions through the towers."""

import json
import time
from collections import Counter
from pathlib import Path

from utils.distributed import is_main
from utils.files import atomic_write, reading
from utils.method.passes import ENCODED

FILE = "cost.jsonl"


class Cost:
    """Sums up what training costs, also over runs of which one continues the other; dev scores, the
    bank and standing still for checkpoints are not counted. cost.jsonl has a line for each
    checkpoint: the cost up to there."""

    def __init__(self, run):
        self.run, self.lines, self.total = run, [], Counter()

    def load(self, step):
        """Take up what the run that this one continues had cost after `step` steps."""
        path = Path(self.run.args.resume).with_name(FILE)
        if path.is_file():
            with reading(path, "a list of costs", "delete it, and costs count from here"):
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                self.lines = [line for line in lines if line["step"] <= step]
        if self.lines and self.lines[-1]["step"] == step:
            self.total.update({k: v for k, v in self.lines[-1].items() if k != "step"})
        else:
            self.run.log(f"warning: {path} lacks the cost of the first {step} steps; it counts "
                         "from there")

    def start(self):
        """Begin to count."""
        self.clock, self.before = time.perf_counter(), ENCODED.copy()

    def add(self, step):
        """Add what there was since the last call, and write it down as the cost of `step` steps."""
        now = time.perf_counter()
        self.total.update({"seconds": now - self.clock, **(ENCODED - self.before)})
        self.start()
        self.lines.append({"step": step, **self.total})
        if is_main():
            with atomic_write(self.run.folder / FILE) as f:
                f.writelines(f"{json.dumps(line)}\n" for line in self.lines)

    def __str__(self):
        n = self.total
        return (f"training took {n['seconds']:.0f} s; the towers encoded {n['images_forward']} "
                f"images and {n['captions_forward']} captions, and passed gradients back through "
                f"{n['images_backward']} and {n['captions_backward']}")
