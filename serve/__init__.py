"""The HTTP server around in-flight engines: OpenAI's images API, the `/sdapi` one, health, metrics.

Knows HTTP and `sdrt.runtime`; not how a bundle is found, built or exported: whoever starts it hands
over a function that loads each pipeline. Nothing here is imported by the rest of sdrt but by the
command that serves.

    guard      before everything: hosts, keys, sizes and speeds of bodies (pure ASGI)
    app        the routes put together; openai, sdapi, health: their endpoints
    models     the engines by name: loading, draining, closing
    watch      one request's tickets, followed until they end or the client is gone
    problem    every refusal and failure as a status and a body
    front      a fleet on Ray Serve as its clients see it; replica: one of many behind it;
               merged: the answers of all as one
"""
