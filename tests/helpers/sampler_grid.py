"""The configurations in which samplers are compared with diffusers'."""

import itertools
import random

STEPS = (1, 2, 3, 4, 5, 8, 20, 50)
BASE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
SCHEDULE = {
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
}
NO_SAMPLE_PREDICTION = {
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
}
SIGMA_OPTIONS = (
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)
LU = ({"use_lu_lambdas": True},)
ZERO_SNR = (
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    | {"timestep_spacing": "trailing"},
)
FINAL = ({"final_sigmas_type": "sigma_min"},)
LAMBDA_CLIPPED = tuple(
    {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": spacing}
    for spacing in SCHEDULE["timestep_spacing"]
)


def product(**options):
    return tuple(
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    )


ORDERS = {"solver_order": (1, 2, 3), "lower_order_final": (True, False)}
OWN = {
    "DDIMScheduler": (
        *ZERO_SNR,
        {"set_alpha_to_one": True},
        *product(eta=(0.3, 1.0), prediction_type=("epsilon", "v_prediction")),
    ),
    "DDPMScheduler": (
        *ZERO_SNR,
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
    ),
    "PNDMScheduler": (
        {"set_alpha_to_one": True},
        *product(skip_prk_steps=(False,), timestep_spacing=SCHEDULE["timestep_spacing"]),
        {"skip_prk_steps": False, "prediction_type": "v_prediction"},
    ),
    "LMSDiscreteScheduler": SIGMA_OPTIONS,
    "EulerDiscreteScheduler": (
        *SIGMA_OPTIONS,
        *ZERO_SNR,
        *FINAL,
        {"interpolation_type": "log_linear"},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"sigma_min": 0.05, "sigma_max": 10.0, "use_karras_sigmas": True},
    ),
    "EulerAncestralDiscreteScheduler": ZERO_SNR,
    "HeunDiscreteScheduler": SIGMA_OPTIONS,
    "KDPM2DiscreteScheduler": SIGMA_OPTIONS,
    "KDPM2AncestralDiscreteScheduler": SIGMA_OPTIONS,
    "DPMSolverSDEScheduler": SIGMA_OPTIONS,
    "DPMSolverMultistepScheduler": (
        *SIGMA_OPTIONS,
        *LU,
        *ZERO_SNR,
        *LAMBDA_CLIPPED,
        *product(beta_schedule=("squaredcos_cap_v2",), use_karras_sigmas=(True,)),
        *product(
            algorithm_type=("dpmsolver++", "sde-dpmsolver++"),
            solver_type=("midpoint", "heun"),
            euler_at_final=(False, True),
            final_sigmas_type=("zero", "sigma_min"),
            **ORDERS,
        ),
        *product(
            algorithm_type=("dpmsolver", "sde-dpmsolver"),
            solver_type=("midpoint", "heun"),
            final_sigmas_type=("sigma_min",),
            **ORDERS,
        ),
        {"algorithm_type": "dpmsolver", "prediction_type": "v_prediction", **FINAL[0]},
        {"algorithm_type": "dpmsolver", "prediction_type": "sample", **FINAL[0]},
    ),
    "DPMSolverSinglestepScheduler": (
        *SIGMA_OPTIONS,
        *LAMBDA_CLIPPED,
        *product(
            algorithm_type=("dpmsolver++", "sde-dpmsolver++"),
            solver_type=("midpoint", "heun"),
            final_sigmas_type=("zero", "sigma_min"),
            **ORDERS,
        ),
        *product(
            algorithm_type=("dpmsolver",),
            solver_type=("midpoint", "heun"),
            final_sigmas_type=("sigma_min",),
            **ORDERS,
        ),
    ),
    "DEISMultistepScheduler": (*SIGMA_OPTIONS, *product(**ORDERS)),
    "UniPCMultistepScheduler": (
        *SIGMA_OPTIONS,
        *ZERO_SNR,
        {"disable_corrector": [0, 2]},
        *product(
            solver_type=("bh1", "bh2"),
            predict_x0=(True, False),
            final_sigmas_type=("sigma_min",),
            **ORDERS,
        ),
        *product(solver_type=("bh2",), solver_order=(1, 2, 3)),
        {**SIGMA_OPTIONS[0], **FINAL[0]},
    ),
    "LCMScheduler": (*ZERO_SNR, {"original_inference_steps": 100}, {"timestep_scaling": 5.0}),
    "TCDScheduler": (*ZERO_SNR, {"eta": 0.0}, {"eta": 1.0}, {"original_inference_steps": 100}),
}


def configs(name):
    """Every configuration of a scheduler, without duplicates."""
    spacings = SCHEDULE["timestep_spacing"]
    if name in ("LCMScheduler", "TCDScheduler", "DPMSolverSinglestepScheduler"):
        spacings = ("leading",)  # they do not read it
    predictions = SCHEDULE["prediction_type"][: 2 if name in NO_SAMPLE_PREDICTION else 3]
    options = {**SCHEDULE, "timestep_spacing": spacings, "prediction_type": predictions}
    if "KDPM2" in name:  # the reference is slow here, and what this leaves out is the others'
        options["beta_schedule"] = ("scaled_linear",)
    every = [*product(**options), *OWN[name]]
    if SIGMA_OPTIONS[0] in OWN[name]:  # other levels depend on the spacing's ends
        every += [{**option, "timestep_spacing": s} for option in SIGMA_OPTIONS for s in spacings]
        every += [{**option, "prediction_type": "v_prediction"} for option in SIGMA_OPTIONS]
    unique = {repr(sorted(config.items())): config for config in every}
    return [{**BASE, "_class_name": name, **config} for config in unique.values()]


def cases(name, amount):
    """Configurations of a scheduler with numbers of steps, the same in every run: `all`, `each`
    configuration with two numbers of steps, or a fraction of all.
    """
    rng = random.Random(name)
    if amount == "each":
        return [(config, steps) for config in configs(name) for steps in rng.sample(STEPS, 2)]
    every = list(itertools.product(configs(name), STEPS))
    return every if amount == "all" else rng.sample(every, round(amount * len(every)))
