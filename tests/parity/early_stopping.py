"""Prints when transformers stops early and which evaluation is its best, for sequences of values, as JSON.

Its EarlyStoppingCallback decides when to stop, and its Trainer which evaluation is the best.
"""

import json
import random
import sys
from types import SimpleNamespace

from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState


def ends(greater, patience, min_delta, values):
    args = SimpleNamespace(greater_is_better=greater, metric_for_best_model="loss", save_strategy="steps")
    me = SimpleNamespace(args=args, state=TrainerState())
    callback = EarlyStoppingCallback(patience, min_delta)
    control = TrainerControl()
    for step, value in enumerate(values, 1):
        me.state.global_step = step
        callback.on_evaluate(args, me.state, control, {"eval_loss": value})
        Trainer._determine_best_metric(me, {"eval_loss": value}, None)
        if control.should_training_stop:
            return step, me.state.best_global_step
    return None, me.state.best_global_step


random.seed(7)
cases = []
for number in range(200):
    greater, patience = number % 2 == 0, random.randint(1, 4)
    min_delta = random.choice([0.0, 0.0, 0.05, 0.2])
    values = [round(random.random(), 2) for _ in range(random.randint(1, 12))]
    stop, best = ends(greater, patience, min_delta, values)
    cases.append([greater, patience, min_delta, values, stop, best])
print("[")
print(",\n".join(json.dumps(case) for case in cases))
print("]")
