#!/usr/bin/env bash
# The peers of `precond-ref bench --against peers`, in environments of their own: `bash benchmarks/peers.sh FOLDER`.
# Afterwards: `precond-ref bench --against peers --peers FOLDER`, or set PRECOND_REF_PEERS. PYTHON chooses the interpreter
# (3.11: the old JAX has no wheel for later ones).
set -euo pipefail
exec </dev/null
folder=${1:?"usage: bash benchmarks/peers.sh FOLDER"}
mkdir -p "$folder"

make() { # environment, then packages
    local name=$1
    shift
    [[ -x "$folder/$name/bin/python" ]] || "${PYTHON:-python3.11}" -m venv "$folder/$name"
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

make torch "torch==2.13.0" "pytorch_optimizer==4.1.0" "sirfshampoo==0.0.1" "heavyball==3.2.1" "array-api-compat>=1.13,<2"
# Its own requirements are a whole training framework; the one file that is needed, agd.py, wants PyTorch alone.
make torch --no-deps "atorch==0.2.5"
# Declares no requirements; written for the JAX of early 2024.
make jax "precondition_opt==0.3.0" "jax==0.4.25" "jaxlib==0.4.25" "flax==0.8.2" "optax==0.2.1" "chex==0.1.86" \
    "numpy<2" "scipy<1.13" "array-api-compat>=1.13,<2"
