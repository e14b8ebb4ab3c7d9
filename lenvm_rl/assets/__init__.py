"""The models that ship with the package, under names that any option taking a model path understands."""

from pathlib import Path

FOLDER = Path(__file__).parent
EMBEDDED_MODELS = {
    "embedded/policy": FOLDER / "policy",
    "embedded/length_critic": FOLDER / "length_critic",
}


def model_path(name: str) -> str:
    """The folder of an embedded model; any other name as it is."""
    return str(EMBEDDED_MODELS[name]) if name in EMBEDDED_MODELS else name
