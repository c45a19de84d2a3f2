"""Prints the learning rates of transformers' own schedulers, one list per case, as JSON.

    schedules.py CASES    JSON: [{"name", "kwargs", "peak", "warmup", "steps"}, ...]
"""

import json
import sys

import torch
from transformers import get_scheduler


def rates(case):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=case["peak"])
    scheduler = get_scheduler(
        case["name"], optimizer, case["warmup"], case["steps"], scheduler_specific_kwargs=case["kwargs"]
    )
    made = []
    for _ in range(case["steps"]):
        made.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return made


json.dump([rates(case) for case in json.loads(sys.argv[1])], sys.stdout)
