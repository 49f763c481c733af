"""Config of the recipe in `driver.py`."""

from ml_collections import ConfigDict

PRESETS = ("tiny", "long")


def get_config(preset: str = "tiny") -> ConfigDict:
    return ConfigDict(
        {
            "recipe": "counting",
            "steps": {"tiny": 3, "long": 1000}[preset],
            "seed": 0,
            "increment": 0.5,
            "pause": 0.0,
            "size": 4,
            "fail": "",
            "verbose": False,
            "shape": (1, 2),
            "group": {"rate": 1e-3, "name": "adam"},
        }
    )
