"""Serving: many requests on one GPU, and many GPUs.

    engine = qoqlab.runtime.compile(q, "cuda", max_batch=64, max_tokens=2048)
    server = Server(engine)                                     # qoqlab.serve.server
    done = server.run([Request(ids, max_new_tokens=128)])       # qoqlab.serve.requests
    done[0].tokens, server.record()

It measures and explains; to offer a model to users, export it to an engine that is made for that (`qoqlab.formats`).
"""
