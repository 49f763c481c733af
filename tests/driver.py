"""Runs `jaxconv.launch` with a recipe that counts, for tests that need whole processes.

`python tests/driver.py <launch arguments>`: registers the module `jaxconv.recipes.counting`, whose
config is `tests/counting_config.py`, and hands over. The recipe adds `config.increment` to an array
of noise `config.steps` times, saves each step, and sleeps `config.pause` seconds a step.
"""

import sys
import time
import types

from jaxconv import launch, recipes
from jaxconv.errors import Refused, Stopped


def check(config):
    if config.steps < 1:
        raise Refused(f"config.steps={config.steps}; it must be at least 1")


def run(config, workdir):
    import jax

    from jaxconv.evals.report import Report
    from jaxconv.evals.statistics import Estimate
    from jaxconv.train import interrupt
    from jaxconv.train.checkpoint import Checkpoints
    from jaxconv.train.metrics import MetricsWriter

    if config.fail == "bug":
        raise RuntimeError("a bug in the recipe")
    with Checkpoints(workdir.checkpoints / "count") as checkpoints:
        start = checkpoints.latest() or 0
        # Noise, because zeros would be compressed to nothing on the disk.
        total_S = jax.random.normal(jax.random.key(config.seed), config.size)
        if start:
            (total_S,), _ = checkpoints.restore(start, (total_S,))
        print(f"starting at {start}", flush=True)
        with MetricsWriter(workdir, "count", resume_at=start or None) as metrics:
            for step in range(start + 1, config.steps + 1):
                print(f"working on {step}", flush=True)
                total_S = total_S + config.increment
                time.sleep(config.pause)
                metrics.write(step, {"total": float(total_S[0])})
                checkpoints.save(step, (total_S,), {"step": step})
                if interrupt.requested():
                    checkpoints.wait()
                    raise Stopped(f"saved at step {step}")
    if config.fail == "refusal":
        raise Refused("what was trained cannot be used")
    value = float(total_S[0])
    return Report(results={"total": Estimate(value, (value, value), config.steps, "units")})


def evaluate(config, workdir):
    from jaxconv.evals.report import Report

    return Report(notes=["evaluated again"])


recipe = types.ModuleType("jaxconv.recipes.counting")
recipe.check, recipe.run, recipe.evaluate = check, run, evaluate
sys.modules[recipe.__name__] = recipe
recipes.RECIPES += ("counting",)

if __name__ == "__main__":
    sys.exit(launch.main())
