"""``accuracy.py HOW WHERE FOLDER TASKS NAME``: a model's accuracy on a task of lm-eval's, and all likelihoods.

``HOW`` is ``server``, at the URL ``WHERE``, or ``mlx``, by mlx-lm's own evaluation; ``FOLDER`` has the model.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

how, where, folder, tasks, name = sys.argv[1:]
if how == "mlx":
    import mlx.core as mx
    from mlx_lm.evaluate import MLXLM

    model, arguments = MLXLM(folder, use_chat_template=False), {}
    model._model.set_dtype(mx.float32)  # half precision takes a CPU ten times as long, and rounds
else:
    settings = {
        "model": "demo",
        "base_url": f"{where}/v1/completions",
        "tokenizer": folder,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 8,
        "max_retries": 1,
    }
    model, arguments = "local-completions", {"model_args": settings}
done = lm_eval.simple_evaluate(
    model=model, tasks=[name], task_manager=TaskManager(include_path=tasks, include_defaults=False), **arguments
)
samples = sorted(done["samples"][name], key=lambda sample: sample["doc_id"])
likelihoods = [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples]
print("\naccuracy:" + json.dumps({"accuracy": done["results"][name]["acc,none"], "likelihoods": likelihoods}))
