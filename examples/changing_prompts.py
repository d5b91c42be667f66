"""Prompts that change during the run, take turns, and are composed with weights.

python examples/changing_prompts.py
"""

import sdrt

PROMPTS = {
    "circle": "a red circle on a blue background",
    "early": "a red [circle:square:0.1] on a blue background",
    "late": "a red [circle:square:0.6] on a blue background",
    "turns": "a [red|yellow] circle on a blue background",
    "joined": "a red circle on a blue background AND a yellow background:0.6",
}

with sdrt.load("shapes") as pipe:
    for name, prompt in PROMPTS.items():
        output = pipe(prompt, num_inference_steps=20, seed=0)
        output.images[0].save(f"prompt_{name}.png")
        print(f"prompt_{name}.png: {prompt} ({pipe.count_tokens(prompt)})")
