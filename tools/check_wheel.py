"""Check the content of a built wheel: ``python tools/check_wheel.py dist/*.whl``."""

import json
import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

PACKAGES = frozenset({"precond_ref", "precond_ref_torch", "precond_ref_jax"})
MANIFESTS = [f"precond_ref/conformance/vectors/{version}/manifest.json" for version in ("v1", "v2")]
PYTEST_DOOR = "precond_ref/conformance/test_subject.py"
"""The only file of tests in the wheel: it tests the user's optimizer."""
DATA = [
    PYTEST_DOOR,
    "precond_ref/problems/data/digits.csv.gz",
    "precond_ref/problems/data/digits-licence.txt",
    "precond_ref/conformance/schema.json",
    *MANIFESTS,
]
CORE = ["array-api-compat"]


def faults(wheel: Path) -> list[str]:
    """Return the faults of ``wheel``, one sentence per fault."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        info = {name.partition("/")[0] for name in names if name.partition("/")[0].endswith(".dist-info")}
        if len(info) != 1:
            return [f"expected one .dist-info folder, found {sorted(info)}"]
        (info_dir,) = info
        texts = {
            name: archive.read(f"{info_dir}/{name}").decode() if f"{info_dir}/{name}" in names else ""
            for name in ("METADATA", "entry_points.txt")
        }

        vectors = []
        for manifest in MANIFESTS:
            entries = json.loads(archive.read(manifest))["cases"] if manifest in names else []
            vectors += [str(PurePosixPath(manifest).parent / entry["file"]) for entry in entries if "file" in entry]

    found = []
    packages = {name.partition("/")[0] for name in names} - info
    if packages != PACKAGES:
        found.append(f"top-level names are {sorted(packages)}, not {sorted(PACKAGES)}")
    for package in sorted(PACKAGES & packages):
        for file in ("__init__.py", "py.typed"):
            if f"{package}/{file}" not in names:
                found.append(f"{package}/{file} is missing")
    stray = [
        name
        for name in names
        if "__pycache__" in name
        or (name.endswith(".py") and PurePosixPath(name).name.startswith("test_") and name != PYTEST_DOOR)
    ]
    if stray:
        found.append(f"holds files that belong to no release: {stray}")
    found += [f"{file} is missing" for file in [*DATA, *vectors] if file not in names]
    if f"{info_dir}/licenses/LICENSE" not in names:
        found.append("no LICENSE in the .dist-info folder")
    if "precond-ref = precond_ref.cli:main" not in texts["entry_points.txt"].splitlines():
        found.append("the command precond-ref is not declared")
    requires = Parser().parsestr(texts["METADATA"]).get_all("Requires-Dist", [])
    required = [line for line in requires if "extra ==" not in line]
    if [re.split(r"[^\w.-]", line)[0] for line in required] != CORE:
        found.append(f"core dependencies are {required}, not {CORE}")
    return found


def main(wheels: list[str]) -> int:
    """Print the faults of each wheel; return 1 if there are any, or if there is no wheel, else 0."""
    if not wheels:
        print("usage: python tools/check_wheel.py WHEEL...", file=sys.stderr)
        return 1
    failed = False
    for wheel in wheels:
        found = faults(Path(wheel))
        failed = failed or bool(found)
        print(f"{Path(wheel).name}: {'ok' if not found else ''}")
        for fault in found:
            print(f"  {fault}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
