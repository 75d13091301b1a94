"""LitServe: its own batching over requests, raw pixels as the body, its fast queue.

`batch_timeout` 0 would never wait, but its loop then spins a whole core while nothing arrives.
"""

import json
import os

from bench.peers import Peer, arguments, pack_raw

PEER = Peer(
    name="LitServe",
    setting="raw pixels, max_batch_size 32, batch_timeout 5 ms, fast_queue",
    encode=pack_raw,
    decode=lambda body: json.loads(body)["scores"],
    content_type="application/octet-stream",
    module=__name__,
)


def serve(model: str, port: int) -> None:
    os.environ["BENCH_MODEL"] = model
    import litserve

    from bench.peers.litserve_api import Scores

    api = Scores(max_batch_size=32, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, timeout=False, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    serve(*arguments())
