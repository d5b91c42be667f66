"""What a request costs and how long its prompt is, before it is sent."""

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import Response

from sdrt.bundle import parse_size
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.batching.estimate import RunEstimate, estimate_run
from sdrt.serve.control import build_control_options
from sdrt.serve.dependencies import EngineRequest, get_context
from sdrt.serve.errors import json_response
from sdrt.serve.generation import build_openai_request
from sdrt.serve.schemas import EstimateRequest, TokenCountRequest
from sdrt.serve.strict_json import StrictRoute

router = APIRouter(prefix="/v1", route_class=StrictRoute)


@router.post("/images/estimates")
async def estimate(request: Request, body: EstimateRequest) -> Response:
    """The cost of one image: evaluations of the model, rows of its batch, and seconds by the
    measured costs if nothing else runs. Nothing is generated or loaded: 503 for a model that is
    not loaded.
    """
    context = get_context(request)
    model = context.models.get(body.model)
    inputs = await context.run_in_thread(build_control_options, body)
    engine_request = build_openai_request(model, body, inputs)
    context.check_work(engine_request)
    cost = await context.run_in_thread(_estimate, engine_request, body.strength)
    return json_response(
        {
            "object": "image.estimate",
            "size": engine_request.output_size,
            "evaluations": cost.evaluations,
            "shallow_evaluations": cost.shallow_evaluations,
            "rows": cost.rows,
            "seconds": round(cost.seconds, 4),
        }
    )


def _estimate(request: EngineRequest, strength: float | None) -> RunEstimate:
    engine, options = request.model.engine, dict(request.options)
    if strength is not None:  # what the input image shows does not matter
        size = parse_size(request.size)
        options |= {"image": Image.new("RGB", size), "strength": strength}
    pipe = engine.pipe.with_scheduler(request.scheduler) if request.scheduler else engine.pipe
    return estimate_run(pipe.validate(request.prompt, parse_options(options)), engine.cost_model)


@router.post("/tokens")
async def count_tokens(request: Request, body: TokenCountRequest) -> Response:
    """How many tokens a prompt has, of the 75 that the model reads at a time. 503 for a model that
    is not loaded.
    """
    context = get_context(request)
    pipe = context.models.get(body.model).engine.pipe
    steps = body.num_inference_steps or 20
    counted = await context.run_in_thread(
        lambda: pipe.count_tokens(body.prompt, num_inference_steps=steps)
    )
    return json_response(
        {"object": "token_count", "tokens": counted.tokens, "limit": counted.limit}
    )
