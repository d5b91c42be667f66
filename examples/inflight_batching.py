"""In-flight batching: requests with different samplers and steps share calls of the model.

python examples/inflight_batching.py
"""

import sdrt

JOBS = (
    ("a red circle on a blue background", "DPM++ 2M Karras", 20),
    ("a white cross on a green background", "Euler a", 12),
    ("a black square on a yellow background", "UniPC", 8),
)

with sdrt.load("shapes") as pipe, sdrt.InflightBatcher(pipe) as batcher:
    handles = [
        batcher.submit(prompt, {"num_inference_steps": steps, "seed": i}, scheduler=sampler)[0]
        for i, (prompt, sampler, steps) in enumerate(JOBS)
    ]
    for i, handle in enumerate(handles):
        handle.future.result().image.save(f"inflight_{i}.png")
        seconds = handle.times.decoded - handle.times.submitted
        print(f"inflight_{i}.png: {handle.num_evaluations} evaluations, {seconds:.2f} s")
