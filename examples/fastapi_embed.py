"""A FastAPI application with one shared pipeline.

    uvicorn fastapi_embed:app --app-dir examples       # http://localhost:8000/image?prompt=...
    python examples/fastapi_embed.py                   # one request, without a network

FastAPI runs plain functions in threads, and any number of threads may share a pipeline.
"""

import io
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response

import sdrt


@asynccontextmanager
async def lifespan(app: FastAPI):
    with sdrt.load("shapes") as app.state.pipe:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/image")
def image(request: Request, prompt: str, steps: int = 20, seed: int = 0) -> Response:
    try:
        output = request.app.state.pipe(prompt, num_inference_steps=steps, seed=seed)
    except sdrt.UsageError as error:
        raise HTTPException(422, error.message) from error
    file = io.BytesIO()
    output.images[0].save(file, "PNG")
    return Response(file.getvalue(), media_type="image/png")


if __name__ == "__main__":
    from fastapi.testclient import TestClient

    with TestClient(app) as client:
        response = client.get("/image", params={"prompt": "a red circle on a blue background"})
    Path("fastapi_embed.png").write_bytes(response.content)
    print("fastapi_embed.png")
