"""A program for ``precond-ref check --command``: SGD with momentum, to show the protocol (no library needed).

    precond-ref check --command "python examples/check_command.py" --method SGD --level 1

Each line on standard input is a request, each line on standard output its reply, both JSON objects::

    {"op": "init", "config": {"momentum": 0.5, "nesterov": false, "lr": 0.5, "weight_decay": 0.0},
     "dtype": "float64", "params": [{"shape": [2, 1], "data": [1.0, -2.0]}]}
        ->  {"ok": true}, or {"unsupported": "why"}, or {"error": "why"} for an invalid configuration
    {"op": "step", "grads": [{"shape": [2, 1], "data": [0.5, "nan"]}]}
        ->  {"params": [{"shape": [2, 1], "data": [0.75, "nan"]}], "state": [{"buffer": {"shape": ..., "data": ...}}]}

One array per parameter, entries row by row, "nan", "inf" and "-inf" as strings; "state" may be left out.
"""

import json
import sys


def init(request):
    """Keep configuration and parameters; refuse options that this program does not have."""
    global config, params, buffers
    config = request["config"]
    if config["weight_decay"]:
        return {"unsupported": "weight decay"}
    params = [(p["shape"], [float(x) for x in p["data"]]) for p in request["params"]]
    buffers = [[0.0] * len(data) for _, data in params]
    return {"ok": True}


def step(request):
    """Make one step on every parameter."""
    lr, momentum = config["lr"], config["momentum"]
    for (_, x), b, grad in zip(params, buffers, request["grads"], strict=True):
        for i, g in enumerate(float(g) for g in grad["data"]):
            b[i] = momentum * b[i] + g
            x[i] -= lr * (g + momentum * b[i] if config["nesterov"] else b[i])
    return {
        "params": [entry(shape, x) for shape, x in params],
        "state": [{"buffer": entry(shape, b)} for (shape, _), b in zip(params, buffers, strict=True)],
    }


def entry(shape, data):
    """Return an array in the form of the protocol."""
    return {"shape": shape, "data": [x if x - x == 0 else str(x) for x in data]}


for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({"init": init, "step": step}[request["op"]](request)), flush=True)
