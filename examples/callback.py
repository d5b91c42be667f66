"""Callbacks: progress, a preview while the image is generated, and stopping early.

python examples/callback.py
"""

import sdrt

PROMPT = "a white cross on a green background"

with sdrt.load("shapes") as pipe:
    pipe = pipe.with_scheduler("DPM++ 2M Karras")

    # Progress: called after every evaluation of the model.
    def show(step):
        print(f"step {step.index}/{step.total}, timestep {step.timestep:.0f}")

    pipe(PROMPT, num_inference_steps=10, seed=0, on_step=show).images[0].save("callback.png")

    # Preview and stop: the loop as an iterator. Leave it when you have seen enough.
    preview = sdrt.Preview(pipe.manifest.preview)
    for step in pipe.steps(PROMPT, num_inference_steps=20, seed=0):
        image = preview.image(step)  # from the latents, without the decoder
        if step.index == 12:
            image.resize((64, 64)).save("callback_preview.png")
            pipe.decode(step.latents)[0].save("callback_stopped.png")
            break

print("callback.png, callback_preview.png, callback_stopped.png")
