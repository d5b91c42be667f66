"""The HTTP server: OpenAI's images API, A1111's `/sdapi/v1`, health, metrics and the web page.

Knows HTTP and `sdrt.runtime`; not how a bundle is found, built or exported: whoever starts the
server passes a function that loads each pipeline. Within sdrt only the command line imports it.

- `server`: the process; `app`: the routes put together; `settings`: its configuration
- `middleware`: checks before every request (ASGI); `errors`: error responses
- `routes`: a module for each API; `schemas`: request bodies
- `model_manager`: loads, drains and closes the engines; `job`: follows one request's images
- `ray`: the same server on Ray Serve; `triton`: a model repository for Triton
"""
